"""The loss weight of a masked token."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dream_lightning.errors import UserError, check_range

Weighting = Literal["original", "linear", "cart", "none"]


def token_weights(
    is_masked: Tensor,
    t: Tensor,
    *,
    weighting: Weighting = "original",
    cart_p: float = 0.1,
    context: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Loss weights [B, L] float32, meaningful at masked positions.

    | weighting  | weight at a masked position i                                                   |
    |------------|---------------------------------------------------------------------------------|
    | `original` | 1 / t: the ELBO                                                                 |
    | `linear`   | 1 − t                                                                           |
    | `cart`     | Σ over context positions j of ½·p·(1−p)^(|i−j|−1): closer context, larger weight |
    | `none`     | 1                                                                               |

    Args:
        is_masked: [B, L] bool.
        t: [B] or [B, L] float, the masking probability.
        cart_p: p of the geometric distribution. The authors train with 0.1; their function's default is 0.8.
        context: [B, L] bool, the context positions of CART; by default all that are not masked, padding included, as in
            the authors' code.
        document_ids: [B, L] int64, the document of each position, which alone is its context.

    Raises:
        UserError: an unknown weighting, or `cart_p` outside (0, 1].

    Source: Dream 7B (Ye et al. 2025), "context-adaptive token-level noise rescheduling", and the authors' trainer.
    """
    t = (t[:, None] if t.dim() == 1 else t).expand(is_masked.shape).float()
    match weighting:
        case "original":
            return 1 / t
        case "linear":
            return 1 - t
        case "cart":
            return cart_weights(~is_masked if context is None else context, p=cart_p, document_ids=document_ids)
        case "none":
            return torch.ones_like(t)
    raise UserError(f"weighting is {weighting!r}, wanted one of {', '.join(get_args(Weighting))}")


def cart_weights(context: Tensor, *, p: float, document_ids: Tensor | None = None) -> Tensor:
    """Two-sided geometric smoothing of the context: [B, L] bool → [B, L] float32, in O(L · log(1/p)).

    The one-sided sum is built by doubling: after k rounds it covers 2^k neighbors, and rounds stop when a further
    neighbor would weigh less than float32 resolves.
    """
    check_cart_p(p)
    mirrored_ids = None if document_ids is None else document_ids.flip(1)
    left = _sum_before(context.float(), document_ids, q=1 - p)
    right = _sum_before(context.float().flip(1), mirrored_ids, q=1 - p).flip(1)
    return 0.5 * p * (left + right)


def check_cart_p(p: float) -> None:
    """Raise UserError for a p outside (0, 1]."""
    check_range("cart_p", p)
    if not 0 < p <= 1:
        raise UserError(f"cart_p is {p}, wanted a probability in (0, 1]: the authors train with 0.1")


def _sum_before(c: Tensor, document_ids: Tensor | None, *, q: float) -> Tensor:
    """y_i = Σ_{m ≥ 1} q^(m−1) · c_{i−m}, within one document."""
    y = _delay(c, document_ids, 1)
    reach = 1
    while reach < c.shape[1] and reach * math.log(max(q, 1e-30)) > math.log(1e-9):
        y = y + q**reach * _delay(y, document_ids, reach)
        reach *= 2
    return y


def _delay(y: Tensor, document_ids: Tensor | None, steps: int) -> Tensor:
    """y_{i−steps}, zero before the start of the row or document."""
    shifted = torch.zeros_like(y)
    shifted[:, steps:] = y[:, :-steps]
    if document_ids is not None:
        shifted[:, steps:] *= document_ids[:, steps:] == document_ids[:, :-steps]
    return shifted
