"""The frozen base under adapters, quantized while it is read: 4-bit nf4 (QLoRA, arXiv:2305.14314) or float8."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from dream_lightning.adapters.float8_linear import (
    LARGEST,
    check_float8,
    float8_matmul,
    linear_by_product,
    linear_layers,
    to_float8,
)
from dream_lightning.errors import UserError
from dream_lightning.model.loading import check_finite

Quantize = Literal["nf4", "nf4_float8", "float8"]
BLOCK, _SUPERBLOCK = 64, 256  # weights that share a scale, scales that share a scale of their own
_INTEGERS = {torch.bfloat16: (torch.int16, torch.int32), torch.float8_e4m3fn: (torch.uint8, torch.int16)}  # of 1, of 2


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of the sizes of `linear`, on the meta device until a weight is quantized into it.

    Subclasses define `fill(weight)`, which quantizes a bfloat16 weight [out, in] on its device, and `product`, as
    `linear_by_product` calls it. The quantized weight is a parameter and what else the product needs are buffers: as
    inputs of compiled code, which all layers then share.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.requires_grad_(False)

    def keep(self, weight: Tensor, **buffers: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def quantized(self) -> list[Tensor]:
        """The last arguments of `product`."""
        return [self.weight, *self._buffers.values()]

    def forward(self, x: Tensor) -> Tensor:
        return linear_by_product(x, type(self).product, self.quantized(), self.bias, x.dtype)


class Float8Linear(QuantizedLinear):
    """A float8 weight, W and Wᵀ: the matrix units read it along the summed axis. 2 bytes a weight, as bfloat16."""

    def fill(self, weight: Tensor) -> None:
        rows, row_scales = to_float8(weight)
        columns, column_scales = to_float8(weight.t())
        self.keep(rows, row_scales=row_scales, columns=columns.contiguous(), column_scales=column_scales)

    @staticmethod
    def product(x: Tensor, backward: bool, *quantized: Tensor) -> Tensor:
        return float8_matmul(*to_float8(x), *(quantized[2:] if backward else quantized[:2]))


class NF4Linear(QuantizedLinear):
    """A weight in nf4 with doubly quantized block scales, 4.127 bits a weight; computes in bfloat16.

    The weight is bitsandbytes' own. Compiled code dequantizes it with `dequantize`, in the kernel before the product;
    eager code calls bitsandbytes, whose custom operations are closed to the compiler.
    """

    def fill(self, weight: Tensor) -> None:
        if self.in_features % BLOCK:  # bitsandbytes' CPU kernels would dequantize it wrongly
            raise UserError(
                f"a layer has {self.in_features} inputs: nf4 needs multiples of {BLOCK}, leave quantize out"
            )
        functional = _bitsandbytes().functional
        packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        self.keep(
            packed,  # [out · in / 2, 1] uint8
            levels=state.code,  # [16] float32
            scale_codes=state.absmax,  # [C] uint8, one per block
            scale_levels=state.state2.code,  # [256] float32
            superscales=state.state2.absmax,  # [C / 256] float32
            offset=state.offset,  # [] float32, the mean of the scales
        )

    @staticmethod
    def product(x: Tensor, backward: bool, *quantized: Tensor) -> Tensor:
        weight = dequantize(*quantized, again=backward)
        return x @ weight.view(x.shape[-1], -1) if backward else F.linear(x, weight.view(-1, x.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(torch.bfloat16)
            return _bitsandbytes().matmul_4bit(h, self.weight, self._state(), bias=self.bias).to(x.dtype)

    def dequantized_weight(self) -> Tensor:
        """W [out, in] in bfloat16."""
        return _bitsandbytes().functional.dequantize_4bit(self.weight, self._state())

    def _state(self) -> Any:
        """The second argument of bitsandbytes' functions, next to the packed weight."""
        make, shape = _bitsandbytes().functional.QuantState, torch.Size((self.out_features, self.in_features))
        scales = make(self.superscales, code=self.scale_levels, blocksize=_SUPERBLOCK, dtype=torch.float32)
        return make(self.scale_codes, shape, self.levels, BLOCK, "nf4", torch.bfloat16, self.offset, scales)


class NF4Float8Linear(NF4Linear):
    """A weight in nf4 that is multiplied in float8, compiled or not, in evaluation too: nearly the speed of float8.

    One float8 scale a matrix suffices: the largest weight becomes 448, and e4m3 keeps 4 significant bits down to 2^-6,
    so a weight has them from 1/28,000 of the largest on. This rounding, 2.6 % of the norm, is less than a third of
    nf4's own.
    """

    def fill(self, weight: Tensor) -> None:
        super().fill(weight)
        scales = block_scales(self.scale_codes, self.scale_levels, self.superscales, self.offset)
        scale = (scales.abs().amax() / LARGEST).clamp(min=1e-12)  # a level is at most 1
        self.keep(
            self.weight.data,
            float8_superscales=self.superscales / scale,
            float8_offset=self.offset / scale,
            # Repeated for every row of W or of Wᵀ, as the product reads it: 8 MB at 7B.
            weight_scales=scale.expand(max(self.in_features, self.out_features), 1).contiguous(),
        )

    def quantized(self) -> list[Tensor]:
        """With scales that make 448 of the largest weight."""
        scales = [self.scale_codes, self.scale_levels, self.float8_superscales, self.float8_offset]
        return [self.weight, self.levels, *scales, self.weight_scales]

    @staticmethod
    def product(x: Tensor, backward: bool, *quantized: Tensor) -> Tensor:
        *nf4, scales = quantized
        weight = dequantize(*nf4, dtype=torch.float8_e4m3fn, again=backward)
        # The matrix units read W along the summed axis.
        weight = weight.view(x.shape[-1], -1).t().contiguous() if backward else weight.view(-1, x.shape[-1])
        return float8_matmul(*to_float8(x), weight, scales[: len(weight)])

    forward = QuantizedLinear.forward


def block_scales(
    scale_codes: Tensor, scale_levels: Tensor, superscales: Tensor, offset: Tensor, *, again: bool = False
) -> Tensor:
    """The scale of every nf4 block, [C, 1] float32; see `dequantize`."""
    shape = (-1, 1) if again else (-1,)
    superblock = torch.arange(len(scale_codes), device=scale_codes.device).view(shape) // _SUPERBLOCK
    return (scale_levels[scale_codes.view(shape).int()] * superscales[superblock] + offset).view(-1, 1)


def dequantize(
    packed: Tensor, levels: Tensor, *scales: Tensor, dtype: torch.dtype = torch.bfloat16, again: bool = False
) -> Tensor:
    """Dequantize nf4, two weights a byte, the first in the high half → all weights, [N].

    In bfloat16 the result equals bitsandbytes' bit for bit. Every byte becomes one word of two weights, so that its
    scale is looked up once.

    Args:
        packed: N / 2 elements, uint8.
        levels: [16] float32.
        scales: the arguments of `block_scales`.
        dtype: of the weights, bfloat16 or float8_e4m3fn.
        again: the second time in a compiled graph. The same numbers by products written in another order: if they were
            written alike, the compiler would find them equal and keep dequantized weights until the backward pass.
    """
    scale = block_scales(*scales, again=again)  # [C, 1]
    packed = packed.view(-1, BLOCK // 2)  # [C, 32]
    one, two = _INTEGERS[dtype]
    width = 8 * dtype.itemsize

    def bits(code: Tensor) -> Tensor:
        level = levels[code.int()]
        weight = (scale * level if again else level * scale).to(dtype)
        return weight.view(one).to(two)

    first, second = bits(packed >> 4), bits(packed & 15)
    words = (first & (1 << width) - 1) | (second << width)  # little-endian: the first weight is the low half
    return words.view(-1).view(dtype)


_LAYERS: dict[str, type[QuantizedLinear]] = {"nf4": NF4Linear, "nf4_float8": NF4Float8Linear, "float8": Float8Linear}


def load_quantized(
    model: nn.Module, files: dict[str, Path], *, kind: Quantize, device: torch.device | str = "cpu"
) -> None:
    """Fill a model on the meta device from safetensors with quantized layers; everything is frozen.

    Tensor by tensor: beyond the result, the host holds one tensor (at most 1.02 GiB for Dream 7B, the head) and the
    device one bfloat16 weight. Embeddings, head, norms and biases become bfloat16. Dream 7B takes 5.2 GiB in nf4.

    Args:
        model: a DreamModel on the meta device, without adapters.
        files: tensor name → file, as `dream_lightning.model.loading.weight_files` finds them.
        kind: `nf4`, `nf4_float8` (nf4 weights, float8 products) or `float8`; quantized on the device.

    Raises:
        UserError: bitsandbytes is not installed; NaN; sizes or a GPU that the kind has no kernels for.
    """
    device = torch.device(device)
    if kind != "nf4":
        check_float8(model, device)
    if kind != "float8":
        _bitsandbytes()
    for name, linear in linear_layers(model):
        model.set_submodule(name, _LAYERS[kind](linear))
    for name in [name for name, _ in model.named_parameters()]:
        # Opened for each tensor: pages of a mapped file count as memory of this process until it is closed.
        with safe_open(files[name], framework="pt", device=str(device)) as file:
            # On the CPU the tensor may be the mapped file itself.
            tensor = file.get_tensor(name).to(torch.bfloat16, copy=device.type == "cpu")
            check_finite(name, tensor, files[name])
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, QuantizedLinear) and attribute == "weight":
            module.fill(tensor)
        else:
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Inside, 4-bit layers are bfloat16 layers of the same values, so that a forward does not dequantize them.

    Costs 2 bytes a weight, 13 GB for Dream 7B. For generation; do not train inside. Adapters stay as they are.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    try:
        for name, module in packed.items():
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(module.dequantized_weight(), requires_grad=False), module.bias
            model.set_submodule(name, plain.train(module.training))
        yield
    finally:
        for name, module in packed.items():
            model.set_submodule(name, module)


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"nf4 needs bitsandbytes: pip install bitsandbytes, or leave quantize out ({error})") from error
    return bitsandbytes
