"""The frozen base in 8-bit floats: matrix products at twice the rate of bfloat16 on Hopper and later GPUs.

A float8 number (e4m3) has 4 significant bits. Weights carry a scale a row, activations and gradients a scale a token:
one outlier spoils one row only. Every product is rounded by about 4 %, at random: less than nf4 rounds the weights.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dream_lightning.adapters.frozen import check_files, read_frozen
from dream_lightning.errors import UserError

LARGEST = 448.0  # of e4m3


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] → float8 [M, K] and float32 scales [M, 1], the largest of every row becoming 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """(a · scale_a)(b · scale_b)ᵀ: float8 [M, K], float32 [M, 1], float8 [N, K], float32 [N, 1] → [M, N] bfloat16.

    On GPUs summed by the matrix units; elsewhere in float32, for tests.
    """
    if a.is_cuda:
        return torch._scaled_mm(
            a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return ((a.float() @ b.float().t()) * scale_a * scale_b.t()).to(torch.bfloat16)


def apply_linear(linear: nn.Linear, x: Tensor, multiply: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """[..., in] → [..., out] in `dtype`, where `multiply` takes rows [M, in] to x Wᵀ [M, out], both bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        out = multiply(x.to(torch.bfloat16).flatten(0, -2))
        out = out if linear.bias is None else out + linear.bias.to(out.dtype)
    return out.view(*x.shape[:-1], linear.out_features).to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ and, in the backward pass, g W; the matrix units want W along the summed axis, so it is held both ways."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor) -> Tensor:
        ctx.save_for_backward(columns, column_scales)
        return product(*to_float8(x), rows, row_scales)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return product(*to_float8(gradient), *ctx.saved_tensors), None, None, None, None


class Float8Linear(nn.Linear):
    """A frozen linear layer; takes 2 bytes a weight, like bfloat16, because it holds W and Wᵀ."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.requires_grad_(False)
        for name, shape in (("row_scales", out_features), ("column_scales", in_features)):
            self.register_buffer(name, torch.empty(shape, 1, device="meta"), persistent=False)
        self.register_buffer("columns", torch.empty(in_features, out_features, device="meta"), persistent=False)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Take over a weight [out, in]."""
        rows, self.row_scales = to_float8(weight)
        self.columns, self.column_scales = to_float8(weight.t())
        self.columns = self.columns.contiguous()
        self.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out] in the dtype of x."""
        weights = (self.weight, self.row_scales, self.columns, self.column_scales)
        return apply_linear(self, x, lambda rows: _Product.apply(rows, *weights), x.dtype)


def load_float8(model: nn.Module, files: dict[str, Path], *, device: torch.device | str = "cpu") -> None:
    """Fill a model on the meta device from safetensors, its layers in float8, all else in bfloat16, everything frozen.

    Args:
        model: a DreamModel on the meta device.
        files: tensor name → file, as `dream_lightning.model.loading.weight_files` finds them.
        device: where the weights go.

    Raises:
        UserError: `files` lacks tensors of the model; a layer's sizes are no multiples of 16; a GPU without float8.
    """
    device = torch.device(device)
    check_float8(model, device)
    check_files(model, files)
    for name, linear in linear_layers(model):
        model.set_submodule(name, Float8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None))
    read_frozen(model, files, device=device, kind=Float8Linear, quantize=Float8Linear.fill)


def check_float8(model: nn.Module, device: torch.device) -> None:
    """Refuse a model, before it is loaded, whose layers cannot be multiplied in float8 on this device.

    Raises:
        UserError: a GPU without float8; a layer's sizes are no multiples of 16.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has no 8-bit floats (Ada, Hopper and later have): leave "
            "model.float8_products out, and set model.quantize to nf4 or leave it out"
        )
    for name, linear in linear_layers(model):
        if linear.in_features % 16 or linear.out_features % 16:
            raise UserError(
                f"{name} is {linear.out_features} × {linear.in_features}: float8 products need multiples of 16; "
                "leave model.quantize and model.float8_products out"
            )


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those that are multiplied in float8: all plain ones but the head."""
    head = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head]
