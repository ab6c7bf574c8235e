"""The gradient of a weight, added to the sum over a step's micro-batches by the product that makes it.

Autograd would write every gradient, read it and the sum again, and write the sum: 46 GB a micro-batch for 7 B bfloat16
weights, 15 ms on an H100. In one product the sum is read and written once, and rounded once instead of twice.
"""

import types
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dream_lightning.adapters.float8 import linear_layers


def accumulate_in_products(model: nn.Module) -> None:
    """Let every linear layer but the head add up its weight's gradient in place, until `accumulate_by_autograd`.

    These gradients are then there all the time, and a sum begins with `zero_gradients`. The weights' hooks are not
    called, so this is not for DDP and FSDP. Call it where the model will stay.
    """
    for _, linear in linear_layers(model):
        linear.weight.grad = torch.zeros_like(linear.weight)
        # As a buffer it is an input of compiled code, which layers share.
        linear.register_buffer("gradient_sum", linear.weight.grad, persistent=False)
        if "forward" not in vars(linear):  # that of `float8_training` knows what to do
            linear.forward = types.MethodType(_forward, linear)


def accumulate_by_autograd(model: nn.Module) -> None:
    """Take back `accumulate_in_products`, and forget the sums."""
    for _, linear in linear_layers(model):
        if "gradient_sum" in linear._buffers:
            linear.weight.grad = None
            del linear.gradient_sum
            if linear.forward.__func__ is _forward:
                del linear.forward


def zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Begin a new sum; also between a forward and its backward pass, which do not look at the old one."""
    # `data` has a version of its own: what autograd holds for the backward pass has not changed in its eyes.
    torch._foreach_zero_([p.grad.data for p in parameters if p.grad is not None])


@torch.library.custom_op("dream_lightning::add_product", mutates_args=("total",))
def add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total [out, in] += gradient [M, out]ᵀ x [M, in]; a custom operation is what compiled code may call in place."""
    total.addmm_(gradient.t(), x)


@add_product.register_fake
def _(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    pass


class _Product(torch.autograd.Function):
    """x Wᵀ + b; the gradient of W goes into `total`, and autograd gets none."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, total)
        ctx.has_bias = bias is not None
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, total = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        add_product(total, rows, x.flatten(0, -2))
        return gradient @ weight, None, rows.sum(0) if ctx.has_bias else None, None


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    if not (self.training and torch.is_grad_enabled()):
        return type(self).forward(self, x)
    return _Product.apply(x.to(self.weight.dtype), self.weight, self.bias, self.gradient_sum)
