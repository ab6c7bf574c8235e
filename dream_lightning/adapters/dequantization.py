"""nf4 weights → bfloat16 or float8 in plain torch operations, which compile into the one kernel before a product.

In bfloat16 bit for bit what bitsandbytes' own kernels give. Those are custom operations: closed to the compiler, three
launches a weight, and 1.0 TB/s on an H100.
"""

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dream_lightning.errors import UserError

BLOCK, _SUPERBLOCK = 64, 256  # weights that share a scale, scales that share a scale of theirs
_INTEGERS = {torch.bfloat16: (torch.int16, torch.int32), torch.float8_e4m3fn: (torch.uint8, torch.int16)}  # of 1, of 2


def compile_with_layer(linear: nn.Module) -> None:
    """Let a filled bitsandbytes `Linear4bit` (nf4, double quantisation) compute in the open where it is compiled."""
    hold_statistics(linear)
    linear.forward = types.MethodType(_forward, linear)


def hold_statistics(linear: nn.Module) -> None:
    """Put what the packed weights are taken out with into buffers: as inputs of compiled code, which layers share.

    Raises:
        UserError: rows do not fill blocks of 64 weights, which bitsandbytes' CPU kernels unpack wrongly.
    """
    state = linear.weight.quant_state
    if linear.in_features % BLOCK:
        raise UserError(
            f"a 4-bit layer of shape {list(state.shape)} has rows that do not fill blocks of {BLOCK} weights: leave "
            "quantize out"
        )
    for name, tensor in (
        ("levels", state.code),  # [16] float32
        ("scale_codes", state.absmax),  # [C] uint8, one a block
        ("scale_levels", state.state2.code),  # [256] float32
        ("superscales", state.state2.absmax),  # [C / 256] float32
        ("offset", state.offset),  # [] float32, the mean of the scales
    ):
        linear.register_buffer(name, tensor, persistent=False)


def block_scales(
    scale_codes: Tensor, scale_levels: Tensor, superscales: Tensor, offset: Tensor, *, again: bool = False
) -> Tensor:
    """The scale of every block, [C, 1] float32.

    Args:
        again: the same in another shape from the start, for the reason that `dequantize` gives.
    """
    shape = (-1, 1) if again else (-1,)
    superblock = torch.arange(len(scale_codes), device=scale_codes.device).view(shape) // _SUPERBLOCK
    return (scale_levels[scale_codes.view(shape).int()] * superscales[superblock] + offset).view(-1, 1)


def dequantize(
    packed: Tensor,
    levels: Tensor,
    scale_codes: Tensor,
    scale_levels: Tensor,
    superscales: Tensor,
    offset: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    again: bool = False,
) -> Tensor:
    """Two weights a byte, the first in the high half → all weights, [2 · len(packed)].

    Every byte becomes one word of two weights, so that its scale is looked up once.

    Args:
        dtype: of the weights, bfloat16 or float8_e4m3fn.
        again: for the second time in a compiled graph: the same numbers by products written the other way round. If
            they were written alike, the compiler would find them equal and keep unpacked weights until the backward
            pass.
    """
    scales = block_scales(scale_codes, scale_levels, superscales, offset, again=again)
    packed = packed.view(-1, BLOCK // 2)  # [C, 32]
    one, two = _INTEGERS[dtype]
    width = 8 * dtype.itemsize

    def bits(code: Tensor) -> Tensor:
        level = levels[code.int()]
        weight = (scales * level if again else level * scales).to(dtype)
        return weight.view(one).to(two)

    first, second = bits(packed >> 4), bits(packed & 15)
    words = (first & (1 << width) - 1) | (second << width)  # little-endian: the first weight is the low half
    return words.view(-1).view(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ with W built for the product and again for the gradient, never kept."""

    @staticmethod
    def forward(ctx, x: Tensor, out_features: int, *quantized: Tensor) -> Tensor:
        ctx.save_for_backward(*quantized)
        ctx.out_features = out_features
        return F.linear(x, dequantize(*quantized).view(out_features, -1))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight = dequantize(*ctx.saved_tensors, again=True).view(ctx.out_features, -1)
        return gradient @ weight, *(None,) * (1 + len(ctx.saved_tensors))


def _forward(self, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return type(self).forward(self, x)
    statistics = (self.levels, self.scale_codes, self.scale_levels, self.superscales, self.offset)
    with torch.autocast(x.device.type, enabled=False):
        out = _Product.apply(x.to(torch.bfloat16), self.out_features, self.weight.data.view(-1), *statistics)
    return (out if self.bias is None else out + self.bias).to(x.dtype)
