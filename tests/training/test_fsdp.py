"""What several processes do: refusals at start-up, and sharding as far as one process shows it (test_distributed)."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from material import short_trainer, tiny_data, tiny_module
from tiny_models import tiny_model
from torch import distributed
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dream_lightning.model_factory import checkpoint_layers, compile_layers
from dream_lightning.training.fsdp import FSDP2Strategy, refuse_untested, shard

HOME_MADE = type("HomeMadeStrategy", (DDPStrategy,), {})


@pytest.mark.parametrize(
    ("strategy", "options", "kind", "words"),
    [
        (FSDPStrategy, {}, {}, "strategy is FSDPStrategy, .* set it to fsdp2 or ddp"),
        (ModelParallelStrategy, {}, {}, "not tested: set it to fsdp2 or ddp"),
        (DeepSpeedStrategy, {}, {}, "not tested: set it to fsdp2 or ddp"),
        (HOME_MADE, {}, {}, "HomeMadeStrategy"),
        (FSDP2Strategy, {}, {"quantized": True}, "quantized weights .* trainer.strategy=ddp"),
        (FSDP2Strategy, {}, {"compiled_answers": True}, "set model.sampling.compile=false"),
        (FSDP2Strategy, {"precision": "bf16-true"}, {}, "precision is bf16-true, .* 32-true or bf16-mixed"),
        (SingleDeviceStrategy, {"precision": "bf16-true"}, {"adapted": True}, "round the adapters: set bf16-"),
        (DDPStrategy, {"precision": "16-mixed"}, {}, "precision is 16-mixed, .* bf16-mixed"),
        (SingleDeviceStrategy, {"precision": "64-true"}, {}, "precision is 64-true"),
        (DDPStrategy, {"gradient_clip_algorithm": "value"}, {}, "gradient_clip_algorithm is value"),
    ],
)
def test_untested_combinations_are_refused(strategy, options, kind, words):
    """As much of a trainer as is looked at, for strategies and precisions that a CPU cannot have."""
    defaults = {"precision": "32-true", "gradient_clip_algorithm": None, "strategy": strategy.__new__(strategy)}
    with pytest.raises(ValueError, match=words):
        refuse_untested(SimpleNamespace(**defaults | options), **{"adapted": False, "quantized": False} | kind)


def test_tested_combinations_pass():
    for strategy in ("auto", "ddp", "fsdp2"):
        for precision in ("32-true", "bf16-mixed"):
            real = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, precision=precision, logger=False)
            refuse_untested(real, adapted=True, quantized=strategy != "fsdp2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "gradient_clip_algorithm is value"),
        ({"gradient_clip_val": -1.0}, r"gradient_clip_val is -1\.0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0"),
        ({"log_every_n_steps": -1}, "log_every_n_steps is -1"),
        ({"overfit_batches": 1}, "overfit_batches is 1, .* set data.first_n"),
        ({"max_steps": 0}, "max_steps is 0: nothing would be trained"),
        ({"limit_train_batches": 0}, "limit_train_batches is 0: nothing would be trained"),
    ],
)
def test_a_run_refuses_before_it_builds_anything(sums, tmp_path, options, words):
    model = tiny_module()
    with pytest.raises(ValueError, match=words):
        short_trainer(tmp_path, **options).fit(model, tiny_data(sums, tmp_path))
    assert model.model is None


def test_optimizers_that_are_not_tested_on_sharded_weights_are_refused(monkeypatch):
    strategy = FSDP2Strategy()
    monkeypatch.setattr(strategy.__class__.__mro__[1], "setup_optimizers", lambda self, trainer: None)
    strategy._optimizers = [torch.optim.Adagrad([torch.zeros(1, requires_grad=True)])]
    with pytest.raises(ValueError, match=r"Adagrad, .* torch.optim.AdamW"):
        strategy.setup_optimizers(None)


def test_a_file_is_not_a_sharded_checkpoint(tmp_path, monkeypatch):
    strategy = FSDP2Strategy()
    monkeypatch.setattr(strategy, "broadcast", lambda path: path)
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a sharded checkpoint, .* the strategy that saved it"):
        strategy.load_checkpoint(tmp_path / "last.ckpt")


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
    torch._dynamo.reset()


def rooted(model):
    root = torch.nn.Module()
    root.model, root.forward = model, lambda ids: model(ids).logits.sum()
    return root


@pytest.mark.parametrize("recomputed", [False, True])
def test_sharded_layers_are_compiled_once_for_rows_of_all_lengths(mesh, recomputed):
    """FSDP2 gives a layer another tensor than the model does, but not when the layer is recomputed."""
    model, counter = tiny_model(3).train(), CompileCounter()
    root = rooted(model)
    compile_layers(model, backend=counter)
    if recomputed:
        checkpoint_layers(model, True)
    shard(model, root, mesh=mesh, compute_dtype=torch.bfloat16, steps=())
    for length in (12, 30, 17):
        root(torch.zeros(1, length, dtype=torch.long)).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("trained", ["adapters", "all", "head"])
def test_frozen_embeddings_and_head_are_gathered_once(mesh, trained):
    model = tiny_model(3).train()
    root = rooted(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or ("lm_head" if trained == "head" else "q_proj") in name)
    shard(model, root, mesh=mesh, compute_dtype=None, steps=())
    for _ in range(2):
        root(torch.zeros(1, 5, dtype=torch.long)).backward()
        ends = (model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight)
        assert [isinstance(weight, DTensor) for weight in ends] == [trained != "adapters"] * 3
        assert all(isinstance(weight, DTensor) for weight in model.model.layers.parameters())
