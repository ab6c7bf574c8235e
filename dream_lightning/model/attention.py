"""Attention over what a mask allows: full, masked by a boolean tensor, or any class with the same method `attend`.

K = key/value heads, E = size of a head, W = query positions (all L, or those of a span or of a cache's columns).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_lightning.batch import DocumentBounds
from dream_lightning.errors import UserError

Span = tuple[int, int]  # columns first … last − 1

CUDNN_CAPABILITIES = ((9, 0), (10, 0))  # GPUs on which torch's own attention is cuDNN's (Hopper and Blackwell)


class Attention(Protocol):
    """What the layers of one forward share; None is full attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span | None = None) -> Tensor:
        """Rotated q [B, H, L, E], k and v [B, K, L, E] → [B, H, W, E], at the columns of the span."""


def within(span: Span | None) -> slice:
    return slice(None) if span is None else slice(*span)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, enable_gqa=q.shape[1] != k.shape[1])


def prefers_cudnn(device: torch.device | None = None) -> bool:
    capable = torch.cuda.get_device_capability(device) in CUDNN_CAPABILITIES
    return capable and torch.backends.cuda.cudnn_sdp_enabled()


def in_half_precision(x: Tensor) -> bool:
    """Whether layers compute attention over x in bfloat16 or float16."""
    return torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize == 2


class MaskedAttention:
    """Attention under a boolean mask.

    A position that may attend to nothing (left padding) gets zeros, as in the authors' code; SDPA alone returns NaN.
    With a mask only cuDNN's kernel takes fewer key/value heads than heads, and only in half precision; elsewhere torch
    would materialize all L² weights, so `repeat_kv` repeats keys and values for every head.

    Args:
        attention_mask: bool or int [B, L], nonzero = a real token; or bool [B, 1, L, L], True = may attend.
        x: [B, W, D], the embedded tokens.
        columns: [W] int64, the mask's columns that x holds; None = all L.
    """

    def __init__(self, attention_mask: Tensor, x: Tensor, columns: Tensor | None = None) -> None:
        rows, length, _ = x.shape
        allowed = attention_mask.bool()
        self.repeat_kv = x.is_cuda and not (in_half_precision(x) and prefers_cudnn(x.device))
        if columns is not None or allowed.shape == (rows, length):
            self.may_attend = allowed[:, None, None, :]  # [B, 1, 1, L]
            is_real = allowed if columns is None else allowed[:, columns]
            self.has_visible_key = is_real[:, None, :, None]  # [B, 1, W, 1]
        elif allowed.shape == (rows, 1, length, length) and attention_mask.dtype == torch.bool:
            self.has_visible_key = allowed.any(-1, keepdim=True)  # [B, 1, L, 1]
            self.may_attend = allowed | ~self.has_visible_key  # [B, 1, L, L]
        else:
            raise UserError(
                f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)} for input_ids "
                f"{[rows, length]}, wanted None, bool or int [B, L], or bool [B, 1, L, L]"
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span | None = None) -> Tensor:
        if self.repeat_kv:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = scaled_dot_product(q[:, :, within(span)], k, v, self.may_attend)
        return out * self.has_visible_key[:, :, within(span)]


class CausalAttention:
    """Attention of every position to itself and those before it, without padding."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span | None = None) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out[:, :, within(span)]


def make_attention(
    attention_mask: Tensor | DocumentBounds | None,
    x: Tensor,
    columns: Tensor | None = None,
    *,
    training: bool = False,
    causal: bool = False,
) -> Attention | None:
    """The attention of one forward in torch's own operations; packed documents by a dense block-diagonal mask.

    `causal` keeps of what the mask allows the positions up to the query's own; it has no KV cache.

    `kernels.packed_attention` replaces `DreamBaseModel.make_attention` with such a function, which uses `training`.
    """
    if isinstance(attention_mask, DocumentBounds):
        attention_mask = attention_mask.to_mask(*x.shape[:2], x.device)
    if causal:
        if columns is not None:
            raise UserError("a causal model has no KV cache: set cache to none")
        if attention_mask is None:
            return CausalAttention()
        rows, length, _ = x.shape
        if attention_mask.shape == (rows, length):
            attention_mask = attention_mask.bool()[:, None, None].expand(rows, 1, length, length)
        if attention_mask.shape == (rows, 1, length, length):
            attention_mask = attention_mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    return None if attention_mask is None else MaskedAttention(attention_mask, x, columns)
