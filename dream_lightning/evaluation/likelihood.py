"""Likelihood of a continuation: the upper bound of −log p that a masked diffusion model gives, and its error."""

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_lightning.diffusion.denoiser import features
from dream_lightning.diffusion.head import chunk_of, token_nll
from dream_lightning.diffusion.noise import uniform
from dream_lightning.errors import UserError, check_range
from dream_lightning.model import DreamModel
from dream_lightning.sampling.generate import evaluating

Tokens = Sequence[int]


class NLLBound(NamedTuple):
    """An upper bound of −log p, over all tokens of one continuation or of several."""

    nll: float  # nats, summed over the tokens
    standard_error: float  # of `nll`; too large rather than too small, because draws are stratified; 0 = exact
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens), an upper bound too."""
        return math.exp(self.nll / self.tokens)


def nll_bound(model: DreamModel, context: Tokens, continuation: Tokens, **options: Any) -> NLLBound:
    """`nll_bounds` of one pair."""
    return nll_bounds(model, [(context, continuation)], **options)[0]


@torch.no_grad()
def nll_bounds(
    model: DreamModel,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    draws: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> list[NLLBound]:
    """Upper bounds of −log p(continuation | context).

    The bound ∫ E[Σ_masked −log p(x_0 | x_t)] dt / t over t in (0, 1) is, for N tokens, exactly the sum over k = 1 … N
    of E[Σ_masked −log p] / k with k masks at uniform positions (Nie et al., arXiv:2502.09992, appendix A). Each draw
    takes one k, spread evenly over 1 … N: stratified t without a smallest t. If the 2^N − 1 possible masks are no more
    than `draws`, their sum is taken instead: for 128 draws, up to 7 tokens are exact.

    Args:
        model: is in eval mode meanwhile.
        pairs: token ids of context, which may be empty, and continuation.
        draws: masks of a continuation. The same seed gives the same masks for continuations of the same context and
            length, which compares them with less noise; other contexts have independent ones.
        batch_size: masked rows of a forward, of one pair or several, bucketed by length. It does not change a result.

    Raises:
        UserError: an empty continuation, fewer than two draws, or a pair that is longer than the model's positions.
    """
    check_range("draws", draws, least=2, whole=True)
    check_range("batch_size", batch_size, least=1, whole=True)
    limit = model.config.max_position_embeddings
    for number, (context, continuation) in enumerate(pairs):
        if not continuation:
            raise UserError(f"the continuation of pair {number} is empty, wanted at least one token")
        if (length := len(context) + len(continuation)) > limit:
            raise UserError(f"pair {number} has {length} tokens, the model {limit} positions: shorten the context")
    masks = [_masks(draws, context or continuation, len(continuation), seed) for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
    rows = [(number, row) for number in order for row in range(len(masks[number][0]))]
    sums: list[list[Tensor]] = [[] for _ in pairs]
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            nll = _masked_sums(model, [pairs[n] for n, _ in batch], [masks[n][0][row] for n, row in batch])
            for (number, _), value in zip(batch, nll.unbind(), strict=True):
                sums[number].append(value)
    bounds = []
    for (_, continuation), (drawn, weight), parts in zip(pairs, masks, sums, strict=True):
        values = torch.stack(parts).cpu() * weight * len(weight)  # [D], their mean is the bound
        exact = len(drawn) == 2 ** len(continuation) - 1
        error = 0.0 if exact else (values.std() / len(values) ** 0.5).item()
        bounds.append(NLLBound(values.mean().item(), error, len(continuation)))
    return bounds


def total(bounds: Sequence[NLLBound]) -> NLLBound:
    """The bound of several continuations of different contexts together; `.perplexity` of held-out texts."""
    error = math.sqrt(sum(bound.standard_error**2 for bound in bounds))
    return NLLBound(sum(bound.nll for bound in bounds), error, sum(bound.tokens for bound in bounds))


def most_likely(
    model: DreamModel, context: Tokens, choices: Sequence[Tokens], *, per_token: bool = False, **options: Any
) -> int:
    """The number of the choice with the lowest bound, or the lowest per token; `options` of `nll_bounds`."""
    bounds = nll_bounds(model, [(context, choice) for choice in choices], **options)
    scores = [bound.nll / bound.tokens if per_token else bound.nll for bound in bounds]
    return scores.index(min(scores))


def _masked_sums(model: DreamModel, pairs: list[tuple[Tokens, Tokens]], masks: list[Tensor]) -> Tensor:
    """Σ_masked −log p of each row, [B] float64. Rows are padded on the right."""
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    length, device = max(lengths), model.device
    ids = torch.tensor([[*a, *b, *[0] * (length - n)] for (a, b), n in zip(pairs, lengths, strict=True)])  # [B, L]
    padded = [F.pad(mask, (n - len(mask), length - n)) for mask, n in zip(masks, lengths, strict=True)]
    is_masked = torch.stack(padded)  # [B, L]
    real = torch.arange(length) < torch.tensor(lengths)[:, None]  # [B, L]
    x_t = ids.masked_fill(is_masked, model.config.mask_token_id).to(device)
    row, column = is_masked.nonzero(as_tuple=True)
    where, targets = (row.to(device), column.to(device)), ids[row, column].to(device)
    h = features(model, x_t, where, None if real.all() else real.to(device))
    nll = token_nll(h, model.lm_head, targets, chunk=chunk_of(model.config.vocab_size))  # [M]
    return torch.zeros(len(pairs), device=device, dtype=torch.float64).index_add_(0, where[0], nll.double())


def _masks(draws: int, tokens: Tokens, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Masks bool [D, N] and their weights [D] float64: Σ weight · Σ_masked −log p is the bound or its estimate.

    All masks, if there are at most `draws`; else the number of masks of the draws is spread evenly over 1 … N.
    """
    if 2**length - 1 <= draws:
        masks = torch.arange(1, 2**length)[:, None] >> torch.arange(length) & 1 == 1
        choices = [0] + [k * math.comb(length, k) for k in range(1, length + 1)]
        return masks, 1 / torch.tensor(choices).double()[masks.sum(1)]
    key = zlib.crc32(repr(list(tokens)).encode())  # of the context: one context, the same masks
    draw = torch.arange(draws)
    offset = uniform(seed, draw[:1], key)  # shared, so that every k has the same probability
    count = ((draw + offset) * length / draws).long().clamp(max=length - 1) + 1  # [D]
    order = uniform(seed, draw[:, None] + 1, torch.arange(length), key).argsort(dim=1).argsort(dim=1)  # ranks [D, N]
    return order < count[:, None], length / (draws * count.double())
