"""Low-rank adapters (LoRA, arXiv:2106.09685) around linear layers, in PEFT's file format."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dream_lightning.errors import UserError

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PREFIX = "base_model.model."  # of names in PEFT's files


@dataclass(frozen=True)
class LoraParams:
    """Which layers get adapters: W x → W x + alpha / rank · B A x, A [rank, in], B [out, rank].

    Raises:
        UserError: a field is out of its range.
    """

    rank: int = 16
    """Rank of the change. Costs rank · (in + out) float32 parameters a layer."""
    alpha: float = 32
    """The change is multiplied by alpha / rank."""
    targets: list[Target] | Literal["all-linear"] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Kinds of layers, in every decoder layer; `all-linear` is all seven kinds. The head never gets one."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"rank is {self.rank!r}, it must be an integer of at least 1, such as 16")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"alpha is {self.alpha}, it must be finite and above 0, such as twice the rank")
        known = get_args(Target)
        listed = not isinstance(self.targets, str) and set() < set(self.targets) <= set(known)
        if not listed and self.targets != "all-linear":
            raise UserError(f"targets is {self.targets!r}: wanted all-linear, or a list of some of {', '.join(known)}")

    @property
    def target_names(self) -> list[str]:
        return sorted(get_args(Target) if self.targets == "all-linear" else set(self.targets))


class LoraLinear(nn.Module):
    """A frozen linear layer, plain or quantized, with a float32 adapter that changes nothing at first."""

    def __init__(
        self, base_layer: nn.Linear, params: LoraParams, generator: torch.Generator | None, device: torch.device
    ) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, params.alpha / params.rank
        options = {"bias": False, "device": device, "dtype": torch.float32}
        self.lora_A = skip_init(nn.Linear, base_layer.in_features, params.rank, **options)
        self.lora_B = skip_init(nn.Linear, params.rank, base_layer.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)
        a = torch.empty(self.lora_A.weight.shape, device="cpu")  # the same random numbers for every device
        self.lora_A.weight.data.copy_(nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)  # [..., out]
        low = F.linear(x, self.lora_A.weight.to(x.dtype))  # [..., rank]
        return out + F.linear(low, (self.lora_B.weight * self.scale).to(low.dtype)).to(out.dtype)


def add_lora(
    model: nn.Module,
    params: LoraParams,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> None:
    """Add float32 adapters to the model, whose output does not change, and freeze everything else.

    Works on float32, bfloat16 and quantized bases, and on the meta device for counting.

    Args:
        model: a DreamModel, or any module with these layer names.
        generator: on the CPU; the same one gives the same adapters on every device and for every dtype.
        device: of the adapters; by default that of the base.

    Raises:
        UserError: the model has adapters already, or lacks a target.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError("the model already has adapters: merge_lora them first, or load the base again")
    layers = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in params.target_names}
    if absent := set(params.target_names) - {name.rpartition(".")[2] for name in layers}:
        raise UserError(f"{type(model).__name__} has no {', '.join(sorted(absent))}: take them out of targets")
    model.requires_grad_(False)
    for name, linear in layers.items():
        adapted = LoraLinear(linear, params, generator, device or linear.weight.device)
        model.set_submodule(name, adapted.train(linear.training))


def adapter_state(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a model's state dict, under the names of PEFT's files (`base_model.model.….lora_A.weight`)."""
    return {f"{_PREFIX}{name}": state_dict[name].detach() for name in sorted(state_dict) if ".lora_" in name}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy what `adapter_state` gave, or PEFT's `adapter_model.safetensors` holds, into the adapters of a model.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    wanted = {name: list(tensor.shape) for name, tensor in adapter_state(model.state_dict()).items()}
    got = {name: list(tensor.shape) for name, tensor in state.items()}
    if wrong := sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)):
        raise UserError(
            f"{len(wrong)} tensors do not fit the model's adapters, such as {wrong[0]}: got {got.get(wrong[0])}, "
            f"wanted {wanted.get(wrong[0])}. Use the rank and targets of their training"
        )
    model.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}, strict=False)


def save_peft_folder(folder: str | Path, state: dict[str, Tensor], params: LoraParams, base_name: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads.

    `state` is that of `adapter_state`, `base_name` a folder or hub id. `export.export_adapter` writes atomically.
    """
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "lora_alpha": params.alpha,
        "peft_type": "LORA",
        "r": params.rank,
        "target_modules": params.target_names,
    }
    Path(folder).mkdir(exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the base's weights, in float32 with one rounding to the base's dtype, and remove them.

    Raises:
        UserError: the base is quantized; there are no adapters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not layers:
        raise UserError("the model has no adapters to merge: add_lora and load_adapter_state first")
    if any(type(layer.base_layer) is not nn.Linear for layer in layers.values()):
        raise UserError("adapters do not merge into a quantized base: load the bfloat16 checkpoint and merge there")
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        weight.copy_(weight.float() + layer.scale * (layer.lora_B.weight @ layer.lora_A.weight))
        model.set_submodule(name, layer.base_layer)


def trainable_summary(model: nn.Module) -> str:
    """How many parameters there are and how many train, also on the meta device and in packed 4-bit weights."""
    total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.4f} %)"
