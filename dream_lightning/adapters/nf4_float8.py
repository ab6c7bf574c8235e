"""Weights kept in nf4, matrix products in 8-bit floats: QLoRA's memory at nearly the float8 base's speed.

Each weight goes 4 bits → float8 (e4m3) where it is needed: for the product, and again, transposed, for its gradient.
One scale a matrix suffices: its largest weight becomes 448, and e4m3 keeps 4 significant bits down to 2^-6, so a weight
has them from 1/28,000 of the largest on. This rounding, 2.6 % at random, is less than a third of nf4's own.
"""

import types

import torch
from torch import Tensor, nn

from dream_lightning.adapters.dequantization import block_scales, dequantize, hold_statistics
from dream_lightning.adapters.float8 import LARGEST, apply_linear, product, to_float8


def multiply_in_float8(linear: nn.Module) -> None:
    """Let a filled bitsandbytes `Linear4bit` (nf4, double quantisation) compute in float8, compiled or not.

    In evaluation too: validation then measures the network that trains. Not compiled it gives the same numbers, slowly.
    """
    hold_statistics(linear)
    scales = block_scales(linear.scale_codes, linear.scale_levels, linear.superscales, linear.offset)
    scale = (scales.abs().amax() / LARGEST).clamp(min=1e-12)  # a level is at most 1
    linear.superscales, linear.offset = linear.superscales / scale, linear.offset / scale
    # Written out for every row of W or of its transpose, as the product takes it: 8 MB at 7B.
    rows = max(linear.in_features, linear.out_features)
    linear.register_buffer("weight_scales", scale.expand(rows, 1).contiguous(), persistent=False)
    linear.forward = types.MethodType(_forward, linear)


class _Product(torch.autograd.Function):
    """x Wᵀ and, in the backward pass, g W, with W built for each and never kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_scales: Tensor, out_features: int, *quantized: Tensor) -> Tensor:
        ctx.save_for_backward(weight_scales, *quantized)
        ctx.out_features = out_features
        weight = dequantize(*quantized, dtype=torch.float8_e4m3fn).view(out_features, -1)
        return product(*to_float8(x), weight, weight_scales[:out_features])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight_scales, *quantized = ctx.saved_tensors
        # The matrix units want W along the summed axis.
        weight = dequantize(*quantized, dtype=torch.float8_e4m3fn, again=True).view(ctx.out_features, -1)
        columns = weight.t().contiguous()
        out = product(*to_float8(gradient), columns, weight_scales[: len(columns)])
        return out, *(None,) * (2 + len(quantized))


def _forward(self, x: Tensor) -> Tensor:
    """[..., in] → [..., out] in the dtype of x."""
    statistics = (self.levels, self.scale_codes, self.scale_levels, self.superscales, self.offset)
    weights = (self.weight_scales, self.out_features, self.weight.data.view(-1), *statistics)
    return apply_linear(self, x, lambda rows: _Product.apply(rows, *weights), x.dtype)
