"""The frozen base under adapters: into 4 bits while it is read, and its size beside theirs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from dream_lightning.adapters.dequantization import compile_with_layer
from dream_lightning.adapters.float8 import check_float8
from dream_lightning.adapters.frozen import check_files, read_frozen
from dream_lightning.adapters.nf4_float8 import multiply_in_float8
from dream_lightning.errors import UserError


def quantize_layers(model: nn.Module) -> None:
    """Replace every `nn.Linear` except the head by an empty 4-bit one on the meta device.

    NF4 with doubly quantised block scales, 4.127 bits a weight, and bfloat16 arithmetic (QLoRA, arXiv:2305.14314).
    Enough for counting; `load_4bit` also fills the layers.

    Args:
        model: a PreTrainedModel on the meta device, such as a DreamModel.

    Raises:
        UserError: bitsandbytes is not installed; the model is not on the meta device, or has adapters already.
    """
    bnb = _bitsandbytes()
    if any(not p.is_meta for p in model.parameters()):
        raise UserError(
            'the model already has memory: wanted one on the meta device (with torch.device("meta"): DreamModel(...)), '
            "because its weights go straight from the files into 4 bits"
        )
    if hasattr(model, "peft_config"):
        raise UserError("the model already has adapters: quantise first, then add_lora")
    head = model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or linear is head:
            continue
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        # On processors with AVX512-BF16, bitsandbytes would repack a weight at the first forward without gradients,
        # with its scales rounded to bfloat16. Training after a validation would then get no gradients through it.
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(name, packed)
    model.to(torch.bfloat16).requires_grad_(False)
    model.is_loaded_in_4bit = True  # where PEFT and transformers look


def load_4bit(
    model: nn.Module, files: dict[str, Path], *, device: torch.device | str = "cpu", float8_products: bool = False
) -> None:
    """Fill a model on the meta device from safetensors, its layers in 4 bits; everything is frozen.

    Goes tensor by tensor: beyond the result, the host holds one tensor (at most 1.02 GiB for Dream 7B, the head) and
    the device one weight in bfloat16. Embeddings, head, norms and biases become bfloat16. The result occupies 5.2 GiB
    for Dream 7B. Into host memory, where quantising makes float32 copies, loading peaks at 6.2 to 7.0 GiB in all.
    transformers' own 4-bit loading keeps the files mapped: 2.1 against 1.1 GiB for a checkpoint of 1.6 GiB.

    Args:
        model: a DreamModel on the meta device.
        files: tensor name → file, as `dream_lightning.model.loading.weight_files` finds them.
        device: where the weights go and are quantised.
        float8_products: multiply in 8-bit floats instead of bfloat16, see `nf4_float8`.

    Raises:
        UserError: as `quantize_layers`; `files` lacks tensors of the model; as `check_float8` with float8 products.
    """
    device = torch.device(device)
    if float8_products:
        check_float8(model, device)
    check_files(model, files)
    quantize_layers(model)
    bnb, set_up = _bitsandbytes(), multiply_in_float8 if float8_products else compile_with_layer

    def quantize(layer: nn.Linear, weight: torch.Tensor) -> None:
        packed = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=layer)
        layer.weight = packed.to(device)
        set_up(layer)

    read_frozen(model, files, device=device, kind=bnb.nn.Linear4bit, quantize=quantize)


@contextmanager
def held_in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Inside, 4-bit layers are bfloat16 ones of the same values, so that a forward need not unpack them.

    Costs 2 bytes a weight, 13 GB for Dream 7B. For generation where there is room: bitsandbytes unpacks every weight at
    every forward of more than one token. Do not train inside. Adapters stay as they are.

    Raises:
        UserError: the model has no 4-bit layers.
    """
    bnb = _bitsandbytes()
    packed = {n: module for n, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if not packed:
        raise UserError("the model has no 4-bit layers: there is nothing to unpack")
    try:
        for name, module in packed.items():
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
            plain.bias = module.bias
            plain.train(module.training)
            model.set_submodule(name, plain)
        yield
    finally:
        for name, module in packed.items():
            model.set_submodule(name, module)


def is_4bit(model: nn.Module) -> bool:
    """Whether `load_4bit` or `quantize_layers` made this model's layers."""
    return getattr(model, "is_loaded_in_4bit", False)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; a packed 4-bit weight counts all its elements."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.4f} %)"


def trainable_summary(model: nn.Module) -> ParameterCount:
    """How many parameters there are and how many train; also on the meta device."""
    trainable = total = 0
    for p in model.parameters():
        packed = getattr(p, "quant_state", None)
        size = p.numel() if packed is None else math.prod(packed.shape)
        total, trainable = total + size, trainable + size * p.requires_grad
    return ParameterCount(trainable, total)


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"a 4-bit base was asked for, but bitsandbytes cannot be imported ({error}): pip install bitsandbytes, or "
            "leave quantize out and train adapters on the bfloat16 base"
        ) from error
    return bitsandbytes
