"""A frozen base read from its files, every layer quantised as it comes."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dream_lightning.errors import UserError


def check_files(model: nn.Module, files: dict[str, Path]) -> None:
    """Refuse files that lack a tensor of the model.

    Raises:
        UserError: naming the first.
    """
    if lacking := sorted({name for name, _ in model.named_parameters()} - files.keys()):
        raise UserError(f"the files lack {len(lacking)} of the model's tensors, {lacking[0]} first: copy them again")


def read_frozen(
    model: nn.Module,
    files: dict[str, Path],
    *,
    device: torch.device,
    kind: type[nn.Linear],
    quantize: Callable[[nn.Linear, Tensor], None],
) -> None:
    """Fill a model on the meta device, tensor by tensor in bfloat16; the host holds one at a time.

    Args:
        files: tensor name → safetensors file.
        kind: of the layers whose weights are quantised.
        quantize: (layer, its weight in bfloat16 on the device) puts the quantised weight into the layer.
    """
    for name in sorted((name for name, _ in model.named_parameters()), key=lambda n: (str(files[n]), n)):
        # Opened for each tensor, because pages of a mapped file count as this process's memory until it is closed.
        with safe_open(files[name], framework="pt", device=str(device)) as file:
            tensor = file.get_tensor(name).to(torch.bfloat16)
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, kind) and attribute == "weight":
            quantize(module, tensor)
        else:
            if device.type == "cpu":
                tensor = tensor.clone()  # otherwise it may be the mapped file itself
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
