"""Linear layers that multiply in 8-bit floats, at twice the rate of bfloat16 on Hopper and later GPUs.

A float8 number (e4m3) has 4 significant bits. Weights carry one scale per row, activations and gradients one scale per
token, so an outlier spoils only its own row. Rounding changes a product by about 4 % of its norm, at random; nf4 rounds
the weights alone by 9 %.

torchao's float8 is not used: its frozen weight has no backward pass to the input, which LoRA needs, and its training
layer computes the weight gradient itself, so that the gradient cannot be accumulated in place.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dream_lightning.errors import UserError

LARGEST = 448.0  # of e4m3


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [M, K] → float8 [M, K] and float32 scales [M, 1]; the largest element of a row becomes 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def float8_matmul(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """(a · scale_a)(b · scale_b)ᵀ: float8 [M, K], float32 [M, 1], float8 [N, K], float32 [N, 1] → bfloat16 [M, N]."""
    if not a.is_cuda:  # for tests
        return ((a.float() @ b.float().t()) * scale_a * scale_b.t()).to(torch.bfloat16)
    # Not the public F.scaled_mm: Dynamo of torch 2.11 cannot trace it.
    return torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


class _Product(torch.autograd.Function):
    """x Wᵀ of bfloat16 x [M, in] and, in the backward pass, g W by a layer's `product`; gᵀ x if W trains."""

    @staticmethod
    def forward(ctx, x: Tensor, product: Callable[..., Tensor], weight: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, *others)
        ctx.product = product
        return product(x, False, weight, *others)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_weight = None if x is None else gradient.t() @ x
        return ctx.product(gradient, True, *weights), None, of_weight, *(None for _ in weights[1:])


def linear_by_product(
    x: Tensor, product: Callable[..., Tensor], weights: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[..., in] → [..., out] in `dtype`, multiplied in bfloat16 or less.

    Args:
        product: maps (rows [M, in], False, *weights) to x Wᵀ [M, out], and (rows [M, out], True, *weights) to x W, for
            the backward pass; both bfloat16. Only the weights are kept in between.
    """
    with torch.autocast(x.device.type, enabled=False):
        out = _Product.apply(x.to(torch.bfloat16).flatten(0, -2), product, *weights)
        out = out if bias is None else out + bias.to(out.dtype)
    return out.unflatten(0, x.shape[:-1]).to(dtype)


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Names and modules of all plain linear layers except the head."""
    head = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head]


def check_float8(model: nn.Module, device: torch.device) -> None:
    """Raise UserError for a GPU without float8, and for layers whose sizes are no multiples of 16."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        gpu = torch.cuda.get_device_name(device)
        raise UserError(f"{gpu} has no float8 (Ada and Hopper have): leave it out, or set model.quantize to nf4")
    for name, linear in linear_layers(model):
        out, into = linear.weight.shape
        if out % 16 or into % 16:
            raise UserError(
                f"{name} is {out} × {into}, float8 needs multiples of 16: leave it out of the configuration"
            )


class Float8TrainingLinear(nn.Linear):
    """A trained layer with two of its three products in float8: x Wᵀ and g W.

    The weight gradient gᵀ x stays in bfloat16. Parameters and evaluation are those of `linear`, which it replaces.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        multiply = self.multiply if self.training else F.linear
        return multiply(x, self.weight, self.bias)

    @staticmethod
    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute as `F.linear`, in float8."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return linear_by_product(x, _round_both, [weight.to(torch.bfloat16)], bias, dtype)


def _round_both(x: Tensor, backward: bool, weight: Tensor) -> Tensor:
    weight, scales = to_float8(weight.t() if backward else weight)
    return float8_matmul(*to_float8(x), weight.contiguous(), scales)


def train_in_float8(model: nn.Module, device: torch.device) -> None:
    """Replace every plain linear layer except the head by a `Float8TrainingLinear`; raises as `check_float8`."""
    check_float8(model, device)
    for name, linear in linear_layers(model):
        model.set_submodule(name, Float8TrainingLinear(linear))
