"""Fused projections compute the same numbers, and training, files and optimizers do not see the fused weights."""

import copy
from contextlib import nullcontext

import pytest
import torch
from material import random_dream
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from dream_lightning.adapters import LoraParams, add_lora
from dream_lightning.kernels.cuda_graphs import CompiledDenoiser
from dream_lightning.kernels.fused_projections import fuse_weights_, fused_projections
from dream_lightning.model import DreamModel
from dream_lightning.model.modeling import DreamMLP
from dream_lightning.training.optimizer import AdamW8bit

pytestmark = pytest.mark.usefixtures("fresh_compiler")
FEW, MANY = 1024, 1025  # tokens for which gate and up are fused, and are not
Q_K_V, GATE_UP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]


@pytest.fixture
def model():
    return tiny_model(2)


@pytest.fixture
def ids(prompts):
    return prompts(3, 9)


def share_storage(model, group):
    """Whether the weights of the group share one storage, for each layer of the model."""
    return [
        len({layer.get_submodule(name).weight.untyped_storage().data_ptr() for name in group}) == 1
        for layer in model.model.layers
    ]


def storage_bytes(model):
    storages = [p.untyped_storage() for p in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def test_hidden_states_are_the_same_and_products_are_fewer(model, ids, monkeypatch):
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    called, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (called.append(names[id(self)]), forward(self, x))[1])

    def calls(tokens=None):
        called.clear()
        with nullcontext() if tokens is None else fused_projections(model.model, tokens):
            torch.testing.assert_close(model.model(ids), expected, rtol=1e-6, atol=1e-6)
        return sorted(called)

    expected = model.model(ids)
    separate = sorted(called)
    assert calls(FEW) == [name for name in separate if name not in ("down_proj", "o_proj")]
    fuse_weights_(model.model)
    assert calls(FEW) == []
    assert calls(MANY) == ["gate_proj"] * 2 + ["up_proj"] * 2
    assert calls() == separate and len(separate) == 14


@pytest.mark.parametrize(
    ("optimizer_class", "dtype"), [(torch.optim.AdamW, torch.float32), (AdamW8bit, torch.bfloat16)]
)
def test_training_is_the_same_to_the_bit(model, ids, optimizer_class, dtype):
    model.to(dtype)
    other, parameters = copy.deepcopy(model), dict(model.named_parameters())
    losses = []
    for trained in (model, other):
        optimizer = optimizer_class(trained.parameters(), lr=1e-2)
        for step in range(4):
            if trained is model and step in (0, 2):
                with torch.inference_mode():  # as Lightning validates
                    fuse_weights_(trained.model)
            loss = trained(ids).logits.float().logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:4] == losses[4:] and len(set(losses)) == 4
    assert all(share_storage(model, Q_K_V)) and all(share_storage(model, GATE_UP))
    assert all(p is parameters[n] and p.is_leaf and p.requires_grad for n, p in model.named_parameters())
    assert storage_bytes(model) == storage_bytes(other)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_forward_with_gradients_is_refused(model, ids):
    with fused_projections(model.model, FEW), pytest.raises(AssertionError, match="no gradients"):
        model.model(ids)


def test_files_are_the_same(model, tmp_path):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    separate, fused, plain, pickled = (
        tmp_path / name for name in ("separate", "fused", "plain.safetensors", "plain.pt")
    )
    model.save_pretrained(separate)
    fuse_weights_(model.model)
    model.save_pretrained(fused)
    assert (separate / "model.safetensors").read_bytes() == (fused / "model.safetensors").read_bytes()
    save_file(model.state_dict(), plain)
    torch.save(model.state_dict(), pickled)
    assert pickled.stat().st_size < 1.3 * plain.stat().st_size
    for state in (load_file(plain), torch.load(pickled, weights_only=True)):
        assert all(torch.equal(state[n], t) for n, t in before.items())
    loaded = DreamModel.from_pretrained(fused)
    fuse_weights_(loaded.model)
    loaded.load_state_dict(before)
    assert all(share_storage(loaded, Q_K_V))


def test_only_plain_layers_of_one_kind_are_fused(model, ids):
    add_lora(model, LoraParams(rank=2, targets=["q_proj", "v_proj"]), generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0]
    layer.mlp.up_proj.weight.requires_grad = True  # while gate_proj is frozen
    seen = []
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    before = [p.data_ptr() for p in model.parameters()]
    fuse_weights_(model.model)
    assert [p.data_ptr() for p in model.parameters()] == before
    with torch.no_grad(), fused_projections(model.model, FEW):
        model.model(ids)
    assert seen
    layer.mlp.up_proj.weight.requires_grad = False
    fuse_weights_(model.model)
    assert share_storage(model, GATE_UP) == [True, False]


class OtherMLP(DreamMLP):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("owner", ["self_attn", "mlp"])
def test_replaced_and_hooked_modules_compute_as_before(model, ids, owner):
    first, second = model.model.layers
    getattr(first, owner).register_forward_hook(lambda _module, _inputs, output: 2 * output)
    second.mlp.__class__ = OtherMLP
    expected = model.model(ids)
    fuse_weights_(model.model)
    with fused_projections(model.model, FEW):
        assert torch.equal(model.model(ids), expected)


@torch.no_grad()
def test_compiled_layers_share_one_compilation(model, ids):
    frames = CompileCounter()
    fuse_weights_(model.model)
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend=frames)
    for _ in range(2):
        with fused_projections(model.model, FEW):
            model.model(ids)
    assert frames.frame_count == 1


def test_weights_that_would_lose_their_alignment_are_not_moved():
    """Compiled code for a GPU assumes multiples of 16 bytes."""
    sizes = {"hidden_size": 6, "intermediate_size": 5, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = random_dream(**sizes).bfloat16()
    before = [p.data_ptr() for p in model.parameters()]
    fuse_weights_(model.model)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_weights_that_were_moved_are_fused_again(model, ids, run):
    expected, fast = run(model, ids).sequences, CompiledDenoiser(model, capture=False)
    model.double().float()
    assert not any(share_storage(model, Q_K_V))
    assert torch.equal(run(fast, ids).sequences, expected)
    assert all(share_storage(model, Q_K_V)) and all(share_storage(model, GATE_UP))


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_residuals_added_in_the_product_are_the_same(model, ids, compiled):
    """After in-place changes of the weights, too."""
    fuse_weights_(model.model)
    for layer in model.model.layers if compiled else []:
        layer.compile(dynamic=False)
    autocast = torch.autocast("cpu", torch.bfloat16)
    for _ in range(2):
        last, half = model.model(ids), model.model(ids, span=(4, 9))
        with autocast:
            expected = model.model(ids)
        with fused_projections(model.model, FEW):
            for _ in range(2):  # the residual stream changes in-place, the embeddings must not
                torch.testing.assert_close(model.model(ids), last, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(model.model(ids, span=(4, 9)), half, rtol=1e-5, atol=1e-5)
            with autocast:
                torch.testing.assert_close(model.model(ids), expected, rtol=1e-2, atol=1e-2)
        for p in model.parameters():
            p.mul_(1.1).add_(0.01)
