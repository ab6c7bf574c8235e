"""`choosing.best_tokens` as one kernel. It reads the logits twice, where compiled code reads them four times.

Imported only where there is a GPU: torch's builds without CUDA come without triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dream_lightning.sampling.params import Algorithm

_BLOCK, _WARPS = 8192, 16  # logits of a row at a time, and who reads them


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
    """One row. NaN among its logits, or nothing but −inf, gives NaN as confidence, as softmax would."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * SIZE
    lane = tl.arange(0, BLOCK)

    top, total = float("-inf"), 0.0  # the largest logit, and the sum of exp(logit − top)
    for start in range(0, SIZE, BLOCK):
        at = start + lane
        x = _allowed(logits, at, forbidden, SIZE)
        higher = tl.maximum(top, tl.max(x, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # −inf − −inf is no number
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), axis=0)
        top = higher

    best, token, entropy = -1.0, tl.zeros([], tl.int64), 0.0
    for start in range(0, SIZE, BLOCK):
        at = start + lane
        x = _allowed(logits, at, forbidden, SIZE)
        p = tl.exp(x - top) / total
        if ENTROPY:
            entropy += tl.sum(p * tl.log(p + 1e-10), axis=0)
        highest = tl.max(p, axis=0)
        first = tl.min(tl.where(p == highest, at, SIZE), axis=0)
        token = tl.where(highest > best, first.to(tl.int64), token)
        best = tl.maximum(best, highest)

    tl.store(tokens + row, token)
    tl.store(confidences + row, (entropy if ENTROPY else best) * (total / total))
