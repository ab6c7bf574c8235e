"""Which and how many of the masked positions are filled now. Pure functions.

All work on a grid [B, L] of confidences that is −inf wherever nothing may be filled.
"""

import torch
from torch import Tensor

from dream_lightning.sampling.params import Algorithm, SamplingParams
from dream_lightning.sampling.token_sampling import certainty


def fill_shares(steps: int, eps: float) -> Tensor:
    """Share of the remaining masks to fill at every step: 1 − tᵢ₊₁/tᵢ with t from 1 to eps in equal steps, last 1.

    Returns:
        [S] float32 on the CPU, whatever the model's device, so that rounding never differs.
    """
    t = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    shares = 1 - t[1:] / t[:-1]
    shares[-1] = 1
    return shares


def scheduled(left: Tensor, share: float, *, averaged: bool = False) -> Tensor:
    """The authors' count: so much of the remaining masks, rounded down in float32.

    Args:
        left: [B] int64, masks of every row.
        averaged: take the mean of the rows' masks, as the authors do.

    Returns:
        [B] int64.
    """
    remaining = (left.sum() / len(left)).expand(len(left)) if averaged else left.float()
    return (remaining * share).long()


def at_least(grid: Tensor, threshold: float, alg: Algorithm) -> Tensor:
    """How many positions of every row have this certainty. [B, L] → [B] int64."""
    return ((certainty(grid, alg) >= threshold) & (grid > -torch.inf)).sum(1)


def by_factor(grid: Tensor, factor: float, alg: Algorithm) -> Tensor:
    """The largest n with (n + 1)(1 − cₙ) < factor, cₙ the n-th largest certainty of the row. [B, L] → [B] int64.

    Source: the factor rule of Fast-dLLM (arXiv:2505.22618). The left side grows with n, so this counts.
    """
    ordered = grid.sort(dim=1, descending=True).values  # [B, L]
    n = torch.arange(1, grid.shape[1] + 1, device=grid.device)
    return (((n + 1) * (1 - certainty(ordered, alg)) < factor) & (ordered > -torch.inf)).sum(1)


def adaptive_counts(grid: Tensor, left: Tensor, params: SamplingParams) -> Tensor:
    """How many to fill by `tokens_per_step`, `threshold` or `factor`: at least one where there is one. → [B] int64.

    Args:
        grid: [B, L] confidences as `confidence_of` gives them.
        left: [B] int64, masks of every row.
    """
    if params.tokens_per_step is not None:
        return left.clamp(max=params.tokens_per_step)
    if params.threshold is not None:
        counts = at_least(grid, params.threshold, params.alg)
    else:
        counts = by_factor(grid, params.factor, params.alg)
    return torch.minimum(counts.clamp(min=1), left)


def choose_positions(grid: Tensor, counts: Tensor, *, most: int | None = None) -> Tensor:
    """The `counts` [B] most confident positions of every row; of a tie, the leftmost. [B, L] → [B, L] bool.

    Ties are common: a trained model gives float32 probability 1.0 to many positions of an eos tail.

    Args:
        most: the largest of the counts, where the host knows it: for one a maximum does, which is cheaper than to sort.
    """
    order = grid.argmax(-1, keepdim=True) if most == 1 else grid.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[1], device=grid.device) < counts[:, None]
    return torch.zeros_like(grid, dtype=torch.bool).scatter(1, order, first)


def reference_topk_overflow(grid: Tensor, count: int) -> Tensor:
    """`count` positions of every row, though some rows have fewer: the others are those that topk over −inf returns.

    Only the authors' averaged schedule asks for this, see `process.reverse_process`.
    """
    return torch.zeros_like(grid, dtype=torch.bool).scatter(1, grid.topk(count).indices, True)


def perturb(confidence: Tensor, alg_temp: float, uniforms: Tensor) -> Tensor:
    """Confidences whose k largest are a draw of k without replacement from softmax(confidence / alg_temp).

    Gumbel top-k (Kool, van Hoof and Welling 2019, arXiv:1903.06059). Unlike a multinomial it cannot run out of
    probability when the softmax underflows.

    Args:
        confidence: any shape, float32.
        uniforms: same shape, multiples of 2⁻²⁴ in [0, 1).

    Returns:
        Same shape, float64.
    """
    u = uniforms.double() + 2.0**-25  # strictly between 0 and 1
    return confidence.double() / alg_temp - torch.log(-torch.log(u))
