"""A divided model, as far as one process can show it; `test_distributed.py` has two."""

import pytest
import torch
from tiny_models import tiny_model
from torch import distributed
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dream_lightning.model_factory import checkpoint_layers, compile_layers
from dream_lightning.training.sharding import shard


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.parametrize("recomputed", [False, True])
def test_divided_layers_are_compiled_once_for_rows_of_all_lengths(mesh, recomputed):
    """FSDP2 gives a layer another tensor than the model, and when it is recomputed the model's own."""
    model, counter = tiny_model(3).train(), CompileCounter()
    root = torch.nn.Module()
    root.model, root.forward = model, lambda ids: model(ids).logits.sum()
    compile_layers(model, backend=counter)
    if recomputed:
        checkpoint_layers(model, True)
    shard(model, root, mesh=mesh, compute_dtype=torch.bfloat16, steps=())
    for length in (12, 30, 17):
        root(torch.zeros(1, length, dtype=torch.long)).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("trained", ["adapters", "all", "head"])
def test_embeddings_and_head_that_do_not_train_are_gathered_once(mesh, trained):
    model, root = tiny_model(3).train(), torch.nn.Module()
    root.model, root.forward = model, lambda ids: model(ids).logits.sum()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or ("lm_head" if trained == "head" else "q_proj") in name)
    shard(model, root, mesh=mesh, compute_dtype=None, steps=())
    for _ in range(2):
        root(torch.zeros(1, 5, dtype=torch.long)).backward()
        ends = (model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight)
        assert [isinstance(weight, DTensor) for weight in ends] == [trained != "adapters"] * 3
        assert all(isinstance(weight, DTensor) for weight in model.model.layers.parameters())
