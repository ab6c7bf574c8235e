"""Trained weights multiplied in 8-bit floats: two of a layer's three products at twice the rate of bfloat16.

x Wᵀ and the gradient of x, g W, are rounded by about 4 % at random, as in `float8`; the gradient of the weights, gᵀ x,
stays bfloat16, so that what a step adds up is not rounded twice. The weights themselves, the optimiser and evaluation
know nothing of it.
"""

import types

import torch
from torch import Tensor, nn

from dream_lightning.adapters.float8 import apply_linear, check_float8, linear_layers, product, to_float8
from dream_lightning.kernels.gradient_accumulation import add_product


def train_in_float8(model: nn.Module, device: torch.device) -> None:
    """Let every linear layer but the head multiply in float8 while it trains; they keep class, names and weights.

    Raises:
        UserError: a GPU without float8; a layer's sizes are no multiples of 16.
    """
    check_float8(model, device)
    for _, linear in linear_layers(model):
        linear.forward = types.MethodType(_forward, linear)


class _Product(torch.autograd.Function):
    """x Wᵀ for x [M, in] and W [out, in], both bfloat16; W is rounded anew for each product and never kept.

    With a `total` the gradient of W is added to it, see `accumulation`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, total)
        return product(*to_float8(x), *to_float8(weight))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, total = ctx.saved_tensors
        columns, scales = to_float8(weight.t())
        of_weight = gradient.t() @ x if total is None else add_product(total, gradient, x)
        return product(*to_float8(gradient), columns.contiguous(), scales), of_weight, None


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """[..., in] → [..., out] in the dtype that the layer gives anyway."""
    if not self.training:
        return type(self).forward(self, x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    total = getattr(self, "gradient_sum", None)
    return apply_linear(self, x, lambda rows: _Product.apply(rows, self.weight.to(torch.bfloat16), total), dtype)
