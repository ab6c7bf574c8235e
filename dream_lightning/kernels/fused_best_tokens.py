"""`choosing.best_tokens` as one kernel. It reads the logits at most twice, where compiled code reads them four times.

Imported only where there is a GPU: torch's builds without CUDA come without triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dream_lightning.sampling.params import Algorithm

_BLOCK, _WARPS = 8192, 32  # logits of a row at a time, and who reads them


def best_tokens(logits: Tensor, alg: Algorithm, forbidden: int | None = None) -> tuple[Tensor, Tensor]:
    """Of logits [M, V], tokens [M] int64 and confidences [M] float32; for `topk_margin` there is no kernel.

    The token is that of the largest logit, also where the probabilities of two round to the same number.
    """
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

    tops = tl.full([BLOCK], float("-inf"), tl.float32)  # the largest logit, where, and the sum of exp(logit − it)
    first = tl.zeros([BLOCK], tl.int32)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = _allowed(logits, start + lane, forbidden, SIZE)
        higher = x > tops
        smaller = tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - tops)))  # −inf − −inf is no number
        totals = tl.where(higher, totals * smaller + 1, totals + smaller)
        first = tl.where(higher, start + lane, first)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, axis=0)
    token = tl.min(tl.where(tops == top, first, SIZE - 1), axis=0)
    total = tl.sum(totals * tl.exp(tops - top), axis=0)
    confidence = 1 / total
    if ENTROPY:  # p·log(p + ε) = e / total · (log(e + ε·total) − log(total)) of e = exp(x − top)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            e = tl.exp(_allowed(logits, start + lane, forbidden, SIZE) - top)
            sums += e * tl.log(e + 1e-10 * total)
        confidence = tl.sum(sums, axis=0) / total - tl.log(total.to(tl.float64)).to(tl.float32)

    tl.store(tokens + row, token.to(tl.int64))
    tl.store(confidences + row, confidence)
