"""Which token for a masked position, and which and how many positions now. Pure functions; noise comes in as uniforms.

Formulas: `sample_tokens`, `top_p_logits`, `top_k_logits` of the authors' generation_utils.py. All in float32.
"""

import torch
from torch import Tensor

from dream_lightning.sampling.params import Algorithm

# Positions handled at a time: a float32 [256, 152064] temporary is 156 MB, and a few of them live at once.
_POSITIONS = 256


def fill_shares(steps: int, eps: float) -> Tensor:
    """Share of the remaining masks to fill at every step: 1 − tᵢ₊₁/tᵢ with t from 1 to eps in equal steps, last 1.

    Returns:
        [S] float32 on the CPU, whatever the model's device, so that rounding never differs.
    """
    t = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    shares = 1 - t[1:] / t[:-1]
    shares[-1] = 1
    return shares


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Remove (−inf) the tokens after the one whose cumulative probability crosses `top_p`. [M, V] → [M, V]."""
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    passed = ordered.softmax(-1).cumsum(-1) > top_p  # [M, V], from the crossing token on
    removed = torch.zeros_like(passed)
    removed[:, 1:] = passed[:, :-1]
    return logits.masked_fill(torch.zeros_like(removed).scatter(-1, token, removed), -torch.inf)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Remove (−inf) the tokens below the k-th best; ties with it stay. [M, V] → [M, V]."""
    smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def token_probabilities(
    logits: Tensor, *, temperature: float = 0.0, top_p: float | None = None, top_k: int | None = None
) -> Tensor:
    """Probabilities after temperature, then top-p, then top-k. [M, V] → [M, V] float32.

    Temperature 0 leaves the logits as they are: then these probabilities only measure confidence.
    """
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    return logits.softmax(-1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution.

    The sum runs over integers (probability · 2⁵²), so it does not round: it rises exactly where a token has
    probability, on every device and in whatever order the sum is made. A token of probability 0 is never drawn.
    The resolution is that of the uniforms, 2⁻²⁴.

    Args:
        probs: [M, V] float32, rows sum to about 1.
        uniforms: [M] float32 in [0, 1).

    Returns:
        [M] int64.
    """
    cumulative = (probs * 2.0**52).to(torch.int64).cumsum(-1)  # [M, V]
    # In float64 u · total < total, since u ≤ 1 − 2⁻²⁴: a token always exists.
    threshold = (uniforms.double() * cumulative[:, -1].double()).to(torch.int64)
    token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
    return token.clamp(max=probs.shape[-1] - 1)  # only NaN needs it: the caller reports that, not an index error


def confidence_of(probs: Tensor, tokens: Tensor, alg: Algorithm) -> Tensor:
    """How sure the model is of a position; larger is surer.

    Args:
        probs: [M, V] float32.
        tokens: [M] int64, the chosen tokens.
        alg: `topk_margin` is p₁ − p₂; `entropy` is Σ p·log(p + 1e-10); the others give the chosen token's p.

    Returns:
        [M] float32.
    """
    if alg == "topk_margin":
        best = probs.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]
    if alg == "entropy":
        return (probs * torch.log(probs + 1e-10)).sum(-1)
    return probs.gather(-1, tokens[:, None]).squeeze(-1)


def certainty(confidence: Tensor, alg: Algorithm) -> Tensor:
    """Confidences of `confidence_of` on a scale from 0 to 1 = certain: of `entropy` the exponential, 1/perplexity.

    Any shape. The order stays as it is.
    """
    return (confidence.exp() if alg == "entropy" else confidence).clamp(0, 1)


def candidates(
    logits: Tensor,
    uniforms: Tensor | None,
    *,
    alg: Algorithm,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    forbidden: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A token for every masked position, and the confidence in it.

    Args:
        logits: [M, V], already aligned with the positions they predict.
        uniforms: [M] float32 in [0, 1); None at temperature 0.
        forbidden: a token that must not be chosen.

    Returns:
        tokens [M] int64 (at temperature 0 the argmax, the lowest id of a tie) and confidences [M] float32.
    """
    tokens, confidences = [], []
    for start in range(0, len(logits), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        some = logits[part]  # [≤ 256, V]
        if forbidden is not None:
            some = some.index_fill(1, torch.tensor(forbidden, device=some.device), -torch.inf)
        probs = token_probabilities(some, temperature=temperature, top_p=top_p, top_k=top_k)
        tokens.append(draw(probs, uniforms[part]) if temperature > 0 else probs.max(-1).indices)
        confidences.append(confidence_of(probs, tokens[-1], alg))
    return torch.cat(tokens), torch.cat(confidences)


def choose_positions(confidence: Tensor, where: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """The most confident positions of every row; of a tie, the leftmost.

    Ties are common: a trained model gives float32 probability 1.0 to many positions of an eos tail.

    Args:
        confidence: [M], of the True positions of `where` in reading order.
        where: [B, L] bool.
        masks: [B] int64 on the CPU, the True positions of every row.
        counts: [B] int64 on the CPU, how many to choose. If one exceeds the row's masks, all counts must be equal,
            and the row gets positions outside `where` as well: those that the authors' topk over −inf happens to
            return, see `sampler.reverse_process`.

    Returns:
        [B, L] bool.
    """
    everywhere = torch.full(where.shape, -torch.inf, dtype=confidence.dtype, device=where.device)
    everywhere = everywhere.masked_scatter(where, confidence)  # [B, L]
    if (counts > masks).any():
        assert (counts == counts[0]).all()
        return torch.zeros_like(where).scatter(1, everywhere.topk(int(counts[0])).indices, True)
    order = everywhere.argsort(dim=-1, descending=True, stable=True)  # [B, L]
    first = torch.arange(where.shape[1], device=where.device) < counts.to(where.device)[:, None]
    return torch.zeros_like(where).scatter(1, order, first)


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
