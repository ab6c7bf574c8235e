"""Which token for a masked position, and how certain it is. Noise is passed as uniforms.

Formulas: `sample_tokens`, `top_p_logits`, `top_k_logits` of the authors' generation_utils.py. All in float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dream_lightning.errors import UserError
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import Algorithm, SamplingParams

LogitsHook = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(step, x [B, L], logits [m, V], row [m], column [m]) → logits [m, V], float32.

logits[j] predicts x[row[j], column[j]], a masked position. A step may call the hook several times. Unlike the authors'
`generation_logits_hook_func` it never gets the logits of filled positions: they are not computed.
"""

TokensHook = Callable[[int, Tensor], Tensor]
"""(step, x [B, L]) → x [B, L] int64, after every step, as the authors' `generation_tokens_hook_func`."""


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


def token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [M, V] float32 after temperature (0 does not change the logits), then top-p, then top-k."""
    logits = logits.float()
    if params.temperature > 0:
        logits = logits / params.temperature
    if params.top_p not in (None, 1):
        logits = keep_top_p(logits, params.top_p)
    if params.top_k is not None:
        logits = keep_top_k(logits, params.top_k)
    return logits.softmax(-1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution: [M, V] and [M] in [0, 1), float32 → [M] int64.

    The sum runs over integers (probability · 2⁵²), so it is exact on every device, in whatever order. A token of
    probability 0 is never drawn. The resolution is that of the uniforms, 2⁻²⁴.
    """
    cumulative = (probs * 2.0**52).to(torch.int64).cumsum(-1)  # [M, V]
    # In float64 u · total < total, since u ≤ 1 − 2⁻²⁴: a token always exists.
    threshold = (uniforms.double() * cumulative[:, -1].double()).to(torch.int64)
    token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
    return token.clamp(max=probs.shape[-1] - 1)  # for NaN only, which the caller reports


def confidence_of(probs: Tensor, tokens: Tensor, alg: Algorithm) -> Tensor:
    """How certain the model is of a position, larger is more certain: [M, V] float32 and [M] int64 → [M] float32.

    `topk_margin` is p₁ − p₂; `entropy` is Σ p·log(p + 1e-10); the others give the chosen token's p.
    """
    if alg == "topk_margin":
        best = probs.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]
    if alg == "entropy":
        return (probs * torch.log(probs + 1e-10)).sum(-1)
    return probs.gather(-1, tokens[:, None]).squeeze(-1)


def certainty(confidence: Tensor, alg: Algorithm) -> Tensor:
    """Confidences on a scale from 0 to 1 = certain, in the same order; of `entropy` the exponential, 1/perplexity."""
    return (confidence.exp() if alg == "entropy" else confidence).clamp(0, 1)


def best_tokens(logits: Tensor, alg: Algorithm) -> tuple[Tensor, Tensor]:
    """`choose_tokens` at temperature 0 without filters, a function that can be compiled."""
    probs = logits.float().softmax(-1)
    # `probs.max(-1).indices` by parts of each row: compiled, a row in one part would leave the GPU mostly idle.
    width = math.gcd(probs.shape[-1], 512)
    value, inside = probs.unflatten(-1, (-1, width)).max(-1)  # [M, V / width]
    part = value.max(-1, keepdim=True).indices  # [M, 1]
    tokens = (part * width + inside.gather(-1, part)).squeeze(-1)  # [M]
    return tokens, confidence_of(probs, tokens, alg)


def choose_tokens(
    logits: Tensor, uniforms: Tensor | None, params: SamplingParams, best: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens [M] int64 (at temperature 0 the argmax, the lowest id of a tie) and their confidences [M] float32.

    Args:
        logits: [M, V], already aligned with the positions they predict.
        uniforms: [M] float32 in [0, 1); None at temperature 0.
        best: a compiled form of `best_tokens`.
    """
    if params.temperature == 0 and params.top_p in (None, 1) and params.top_k is None:
        return (best or best_tokens)(logits, params.alg)
    probs = token_probabilities(logits, params)
    tokens = draw(probs, uniforms) if params.temperature > 0 else probs.max(-1).indices
    return tokens, confidence_of(probs, tokens, params.alg)


def constrain(logits: Tensor, column: Tensor, canvas: Canvas, params: SamplingParams) -> Tensor:
    """Logits [m, V] at columns [m] without tokens that are banned there; in-place."""
    for token in [*(params.banned_tokens or []), *[canvas.mask_token_id] * params.forbid_mask]:
        logits[:, token].fill_(-torch.inf)
    if params.min_new_tokens:
        early = column < canvas.prompt_length + params.min_new_tokens  # [m]
        logits[:, canvas.eos_token_id].masked_fill_(early, -torch.inf)
    return logits


def same_kind(name: str, changed: object, given: Tensor) -> Tensor:
    """`changed`, or UserError if it is no tensor of the shape and dtype of `given`."""
    got = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
    wanted = f"{given.dtype} {list(given.shape)}"
    if got != wanted:
        raise UserError(f"{name} returned {got}, wanted {wanted} as it got")
    return changed
