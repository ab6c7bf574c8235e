"""Several linear layers as one product: the same numbers, and nobody else notices."""

import copy
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from dream_lightning.adapters import LoraParams, add_lora
from dream_lightning.kernels import fused_projections as joint
from dream_lightning.kernels.fused_projections import fuse_weights_
from dream_lightning.model import DreamModel
from dream_lightning.model.modeling import DreamMLP
from dream_lightning.sampling import CompiledDenoiser, SamplingParams, diffusion_generate
from dream_lightning.training.optimizer import PagedAdamW8bit

FEW, MORE, MANY = 1024, 1025, 2048
Q_K_V, GATE_UP = ("self_attn", ["q_proj", "k_proj", "v_proj"]), ("mlp", ["gate_proj", "up_proj"])


@pytest.fixture
def model():
    return tiny_model(2)


@pytest.fixture
def ids(prompts):
    return prompts(3, 9)


def lie_together(model, group):
    """Whether the layers of the group share one storage, layer by layer of the model."""
    owner, names = group
    return [
        len({getattr(getattr(layer, owner), n).weight.untyped_storage().data_ptr() for n in names}) == 1
        for layer in model.model.layers
    ]


def held(model):
    """Bytes of the parameters' storages."""
    storages = [p.untyped_storage() for p in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def test_hidden_states_are_the_same(model, ids, monkeypatch):
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    called, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (called.append(names[id(self)]), forward(self, x))[1])

    def calls(tokens=None):
        called.clear()
        with nullcontext() if tokens is None else model.model.joined(tokens):
            torch.testing.assert_close(model.model(ids), expected, rtol=1e-6, atol=1e-6)
        return sorted(called)

    expected = model.model(ids)
    separate = sorted(called)
    assert calls(FEW) == [name for name in separate if name not in ("down_proj", "o_proj")]  # they add themselves
    model.model.fuse_weights_()
    assert calls(FEW) == []
    assert calls(MORE) == ["gate_proj"] * 2 + ["up_proj"] * 2
    assert calls() == separate and len(separate) == 14


@torch.no_grad()
def test_weights_changed_in_place_are_seen(model, ids):
    model.model.fuse_weights_()
    before = model.model(ids)
    for p in model.parameters():
        p.mul_(1.1).add_(0.01)
    with model.model.joined(FEW):
        joint = model.model(ids)
    torch.testing.assert_close(joint, model.model(ids), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(joint, before)


@pytest.mark.parametrize(
    ("optimizer_class", "dtype"), [(torch.optim.AdamW, torch.float32), (PagedAdamW8bit, torch.bfloat16)]
)
def test_nobody_notices(model, ids, optimizer_class, dtype):
    """Training goes on to the bit as without: same parameters, same gradients, same states of the optimiser."""
    model.to(dtype)
    other, parameters = copy.deepcopy(model), dict(model.named_parameters())
    losses = []
    for trained in (model, other):
        optimizer = optimizer_class(trained.parameters(), lr=1e-2)
        for step in range(4):
            if trained is model and step in (0, 2):
                with torch.inference_mode():  # as Lightning validates
                    trained.model.fuse_weights_()
            loss = trained(ids).logits.float().logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:4] == losses[4:] and len(set(losses)) == 4
    assert all(lie_together(model, Q_K_V)) and all(lie_together(model, GATE_UP))
    assert all(p is parameters[n] and p.is_leaf and p.requires_grad for n, p in model.named_parameters())
    assert held(model) == held(other)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_no_gradient_is_lost_unnoticed(model, ids):
    model.model.fuse_weights_()
    with model.model.joined(FEW), pytest.raises(AssertionError, match="no gradients"):
        model.model(ids)


def test_files_are_as_before(model, tmp_path):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "apart")
    model.model.fuse_weights_()
    model.save_pretrained(tmp_path / "together")
    apart, together = (tmp_path / folder / "model.safetensors" for folder in ("apart", "together"))
    assert apart.read_bytes() == together.read_bytes()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert (tmp_path / "plain.pt").stat().st_size < 1.3 * apart.stat().st_size
    loaded = DreamModel.from_pretrained(tmp_path / "together")
    read = (
        loaded.state_dict(),
        load_file(tmp_path / "plain.safetensors"),
        torch.load(tmp_path / "plain.pt", weights_only=True),
    )
    for state in read:
        assert all(torch.equal(state[n], t) for n, t in before.items())
    loaded.model.fuse_weights_()
    loaded.load_state_dict(before)
    assert all(lie_together(loaded, Q_K_V))


def test_only_plain_layers_of_one_kind_are_moved(model, ids):
    add_lora(model, LoraParams(rank=2, targets=["q_proj", "v_proj"]), generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0]
    layer.mlp.up_proj.weight.requires_grad = True  # beside a frozen one
    seen = []
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    before = [p.data_ptr() for p in model.parameters()]
    model.model.fuse_weights_()
    assert [p.data_ptr() for p in model.parameters()] == before
    with torch.no_grad(), model.model.joined(FEW):
        model.model(ids)
    assert seen
    layer.mlp.up_proj.weight.requires_grad = False
    model.model.fuse_weights_()
    assert lie_together(model, GATE_UP) == [True, False]


class OtherMLP(DreamMLP):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("owner", ["self_attn", "mlp"])
def test_what_others_made_of_attention_and_mlp_is_kept(model, ids, owner):
    first, second = model.model.layers
    getattr(first, owner).register_forward_hook(lambda _module, _inputs, output: 2 * output)
    second.mlp.__class__ = OtherMLP
    expected = model.model(ids)
    model.model.fuse_weights_()
    with model.model.joined(FEW):
        assert torch.equal(model.model(ids), expected)


@torch.no_grad()
def test_compiled_layers_share_one_compilation(model, ids):
    frames = CompileCounter()
    model.model.fuse_weights_()
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend=frames)
    try:
        for _ in range(2):
            with model.model.joined(FEW):
                model.model(ids)
        assert frames.frame_count == 1
    finally:
        torch._dynamo.reset()


def test_weights_that_would_begin_between_multiples_of_16_bytes_stay():
    """Compiled code for a GPU would read beside them."""
    groups = {owner: SimpleNamespace(**{n: nn.Linear(3, 5) for n in names}) for owner, names in (Q_K_V, GATE_UP)}
    weights = [p for group in groups.values() for linear in vars(group).values() for p in linear.parameters()]
    before = [p.data_ptr() for p in weights]
    fuse_weights_(SimpleNamespace(layers=[SimpleNamespace(**groups)]))
    assert [p.data_ptr() for p in weights] == before


def test_moved_weights_are_laid_together_again(model, ids):
    params = SamplingParams(max_new_tokens=8, steps=8, forbid_mask=True)
    expected = diffusion_generate(model, ids, params=params).sequences
    fast = CompiledDenoiser(model, capture=False)
    model.double().float()
    assert not any(lie_together(model, Q_K_V))
    assert torch.equal(diffusion_generate(fast, ids, params=params).sequences, expected)
    assert all(lie_together(model, Q_K_V)) and all(lie_together(model, GATE_UP))


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_sums_made_in_products(model, ids, compiled):
    last, half = model.model(ids), model.model(ids, span=(4, 9))
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    try:
        with model.model.joined(FEW):
            for _ in range(2):  # what is added to must not be what the next forward begins with
                torch.testing.assert_close(model.model(ids), last, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(model.model(ids, span=(4, 9)), half, rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                ours = model.model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours, model.model(ids))
    finally:
        torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_gate_and_up_of_many_tokens_are_one_kernel(model, ids, monkeypatch, compiled):
    """Played by plain products; where types differ, and where there are few tokens, it is not asked."""
    calls = []

    def kernel(x, gate, up):
        calls.append(len(x))
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    monkeypatch.setitem(sys.modules, "dream_lightning.kernels.swiglu", SimpleNamespace(swiglu=kernel))
    monkeypatch.delattr("dream_lightning.kernels.swiglu", raising=False)
    monkeypatch.setattr(joint, "_has_kernel", lambda mlp: True)
    expected = model.model(ids)
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=False)
    try:
        for tokens, number in ((FEW, 0), (MANY - 1, 0), (MANY, 2)):
            calls.clear()
            with model.model.joined(tokens):
                torch.testing.assert_close(model.model(ids), expected, rtol=1e-5, atol=1e-5)
            assert calls == number * [ids.numel()]
        with torch.autocast("cpu", torch.bfloat16):
            plain = model.model(ids)
            with model.model.joined(MANY):
                assert torch.equal(model.model(ids), plain)
        assert len(calls) == 2
    finally:
        torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_makes_gate_and_up_on_hopper(model, ids, monkeypatch):
    hopper, kernel, calls = torch.cuda.get_device_capability() == (9, 0), joint._swiglu, []
    monkeypatch.setattr(joint, "_swiglu", lambda *tensors: (calls.append(len(tensors[0])), kernel(*tensors))[1])
    model.to("cuda", torch.bfloat16)
    expected = model.model(ids.cuda())
    with model.model.joined(MANY):
        torch.testing.assert_close(model.model(ids.cuda()), expected, rtol=0.02, atol=0.02)
    assert calls == (2 * [ids.numel()] if hopper else [])
    model.float()
    with model.model.joined(MANY):
        model.model(ids.cuda())
    assert len(calls) == (2 if hopper else 0)
