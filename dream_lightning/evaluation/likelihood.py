"""Likelihood of a continuation: the upper bound of −log p that a masked diffusion model gives, and its error."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dream_lightning.diffusion.denoiser import Denoiser, features
from dream_lightning.diffusion.head import chunk_of, token_nll
from dream_lightning.diffusion.noise import uniform
from dream_lightning.errors import UserError, check_range


class NLLBound(NamedTuple):
    """An estimate of the bound over all tokens of a continuation."""

    nll: float  # nats, summed over the tokens
    standard_error: float  # of `nll`; too large rather than too small, because draws are stratified
    tokens: int


@torch.no_grad()
def nll_bound(
    model: Denoiser,
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    mask_token_id: int,
    draws: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> NLLBound:
    """Upper bound of −log p(continuation | context), by Monte Carlo with fixed noise.

    The bound ∫ E[Σ_masked −log p(x_0 | x_t)] dt / t over t in (0, 1) is, for N tokens, exactly the sum over k = 1 … N
    of E[Σ_masked −log p] / k with k masks at uniform positions (Nie et al., arXiv:2502.09992, appendix A). Each draw
    takes one k, spread evenly over 1 … N: stratified t without a smallest t.

    Args:
        model: in eval mode.
        context: token ids before the continuation; may be empty.
        continuation: token ids, at least one.
        draws: forwards of one row each. The same seed gives the same masks for the same length.

    Raises:
        UserError: an empty continuation or fewer than two draws.
    """
    check_range("draws", draws, least=2)
    check_range("batch_size", batch_size, least=1)
    if not continuation:
        raise UserError("the continuation is empty, wanted at least one token")
    device, length, count = model.lm_head.weight.device, len(continuation), len(context)
    ids = torch.tensor([*context, *continuation], device=device)  # [L]
    masked = _masks(draws, length, seed).to(device)  # [D, N]
    values = []
    for part in masked.split(batch_size):
        is_masked = torch.nn.functional.pad(part, (count, 0))  # [b, L]
        x_t = ids.expand(len(part), -1).masked_fill(is_masked, mask_token_id)
        where = is_masked.nonzero(as_tuple=True)
        h = features(model, x_t, where)
        nll = token_nll(h, model.lm_head, ids[where[1]], chunk=chunk_of(model.lm_head.weight.shape[0]))  # [M]
        sums = torch.zeros(len(part), device=device, dtype=torch.float64).index_add_(0, where[0], nll.double())
        values.append(length * sums / part.sum(1))
    values = torch.cat(values)
    return NLLBound(values.mean().item(), (values.std() / draws**0.5).item(), length)


def _masks(draws: int, length: int, seed: int) -> Tensor:
    """Bool [D, N]; the number of masks of the draws is spread evenly over 1 … N."""
    draw = torch.arange(draws)
    offset = uniform(seed, draw[:1])  # shared, so that every k has the same probability
    count = ((draw + offset) * length / draws).long().clamp(max=length - 1) + 1  # [D]
    order = uniform(seed, draw[:, None] + 1, torch.arange(length)).argsort(dim=1).argsort(dim=1)  # ranks [D, N]
    return order < count[:, None]
