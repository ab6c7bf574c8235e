"""Which token for a masked position, and how sure it is. Pure functions; noise comes in as uniforms.

Formulas: `sample_tokens`, `top_p_logits`, `top_k_logits` of the authors' generation_utils.py. All in float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dream_lightning.sampling.params import Algorithm

# Positions handled at a time: a float32 [256, 152064] temporary is 156 MB, and a few of them live at once.
_POSITIONS = 256


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


def best_tokens(logits: Tensor, alg: Algorithm, forbidden: int | None = None) -> tuple[Tensor, Tensor]:
    """`candidates` of one part at temperature 0 without filters.

    [M, V] → tokens [M] int64, confidences [M] float32.
    """
    logits = logits.float()
    if forbidden is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) == forbidden, -torch.inf)
    probs = logits.softmax(-1)
    tokens = _first_maximum(probs)
    return tokens, confidence_of(probs, tokens, alg)


def _first_maximum(probs: Tensor) -> Tensor:
    """`probs.max(-1).indices` by way of the maxima of parts: compiled for a GPU, one row alone keeps it from working.

    [M, V] → [M] int64.
    """
    width = math.gcd(probs.shape[-1], 512)
    value, inside = probs.unflatten(-1, (-1, width)).max(-1)  # [M, V / width]
    part = value.max(-1, keepdim=True).indices  # [M, 1]
    return (part * width + inside.gather(-1, part)).squeeze(-1)


Rules = Callable[[Tensor, Tensor, Tensor], Tensor]  # float32 logits [m, V], row [m], column [m] → logits [m, V]


def candidates(
    logits: Tensor,
    uniforms: Tensor | None,
    *,
    alg: Algorithm,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    forbidden: int | None = None,
    rules: Rules | None = None,
    places: tuple[Tensor, Tensor] | None = None,
    best: Callable[[Tensor, Algorithm, int | None], tuple[Tensor, Tensor]] = best_tokens,
) -> tuple[Tensor, Tensor]:
    """A token for every masked position, and the confidence in it.

    Args:
        logits: [M, V], already aligned with the positions they predict.
        uniforms: [M] float32 in [0, 1); None at temperature 0.
        forbidden: a token that must not be chosen.
        rules: changes the logits first; needs `places`.
        places: row [M] and column [M] of the logits.
        best: `best_tokens`, or a compiled form of it.

    Returns:
        tokens [M] int64 (at temperature 0 the argmax, the lowest id of a tie) and confidences [M] float32.
    """
    tokens, confidences = [], []
    plain = temperature == 0 and (top_p is None or top_p == 1) and top_k is None
    for start in range(0, max(1, len(logits)), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        some = logits[part]  # [≤ 256, V]
        if rules is not None:
            some = rules(some.to(torch.float32, copy=True), places[0][part], places[1][part])
        if plain:
            token, confidence = best(some, alg, forbidden)
        else:
            some = some.float()
            if forbidden is not None:
                some = some.masked_fill(torch.arange(some.shape[1], device=some.device) == forbidden, -torch.inf)
            probs = token_probabilities(some, temperature=temperature, top_p=top_p, top_k=top_k)
            token = draw(probs, uniforms[part]) if temperature > 0 else probs.max(-1).indices
            confidence = confidence_of(probs, token, alg)
        tokens.append(token)
        confidences.append(confidence)
    return (tokens[0], confidences[0]) if len(tokens) == 1 else (torch.cat(tokens), torch.cat(confidences))
