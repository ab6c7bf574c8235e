"""Attention inside the documents of packed rows, on a GPU.

Flash attention 2 takes all documents in one call. cuDNN's attention, which torch prefers on Hopper and Blackwell, needs
60 % of its time, but torch lets it plan anew at every call over several documents. So it is called once a document, and
plans for all lengths up to the next power of two, if `enable_dynamic_cudnn_plans` came early enough.
"""

import inspect
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dream_lightning.batch import DocumentBounds, send

_PREFERS_CUDNN = ((9, 0), (10, 0))  # compute capabilities on which torch prefers cuDNN's attention
_LONG = 1536  # tokens of a call on average, from which on several of cuDNN's are faster than one of flash attention

_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does it unasked

_aten = torch.ops.aten


def enable_dynamic_cudnn_plans() -> None:
    """Let cuDNN's attention take one plan for many lengths, in this whole process; before its first attention.

    Otherwise each new length costs a plan, for which the process waits until the GPU has nothing left to do, and then
    the GPU 50 ms for the process. Where all rows have one length, a plan for it alone is better, by 10 % of attention's
    time: TORCH_CUDNN_SDPA_AVOID_RECOMPILE=0 in the environment keeps torch's own way, which other compiled models that
    train in this process need (see `train_without_cudnn`).
    """
    os.environ.setdefault("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")


def prefers_cudnn(device: torch.device | None = None) -> bool:
    """Whether torch's own attention is cuDNN's on this GPU."""
    return torch.cuda.get_device_capability(device) in _PREFERS_CUDNN and torch.backends.cuda.cudnn_sdp_enabled()


def train_without_cudnn(device: torch.device) -> None:
    """Take cuDNN out of torch's own attention, in this whole process, where it plans for all lengths.

    Its softmax sums then lie position by position. torch's compiler (2.11) expects them head by head and would end the
    training with an AssertionError. Attention inside documents does not go through the compiler.
    """
    if prefers_cudnn(device) and _has_dynamic_cudnn_plans(device):
        torch.backends.cuda.enable_cudnn_sdp(False)


def for_kernel(
    mask: Tensor | DocumentBounds | None, input_ids: Tensor, *, training: bool
) -> Tensor | DocumentBounds | None:
    """What a layer needs of a mask: documents stay on the host for cuDNN, and go to the GPU for flash attention.

    In training, where cuDNN plans for all lengths, rows without a mask are taken for documents too, so that rows of one
    document and rows of several share one compiled graph.
    """
    device = input_ids.device
    if not (torch.cuda.get_device_capability(device) in _PREFERS_CUDNN and _has_dynamic_cudnn_plans(device)):
        return DocumentBounds(send(mask.starts, device)) if isinstance(mask, DocumentBounds) else mask
    if mask is None and training:
        rows, length = input_ids.shape
        mask = DocumentBounds(torch.arange(rows + 1, dtype=torch.int32) * length)
    if not isinstance(mask, DocumentBounds) or _one_by_one(mask.starts):
        return mask
    return DocumentBounds(send(mask.starts, device))


def _one_by_one(starts: Tensor) -> bool:
    """Whether to call cuDNN; a document of one token, such as a row's padding may be, torch does not hand to it."""
    if not starts.is_cpu:
        return False
    parts = list(_parts(starts))
    return int(starts[-1]) >= _LONG * len(parts) and min(part.length for part in parts) > 1


def attend_in_documents(q: Tensor, k: Tensor, v: Tensor, documents: DocumentBounds) -> Tensor:
    """Attention that stays inside each document, in time that grows with the documents' lengths, not the rows'.

    Shapes [B, H or K, L, E]; on CUDA in bfloat16 or float16, `documents` as `for_kernel` made it.
    """
    batch, _, length, _ = q.shape
    # Laid end to end [B·L, H or K, E]. Under autocast the rotation makes q and k float32, which no kernel has.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(v.dtype).contiguous() for x in (q, k, v))
    if documents.starts.is_cpu:
        out, _ = _attention(q, k, v, documents.starts)  # [B·L, H, E]
    else:
        options = {"enable_gqa": True} if _ASKS_FOR_GQA else {}
        out = varlen_attn(q, k, v, documents.starts, documents.starts, length, length, **options)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


@torch.library.custom_op("dream_lightning::attention_one_by_one", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """By cuDNN: the result [T, H, E], and the logarithm of the sum of each softmax, [T·H] float32."""
    outs, sums = [], []
    for part in _parts(starts):
        out, log_sum, *_ = _aten._scaled_dot_product_cudnn_attention(*(part.of(x) for x in (q, k, v)), None, True)
        if not _by_position(log_sum):
            raise RuntimeError("the sums of cuDNN's attention are laid out in another way than this code reads them")
        outs.append(part.end_to_end(out))
        sums.append(log_sum.transpose(1, 2).flatten())
    return _whole(outs), _whole(sums)


@torch.library.custom_op("dream_lightning::attention_one_by_one_backward", mutates_args=())
def _gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the generator of dropout
    log_sum = log_sum.view(*q.shape[:2], 1)
    parts = []
    for part in _parts(starts):
        at = [part.of(x) for x in (gradient, q, k, v, out, log_sum)]
        at += [unused, unused, None, None, None, part.length, part.length, 0.0, False]
        parts.append([part.end_to_end(x) for x in _aten._scaled_dot_product_cudnn_attention_backward(*at)])
    return tuple(_whole(list(of_one)) for of_one in zip(*parts, strict=True))


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0] * q.shape[1], dtype=torch.float32)


@_gradients.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _backward(ctx, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_gradients(gradient.contiguous(), *ctx.saved_tensors), None)


_attention.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class _Part:
    """Documents of one length that lie next to each other."""

    start: int
    count: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """Of [T, H, E] the part's documents, [documents, H, L, E]."""
        documents = x[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))
        return documents.transpose(1, 2)

    def end_to_end(self, x: Tensor) -> Tensor:
        """[documents, H, L, E] → [documents · L, H, E]; what cuDNN makes lies so already."""
        return x.transpose(1, 2).flatten(0, 1).contiguous()


def _parts(starts: Tensor) -> Iterator[_Part]:
    start = 0
    for length, same in groupby(length for length in starts.diff().tolist() if length):
        part = _Part(start, len(list(same)), length)
        yield part
        start += part.count * length


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@cache
def _has_dynamic_cudnn_plans(device: torch.device) -> bool:
    """Whether torch listened to `enable_dynamic_cudnn_plans`: its sums are then laid out by position."""
    x = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16, device=device).transpose(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is experimental; our tests compare it
        log_sum = torch._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1]
    return _by_position(log_sum)


def _by_position(log_sum: Tensor) -> bool:
    return log_sum.transpose(1, 2).is_contiguous()
