"""Attention inside documents: custom operations over cuDNN's kernel, here emulated by plain products, and on a GPU."""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from meeting import Program
from tiny_models import tiny_model

from dream_lightning.batch import DocumentBounds
from dream_lightning.kernels import packed_attention
from dream_lightning.kernels.packed_attention import PackedAttention, make_packed_attention
from dream_lightning.model.attention import MaskedAttention, prefers_cudnn
from dream_lightning.model_factory import checkpoint_layers, compile_layers

pytestmark = pytest.mark.usefixtures("fresh_compiler")
packed_attention.enable_dynamic_cudnn_plans()  # at collection: before any attention on a GPU

HEADS, KV_HEADS, SIZE = 4, 2, 8
HOPPER, AMPERE = (9, 0), (8, 0)


def every_head(x, heads):
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def scores(q, k):
    return q @ every_head(k, q.shape[1]).transpose(2, 3) / q.shape[-1] ** 0.5


def forward(q, k, v, bias, returns_log_sum):
    assert bias is None and returns_log_sum
    log_sum = scores(q, k).logsumexp(-1, keepdim=True).transpose(1, 2).contiguous().transpose(1, 2)
    return scores(q, k).softmax(-1) @ every_head(v, q.shape[1]), log_sum, None


def backward(grad, q, k, v, out, log_sum, *_):
    """Computed from what the forward pass saved, so that a mix-up shows."""
    p = (scores(q, k) - log_sum).exp()
    grad_scores = p * (grad @ every_head(v, q.shape[1]).transpose(2, 3) - (grad * out).sum(-1, keepdim=True))
    grad_scores = grad_scores / q.shape[-1] ** 0.5

    def by_group(x):
        return x.unflatten(1, (k.shape[1], -1)).sum(2)

    grad_q = grad_scores @ every_head(k, q.shape[1])
    return grad_q, by_group(grad_scores.transpose(2, 3) @ q), by_group(p.transpose(2, 3) @ grad)


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's two operations as plain products."""
    operations = SimpleNamespace(
        _scaled_dot_product_cudnn_attention=forward, _scaled_dot_product_cudnn_attention_backward=backward
    )
    monkeypatch.setattr(packed_attention, "_aten", operations)
    return operations


def inputs(rows, length, *, size=SIZE, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, n, length, size) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def bounds(starts):
    return DocumentBounds(torch.tensor(starts, dtype=torch.int32))


def packed(q, k, v, documents):
    return PackedAttention(documents.starts).attend(q, k, v)


def masked(q, k, v, documents):
    mask = documents.to_mask(len(q), q.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def with_gradients(attend, tensors, documents):
    out = attend(*tensors, documents)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, tensors, grad)


STARTS = [
    [0, 12, 12],  # one document
    [0, 7, 12, 12],  # the last repeats
    [0, 12, 24],  # whole rows, one call
    [0, 4, 8, 12, 15, 24, 24, 24],  # three of one length, a short one, a row
    [0, 3, 12, 15, 24],
]


@pytest.mark.parametrize("starts", STARTS)
def test_packed_attention_equals_a_mask_with_gradients(cudnn, starts):
    tensors = inputs(starts[-1] // 12, 12)
    expected = with_gradients(masked, tensors, bounds(starts))
    for a, b in zip(with_gradients(packed, tensors, bounds(starts)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adjacent_documents_of_one_length_share_a_call(cudnn):
    shapes = []
    cudnn._scaled_dot_product_cudnn_attention = lambda *x: (shapes.append(x[0].shape), forward(*x))[1]
    with torch.no_grad():
        packed(*inputs(2, 12), bounds(STARTS[3]))
    assert shapes == [(3, HEADS, 4, SIZE), (1, HEADS, 3, SIZE), (1, HEADS, 9, SIZE)]


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_share_one_graph_for_all_documents(cudnn, recomputed):
    model, counter = tiny_model(3).train(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def gradients(ids, mask):
        model.zero_grad()
        model(ids, mask).logits.logsumexp(-1).mean().backward()
        return [p.grad for p in model.parameters()]

    batches = [torch.randint(0, 50, (1, length)) for length in (12, 30, 17)]
    masks = [bounds(starts) for starts in ([0, 7, 12, 12], [0, 11, 20, 25, 30], [0, 17])]
    expected = [gradients(ids, mask) for ids, mask in zip(batches, masks, strict=True)]
    model.model.make_attention = lambda mask, x, columns, training: PackedAttention(mask.starts)
    compile_layers(model, backend=counter)
    if recomputed:
        checkpoint_layers(model, 2)
    for ids, mask, grads in zip(batches, masks, expected, strict=True):
        for ours, grad in zip(gradients(ids, mask), grads, strict=True):
            torch.testing.assert_close(ours, grad, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("starts", STARTS)
def test_custom_operations_tell_the_compiler_their_layouts(cudnn, starts):
    q, k, v = (x.detach().transpose(1, 2).flatten(0, 1).contiguous() for x in inputs(starts[-1] // 12, 12))
    starts = torch.tensor(starts, dtype=torch.int32)
    out, log_sum = packed_attention._cudnn_attention(q, k, v, starts)
    torch.library.opcheck(packed_attention._cudnn_attention, (q, k, v, starts))
    backward_inputs = (torch.ones_like(out), q, k, v, out, log_sum, starts)
    torch.library.opcheck(packed_attention._cudnn_attention_backward, backward_inputs)


def test_another_layout_of_softmax_sums_is_refused(cudnn):
    def by_head(*arguments):
        out, log_sum, seed = forward(*arguments)
        return out, log_sum.contiguous(), seed

    cudnn._scaled_dot_product_cudnn_attention = by_head
    with pytest.raises(RuntimeError, match="another layout"):
        packed(*inputs(1, 12), bounds([0, 7, 12]))


class FakeCUDA:
    """The few attributes of an embedded batch [B, L, D] that decide how attention is computed."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, shape, dtype=torch.bfloat16):
        self.shape, self.dtype = (*shape, 8), dtype


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(capability, dynamic_plans=…)` emulates one; what is sent there goes to the meta device."""

    def emulate(capability, *, dynamic_plans):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(packed_attention, "_has_dynamic_cudnn_plans", lambda device: dynamic_plans)
        monkeypatch.setattr(packed_attention, "send", lambda x, device: x.to("meta"))

    yield emulate
    torch.backends.cuda.enable_cudnn_sdp(True)


LONG, SHORT = [0, 2000, 4096], [0, 900, 2000, 3100, 4096]


@pytest.mark.parametrize(
    ("starts", "shape", "dynamic_plans", "training", "kernel"),
    [
        (LONG, (1, 4096), True, True, "cudnn"),
        (LONG, (1, 4096), True, False, "cudnn"),
        (LONG, (1, 4096), False, True, "flash"),  # another GPU, or attention came before `enable_dynamic_cudnn_plans`
        (SHORT, (1, 4096), True, True, "flash"),
        ([0, 1000, 2000, 3000, 4096], (1, 4096), True, True, "cudnn"),  # three in one call
        ([0, 4095, 4096], (1, 4096), True, True, "flash"),  # one token of padding
        ([0, 4094, 4096], (1, 4096), True, True, "cudnn"),
        (None, (1, 4096), True, True, "cudnn"),
        (None, (256, 94), True, True, "cudnn"),
        (None, (2, 94), True, True, "flash"),  # documents even so: torch's compiler fails on cuDNN's own
        (None, (4096, 1), True, True, "flash"),
        (None, (1, 4096), False, True, None),
        (None, (1, 4096), True, False, None),  # answers
    ],
)
def test_which_kernel_computes_documents(gpu, starts, shape, dynamic_plans, training, kernel):
    gpu(HOPPER, dynamic_plans=dynamic_plans)
    mask = None if starts is None else bounds(starts)
    attention = make_packed_attention(mask, FakeCUDA(shape), training=training, head_dim=128)
    assert kernel == (attention and {"cpu": "cudnn", "meta": "flash"}[attention.starts.device.type])
    if kernel == "cudnn":
        assert attention.starts.tolist() == (starts or list(range(0, shape[0] * shape[1] + 1, shape[1])))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 128), (torch.bfloat16, 12), (torch.bfloat16, 256)])
def test_what_the_kernels_cannot_compute_becomes_a_mask(gpu, monkeypatch, dtype, head_dim):
    gpu(HOPPER, dynamic_plans=True)
    monkeypatch.setattr(DocumentBounds, "to_mask", lambda self, rows, length, device: torch.ones(rows, 1, 9, 9) > 0)
    x = FakeCUDA((1, 9), dtype)
    assert isinstance(make_packed_attention(bounds([0, 9]), x, head_dim=head_dim), MaskedAttention)
    assert make_packed_attention(None, x, training=True, head_dim=head_dim) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "dynamic_plans", "training", "cudnn", "repeats"),
    [
        (HOPPER, torch.bfloat16, True, False, True, False),
        (HOPPER, torch.bfloat16, True, True, False, True),  # where torch's compiler would fail
        (HOPPER, torch.bfloat16, False, True, True, False),
        (HOPPER, torch.float32, False, False, True, True),
        (AMPERE, torch.bfloat16, False, False, False, True),
    ],
)
def test_a_mask_uses_cudnn_or_repeats_keys(gpu, capability, dtype, dynamic_plans, training, cudnn, repeats):
    gpu(capability, dynamic_plans=dynamic_plans)
    mask = torch.ones(1, 4, dtype=torch.bool)
    attention = make_packed_attention(mask, FakeCUDA((1, 4), dtype), training=training, head_dim=128)
    assert isinstance(attention, MaskedAttention) and attention.repeat_kv == repeats
    assert prefers_cudnn(torch.device("cuda")) == cudnn


def test_only_an_unset_environment_is_changed_and_not_by_importing():
    Program(import_and_enable).end()


def import_and_enable():
    name = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
    for before, after in ((None, "1"), ("0", "0")):
        os.environ.pop(name, None)
        os.environ |= {name: before} if before else {}
        again = importlib.reload(packed_attention)
        assert os.environ.get(name) == before
        again.enable_dynamic_cudnn_plans()
        assert os.environ[name] == after


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[4096], [3001, 1095], [1700, 1700, 1600], [6000, 3, 2189]])
def test_cudnn_and_flash_equal_a_mask_on_a_gpu(lengths):
    if not packed_attention._has_dynamic_cudnn_plans(torch.device("cuda")):
        pytest.skip("needs a GPU where cuDNN has dynamic plans")
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    documents = bounds([*starts, starts[-1]])
    tensors = inputs(1, starts[-1], size=64, device="cuda", dtype=torch.bfloat16)
    assert packed_attention._suits_cudnn(documents.starts)
    flash = DocumentBounds(documents.starts.cuda())
    exact = with_gradients(masked, [x.detach().float().requires_grad_() for x in tensors], documents)
    for attend in (packed, torch.compile(packed)):
        ours = with_gradients(attend, tensors, documents)
        for a, b, c in zip(ours, with_gradients(attend, tensors, flash), exact, strict=True):
            error, of_flash = ((x.float() - c).norm() / c.norm() for x in (a, b))
            assert error < 1.1 * of_flash + 1e-5, (error, of_flash)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mask", "shape"), [("none", (2, 94)), ("none", (32, 94)), ("left padding", (32, 94)), ("documents", (32, 94))]
)
def test_compiled_layers_train_on_a_gpu(mask, shape):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(2, **sizes, initializer_range=0.1).cuda().train()
    packed_attention.install(model)
    ids = torch.randint(0, 57, shape, device="cuda")
    masks = {
        "none": None,
        "left padding": torch.arange(shape[1], device="cuda").expand(shape) >= 5,
        "documents": DocumentBounds(torch.arange(shape[0] * 2 + 1, dtype=torch.int32) * (shape[1] // 2)),
    }

    def gradients(dtype):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            model(ids, masks[mask]).logits.float().logsumexp(-1).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradients(torch.float32)
    compile_layers(model)
    try:
        ours = gradients(torch.bfloat16)
        assert (ours - exact).norm() < 0.05 * exact.norm()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
