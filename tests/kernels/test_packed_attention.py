"""Attention inside documents: one call of cuDNN's kernel a document, here played by plain products, and on a GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dream_lightning.batch import DocumentBounds
from dream_lightning.kernels import packed_attention as documents
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.modeling import AttentionMask
from dream_lightning.model_factory import compile_layers

documents.enable_dynamic_cudnn_plans()  # when tests are collected: before any attention on a GPU

HEADS, GROUPS, SIZE = 4, 2, 8


def every_head(x, heads):
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def weights_of(q, k):
    return q @ every_head(k, q.shape[1]).transpose(2, 3) / q.shape[-1] ** 0.5


def forward(q, k, v, bias, wants_sums):
    assert bias is None and wants_sums
    weights = weights_of(q, k)
    sums = weights.logsumexp(-1, keepdim=True).transpose(1, 2).contiguous().transpose(1, 2)
    return weights.softmax(-1) @ every_head(v, q.shape[1]), sums, None


def backward(gradient, q, k, v, out, sums, *_):
    """From what the forward pass kept, so that a mix-up shows."""
    p = (weights_of(q, k) - sums).exp()
    of_weights = p * (gradient @ every_head(v, q.shape[1]).transpose(2, 3) - (gradient * out).sum(-1, keepdim=True))
    of_weights = of_weights / q.shape[-1] ** 0.5

    def by_group(x):
        return x.unflatten(1, (k.shape[1], -1)).sum(2)

    of_k, of_v = of_weights.transpose(2, 3) @ q, p.transpose(2, 3) @ gradient
    return of_weights @ every_head(k, q.shape[1]), by_group(of_k), by_group(of_v)


@pytest.fixture
def plain_products(monkeypatch):
    kernels = {
        "_scaled_dot_product_cudnn_attention": forward,
        "_scaled_dot_product_cudnn_attention_backward": backward,
    }
    monkeypatch.setattr(documents, "_aten", SimpleNamespace(**kernels))


def inputs(rows, length, *, size=SIZE, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, n, length, size) for n in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def with_gradients(attend, tensors, *arguments):
    out = attend(*tensors, *arguments)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, tensors, gradient)


def masked(q, k, v, bounds):
    mask = bounds.to_mask(len(q), q.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


STARTS = [
    [0, 12, 12],  # one document
    [0, 7, 12, 12],  # the last repeats
    [0, 12, 24],  # whole rows, one call
    [0, 4, 8, 12, 15, 24, 24, 24],  # three of one length, a short one, a row
    [0, 3, 12, 15, 24],
]


@pytest.mark.parametrize("starts", STARTS)
def test_one_call_a_document_equals_a_mask(plain_products, starts):
    bounds = DocumentBounds(torch.tensor(starts, dtype=torch.int32))
    tensors = inputs(starts[-1] // 12, 12)
    ours = with_gradients(documents.attend_in_documents, tensors, bounds)
    for a, b in zip(ours, with_gradients(masked, tensors, bounds), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_documents_of_one_length_share_a_call(plain_products, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        documents._aten, "_scaled_dot_product_cudnn_attention", lambda *x: (shapes.append(x[0].shape), forward(*x))[1]
    )
    bounds = DocumentBounds(torch.tensor(STARTS[3], dtype=torch.int32))
    with torch.no_grad():
        documents.attend_in_documents(*inputs(2, 12), bounds)
    assert shapes == [(3, HEADS, 4, SIZE), (1, HEADS, 3, SIZE), (1, HEADS, 9, SIZE)]


def test_compiled_once_for_all_documents(plain_products):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(documents.attend_in_documents, backend=counter)
    for length, starts in ((12, [0, 7, 12, 12]), (30, [0, 11, 20, 25, 30]), (17, [0, 17])):
        tensors, bounds = inputs(1, length), DocumentBounds(torch.tensor(starts, dtype=torch.int32))
        for x in tensors:
            torch._dynamo.maybe_mark_dynamic(x, 2)
        torch._dynamo.maybe_mark_dynamic(bounds.starts, 0)
        for a, b in zip(
            with_gradients(compiled, tensors, bounds), with_gradients(masked, tensors, bounds), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("starts", STARTS)
def test_the_compiler_is_told_how_results_lie(plain_products, starts):
    q, k, v = (x.detach().transpose(1, 2).flatten(0, 1).contiguous() for x in inputs(starts[-1] // 12, 12))
    starts = torch.tensor(starts, dtype=torch.int32)
    out, sums = documents._attention(q, k, v, starts)
    torch.library.opcheck(documents._attention, (q, k, v, starts))
    torch.library.opcheck(documents._gradients, (torch.ones_like(out), q, k, v, out, sums, starts))


def test_sums_laid_out_otherwise_are_refused(plain_products, monkeypatch):
    def otherwise(*arguments):
        out, sums, seed = forward(*arguments)
        return out, sums.contiguous(), seed

    monkeypatch.setattr(documents._aten, "_scaled_dot_product_cudnn_attention", otherwise)
    with pytest.raises(RuntimeError, match="laid out in another way"):
        documents.attend_in_documents(*inputs(1, 12), DocumentBounds(torch.tensor([0, 7, 12], dtype=torch.int32)))


LONG, SHORT = [0, 2000, 4096], [0, 900, 2000, 3100, 4096]
HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.fixture
def gpu(monkeypatch):
    """Plays one; where it is told to, cuDNN plans for all lengths."""

    def play(capability, *, all_lengths):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(documents, "_has_dynamic_cudnn_plans", lambda device: all_lengths)
        monkeypatch.setattr(documents, "send", lambda x, device: x.to("meta"))

    return play


@pytest.mark.parametrize(
    ("starts", "shape", "capability", "all_lengths", "training", "kernel"),
    [
        (LONG, (1, 4096), HOPPER, True, True, "cudnn"),
        (LONG, (1, 4096), HOPPER, True, False, "cudnn"),
        (LONG, (1, 4096), HOPPER, False, True, "flash"),  # another library attended before `enable_dynamic_cudnn_plans`
        (LONG, (1, 4096), AMPERE, True, True, "flash"),
        (SHORT, (1, 4096), HOPPER, True, True, "flash"),
        ([0, 1000, 2000, 3000, 4096], (1, 4096), HOPPER, True, True, "cudnn"),  # three in one call
        ([0, 4095, 4096], (1, 4096), HOPPER, True, True, "flash"),  # one token of padding
        ([0, 4094, 4096], (1, 4096), HOPPER, True, True, "cudnn"),
        (None, (1, 4096), HOPPER, True, True, "cudnn"),
        (None, (256, 94), HOPPER, True, True, "cudnn"),
        (None, (2, 94), HOPPER, True, True, "flash"),  # never without documents: the compiler would stumble
        (None, (4096, 1), HOPPER, True, True, "flash"),
        (None, (1, 4096), HOPPER, False, True, None),
        (None, (1, 4096), HOPPER, True, False, None),  # answers are made without documents
        (None, (1, 4096), AMPERE, True, True, None),
    ],
)
def test_which_kernel(gpu, starts, shape, capability, all_lengths, training, kernel):
    gpu(capability, all_lengths=all_lengths)
    mask = None if starts is None else DocumentBounds(torch.tensor(starts, dtype=torch.int32))
    chosen = documents.for_kernel(mask, torch.zeros(shape, dtype=torch.long), training=training)
    assert kernel == (chosen and {"cpu": "cudnn", "meta": "flash"}[chosen.starts.device.type])
    if kernel == "cudnn":
        assert chosen.starts.tolist() == (starts or list(range(0, shape[0] * shape[1] + 1, shape[1])))


@pytest.mark.parametrize(
    ("capability", "all_lengths", "kept"), [(HOPPER, True, False), (HOPPER, False, True), (AMPERE, True, True)]
)
def test_what_the_compiler_would_stumble_over_is_left_out(gpu, capability, all_lengths, kept):
    gpu(capability, all_lengths=all_lengths)
    try:
        documents.train_without_cudnn(torch.device("cuda"))
        assert torch.backends.cuda.cudnn_sdp_enabled() == kept
        assert documents.prefers_cudnn(torch.device("cuda")) == (kept and capability == HOPPER)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(
    ("capability", "half", "wants"), [(HOPPER, True, False), (HOPPER, False, True), (AMPERE, True, True)]
)
def test_who_wants_keys_for_every_head(gpu, capability, half, wants):
    """Every kernel but cuDNN's, which has none for float32."""
    gpu(capability, all_lengths=True)
    ids = SimpleNamespace(shape=(1, 4), is_cuda=True, device=torch.device("cuda"))
    assert AttentionMask(torch.ones(1, 4, dtype=torch.bool), ids, half=half).repeat_kv == wants


def test_a_mask_stays_a_mask(gpu):
    gpu(HOPPER, all_lengths=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert documents.for_kernel(mask, torch.zeros(1, 4, dtype=torch.long), training=True) is mask


@pytest.mark.parametrize(("given", "wanted"), [(None, "1"), ("0", "0")])
def test_what_the_environment_says_stays(monkeypatch, given, wanted):
    name = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
    monkeypatch.delenv(name) if given is None else monkeypatch.setenv(name, given)
    documents.enable_dynamic_cudnn_plans()
    assert os.environ[name] == wanted


def test_importing_changes_no_environment():
    code = "import os; before = dict(os.environ); import dream_lightning.model; assert dict(os.environ) == before"
    name = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
    env = {k: v for k, v in os.environ.items() if k != name}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGPU:
    @pytest.mark.parametrize("lengths", [[4096], [3001, 1095], [1700, 1700, 1600], [6000, 3, 2189]])
    def test_equals_a_mask(self, lengths):
        if not documents.prefers_cudnn():
            pytest.skip("torch prefers flash attention on this GPU")
        if os.environ["TORCH_CUDNN_SDPA_AVOID_RECOMPILE"] != "1":
            pytest.skip("the environment wants a plan for each length")
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        bounds = DocumentBounds(torch.tensor([*starts, starts[-1]], dtype=torch.int32))
        total = sum(lengths)
        truth = inputs(1, total, size=64, device="cuda", dtype=torch.bfloat16)
        ids = torch.zeros(1, total, dtype=torch.long, device="cuda")
        assert documents.for_kernel(bounds, ids, training=True) is bounds
        flash = DocumentBounds(bounds.starts.cuda())
        exact = with_gradients(masked, [x.detach().float().requires_grad_() for x in truth], bounds)
        for attend in (documents.attend_in_documents, torch.compile(documents.attend_in_documents)):
            ours = with_gradients(attend, truth, bounds)
            for a, b, c in zip(ours, with_gradients(attend, truth, flash), exact, strict=True):
                error, of_flash = ((x.float() - c).norm() / c.norm() for x in (a, b))
                assert error < 1.1 * of_flash + 1e-5, (error, of_flash)
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("mask", "shape", "dropout"),
        [
            ("none", (2, 94), 0.0),
            ("none", (32, 94), 0.0),
            ("none", (32, 94), 0.1),
            ("left padding", (32, 94), 0.0),
            ("documents", (32, 94), 0.0),
        ],
    )
    def test_compiled_layers_train(self, mask, shape, dropout):
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
        tokens = {"vocab_size": 60, "mask_token_id": 57, "pad_token_id": 59, "bos_token_id": 58, "eos_token_id": 59}
        torch.manual_seed(0)
        config = DreamConfig(**sizes, **tokens, num_hidden_layers=2, initializer_range=0.1, attention_dropout=dropout)
        model = DreamModel(config).cuda().train()
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
            if dropout:
                assert ours.isfinite().all() and ours.norm() > 0
            else:
                assert (ours - exact).norm() < 0.05 * exact.norm()
        finally:
            torch._dynamo.reset()
            torch.backends.cuda.enable_cudnn_sdp(True)
