"""SwiGLU's two products and what becomes of them as one kernel: the products themselves are never written.

Imported only where there is a GPU: torch's builds without CUDA come without triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64  # of a tile; these and the numbers below measured on an H100
_ROWS_TOGETHER = 8  # of tiles: what neighbours read is then still in the cache
_WARPS, _STAGES = 8, 3


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ), both products rounded to the type of x first, as separate kernels would.

    Args:
        x: [M, D] bfloat16 or float16; D a multiple of 8.
        gate: [I, D] of the same type; I a multiple of 8.
        up: the same.

    Returns:
        [M, I].
    """
    x, gate, up = x.contiguous(), gate.contiguous(), up.contiguous()
    out = x.new_empty(len(x), len(gate))
    tiles = triton.cdiv(len(x), _ROWS) * triton.cdiv(len(gate), _COLUMNS)
    with torch.cuda.device_of(x):
        _swiglu[(tiles,)](
            TensorDescriptor.from_tensor(x, [_ROWS, _DEPTH]),
            TensorDescriptor.from_tensor(gate, [_COLUMNS, _DEPTH]),
            TensorDescriptor.from_tensor(up, [_COLUMNS, _DEPTH]),
            TensorDescriptor.from_tensor(out, [_ROWS, _COLUMNS]),
            *out.shape,
            SIZE=x.shape[1],
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            DEPTH=_DEPTH,
            TOGETHER=_ROWS_TOGETHER,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return out


@triton.jit
def _swiglu(
    x,
    gate,
    up,
    out,
    length,
    width,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One tile of the result. Tiles go down a band of rows, column by column."""
    down, across = tl.cdiv(length, ROWS), tl.cdiv(width, COLUMNS)  # tiles
    tile = tl.program_id(0)
    band = tile // (TOGETHER * across) * TOGETHER
    rows_of_band = min(down - band, TOGETHER)
    place = tile - band * across
    row = (band + place % rows_of_band) * ROWS
    column = place // rows_of_band * COLUMNS
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, SIZE, DEPTH):
        part = x.load([row, k])
        gates = tl.dot(part, gate.load([column, k]).T, gates)
        ups = tl.dot(part, up.load([column, k]).T, ups)
    gates = gates.to(out.dtype).to(tl.float32)
    ups = ups.to(out.dtype).to(tl.float32)
    out.store([row, column], (gates / (1 + tl.exp(-gates)) * ups).to(out.dtype))
