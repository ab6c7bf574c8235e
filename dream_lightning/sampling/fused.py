"""`choosing.best_tokens` as one kernel. It reads the logits twice, where compiled code reads them four times.

Imported only where there is a GPU: torch's builds without CUDA come without triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dream_lightning.sampling.params import Algorithm

_BLOCK, _WARPS = 8192, 32  # logits of a row at a time, and who reads them


def best_tokens(logits: Tensor, alg: Algorithm, forbidden: int | None = None) -> tuple[Tensor, Tensor]:
    """Of logits [M, V], tokens [M] int64 and confidences [M] float32; for `topk_margin` there is no kernel."""
    assert alg != "topk_margin"
    logits = logits.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    confidences = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        with torch.cuda.device_of(logits):
            _best[(len(logits),)](
                *(logits, tokens, confidences, -1 if forbidden is None else forbidden),
                SIZE=logits.shape[1],
                ENTROPY=alg == "entropy",
                BLOCK=min(_BLOCK, triton.next_power_of_2(logits.shape[1])),
                num_warps=_WARPS,
            )
    return tokens, confidences


@triton.jit
def _allowed(logits, at, forbidden, SIZE: tl.constexpr):
    # The forbidden one is taken out after loading: a mask with a hole would forbid to load several numbers at once.
    x = tl.load(logits + at, mask=at < SIZE, other=float("-inf")).to(tl.float32)
    return tl.where(at == forbidden, float("-inf"), x)


@triton.jit
def _best(logits, tokens, confidences, forbidden, SIZE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """One row. NaN among its logits, or nothing but −inf, gives NaN as confidence, as softmax would.

    Every lane goes through its own part of the row, and only then are the lanes put together.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * SIZE
    lane = tl.arange(0, BLOCK)

    tops = tl.full([BLOCK], float("-inf"), tl.float32)  # the largest logit, and the sum of exp(logit − it)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = _allowed(logits, start + lane, forbidden, SIZE)
        higher = tl.maximum(tops, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # −inf − −inf is no number
        totals = totals * tl.exp(tops - shift) + tl.exp(x - shift)
        tops = higher
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * tl.exp(tops - top), axis=0)

    best = tl.full([BLOCK], -1.0, tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    entropies = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = _allowed(logits, start + lane, forbidden, SIZE)
        p = tl.exp(x - top) / total
        if ENTROPY:  # log(p + ε) in parts: where all p are alike, the rounding of one logarithm would add up
            entropies += tl.where(p > 0, p * (x - top + tl.log(1 + 1e-10 / p)), 0.0)
        first = tl.where(p > best, start + lane, first)
        best = tl.maximum(best, p)
    highest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == highest, first, SIZE - 1), axis=0)
    confidence = highest
    if ENTROPY:
        confidence = tl.sum(entropies, axis=0) - tl.log(total.to(tl.float64)).to(tl.float32)

    tl.store(tokens + row, token.to(tl.int64))
    tl.store(confidences + row, confidence * (total / total))
