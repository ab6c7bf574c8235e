"""Attention inside the documents of packed rows, on a GPU.

Flash attention 2 takes all documents in one call. cuDNN's attention, which torch prefers on Hopper and Blackwell, needs
60 % of its time, but over several documents torch has it make a new plan at every call. So it is called once for each
run of documents of one length, with plans for all lengths up to the next power of two (`enable_dynamic_cudnn_plans`).
"""

import inspect
import os
import warnings
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dream_lightning.batch import DocumentBounds, send
from dream_lightning.model import DreamModel
from dream_lightning.model.attention import CUDNN_CAPABILITIES, Attention, Span, in_half_precision, make_attention

_LONG = 1536  # average tokens of a call from which several calls of cuDNN are faster than one of flash attention
_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.11 has none

_aten = torch.ops.aten


def enable_dynamic_cudnn_plans() -> None:
    """Let cuDNN's attention use one plan for many lengths, in the whole process; call before its first attention.

    Otherwise each new length needs a plan, which synchronizes with the GPU and takes 50 ms. Where all rows have one
    length, a plan for it alone makes attention 10 % faster: TORCH_CUDNN_SDPA_AVOID_RECOMPILE=0 in the environment keeps
    torch's default. Other compiled models that train in this process need that, too.
    """
    os.environ.setdefault("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")


def refuse_dynamic_cudnn_plans() -> None:
    """Where they are enabled already, give up cuDNN: torch's compiler cannot use them (see below)."""
    if _has_dynamic_cudnn_plans(torch.device("cuda", torch.cuda.current_device())):
        torch.backends.cuda.enable_cudnn_sdp(False)


def install(model: DreamModel) -> None:
    model.model.make_attention = partial(make_packed_attention, head_dim=model.config.head_dim)


def make_packed_attention(
    attention_mask: Tensor | DocumentBounds | None,
    x: Tensor,
    columns: Tensor | None = None,
    *,
    training: bool = False,
    causal: bool = False,
    head_dim: int,
) -> Attention | None:
    """As `model.attention.make_attention`, with these kernels for documents where they can compute them.

    In training with dynamic plans, rows without a mask are documents too, so that rows of one document and rows of
    several share one compiled graph. For causal attention there are no such kernels.
    """
    if not x.is_cuda or causal or torch.compiler.is_compiling():  # a step compiled for rows of one length
        return make_attention(attention_mask, x, columns, causal=causal)
    dynamic = _has_dynamic_cudnn_plans(x.device)
    if in_half_precision(x) and head_dim % 8 == 0 and head_dim <= 128:  # what the kernels can do
        if attention_mask is None and training and dynamic:
            rows, length, _ = x.shape
            attention_mask = DocumentBounds(torch.arange(rows + 1, dtype=torch.int32) * length)
        if isinstance(attention_mask, DocumentBounds):
            starts = attention_mask.starts
            return PackedAttention(starts if dynamic and _suits_cudnn(starts) else send(starts, x.device))
    if training and dynamic:
        # In the whole process: torch's compiler (2.11) expects the softmax sums of its own attention head by head and
        # would raise an AssertionError. It does not look into the custom operation below.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return make_attention(attention_mask, x, columns)


@dataclass
class PackedAttention:
    """Attention that stays inside each document, in time that grows with the documents' lengths, not the rows'."""

    starts: Tensor  # [C+1] int32, see DocumentBounds; on the host for cuDNN, on the GPU for flash attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span | None = None) -> Tensor:
        """[B, H or K, L, E] → [B, H, L, E], on CUDA in bfloat16 or float16."""
        assert span is None, "packed rows have no span"
        rows, _, length, _ = q.shape
        # Rows end to end [B·L, H or K, E]. Under autocast the rotation makes q and k float32, which no kernel takes.
        q, k, v = (x.transpose(1, 2).flatten(0, 1).to(v.dtype).contiguous() for x in (q, k, v))
        if self.starts.is_cpu:
            out, _ = _cudnn_attention(q, k, v, self.starts)  # [B·L, H, E]
        else:
            out = varlen_attn(q, k, v, self.starts, self.starts, length, length, **_GQA)
        return out.unflatten(0, (rows, length)).transpose(1, 2)


@cache
def _has_dynamic_cudnn_plans(device: torch.device) -> bool:
    """Whether cuDNN has them on this GPU; it then lays out softmax sums by position."""
    if torch.cuda.get_device_capability(device) not in CUDNN_CAPABILITIES:
        return False
    x = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16, device=device).transpose(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        log_sum = torch._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1]
    return log_sum.transpose(1, 2).is_contiguous()


def _suits_cudnn(starts: Tensor) -> bool:
    """Whether calls are few; torch does not give a document of one token (a row's padding may be one) to cuDNN."""
    runs = _runs(starts)
    return int(starts[-1]) >= _LONG * len(runs) and min(length for _, length in runs) > 1


def _runs(starts: Tensor) -> list[tuple[slice, int]]:
    """The tokens of adjacent documents of one length, and that length."""
    runs, first = [], 0
    for length, same in groupby(filter(None, starts.diff().tolist())):
        last = first + length * len(list(same))
        runs.append((slice(first, last), length))
        first = last
    return runs


def _documents(x: Tensor, run: tuple[slice, int]) -> Tensor:
    """Of [T, H, E] those of one run, [documents, H, length, E]."""
    tokens, length = run
    return x[tokens].unflatten(0, (-1, length)).transpose(1, 2)


def _end_to_end(parts: list[Tensor]) -> Tensor:
    """[documents, H, length, E] of every run → [T, H, E]; cuDNN's results have this layout already."""
    parts = [part.transpose(1, 2).flatten(0, 1).contiguous() for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.library.custom_op("dream_lightning::cudnn_attention", mutates_args=())
def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Output [T, H, E], and the logarithm of each softmax's sum [T, H, 1] float32."""
    outs, log_sums = [], []
    for run in _runs(starts):
        inputs = (_documents(x, run) for x in (q, k, v))
        out, log_sum, *_ = _aten._scaled_dot_product_cudnn_attention(*inputs, None, True)
        if not log_sum.transpose(1, 2).is_contiguous():
            raise RuntimeError("cuDNN's softmax sums have another layout than this code expects")
        outs.append(out)
        log_sums.append(log_sum)
    return _end_to_end(outs), _end_to_end(log_sums)


@torch.library.custom_op("dream_lightning::cudnn_attention_backward", mutates_args=())
def _cudnn_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, unused
    grads = []
    for run in _runs(starts):
        inputs = (_documents(x, run) for x in (grad, q, k, v, out, log_sum))
        options = (seed, seed, None, None, None, run[1], run[1], 0.0, False)
        grads.append(_aten._scaled_dot_product_cudnn_attention_backward(*inputs, *options))
    grad_q, grad_k, grad_v = (_end_to_end(list(parts)) for parts in zip(*grads, strict=True))
    return grad_q, grad_k, grad_v


_cudnn_attention.register_fake(
    lambda q, k, v, starts: (torch.empty_like(q), q.new_empty((*q.shape[:2], 1), dtype=torch.float32))
)
_cudnn_attention_backward.register_fake(lambda grad, q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))))


def _setup_context(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *q_k_v, starts = inputs
    ctx.save_for_backward(*q_k_v, *output, starts)


def _backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_cudnn_attention_backward(grad.contiguous(), *ctx.saved_tensors), None)


_cudnn_attention.register_autograd(_backward, setup_context=_setup_context)
