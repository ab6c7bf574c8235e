"""Low-rank adapters (LoRA, arXiv:2106.09685) around linear layers, in PEFT's file format."""

import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dream_lightning.adapters.peft_folder import (
    PREFIX,
    Adapter,
    PeftFolder,
    adapted_layers,
    read_peft_folder,
    read_peft_weights,
)
from dream_lightning.errors import GuessKeywords, UserError, check_range

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraParams(metaclass=GuessKeywords):
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
    adapter: str | None = None
    """A folder or hub id of adapters that PEFT or `export --adapter true` saved, to start from. It sets the others."""

    def __post_init__(self) -> None:
        check_range("rank", self.rank, least=1, whole=True)
        check_range("alpha", self.alpha, least=1e-6)
        known = get_args(Target)
        listed = isinstance(self.targets, list | tuple | set) and set() < {*map(str, self.targets)} <= set(known)
        if not listed and self.targets != "all-linear":
            raise UserError(f"targets is {self.targets!r}: wanted all-linear, or a list of some of {', '.join(known)}")
        if self.adapter is not None:
            self._take_from_folder()

    def _take_from_folder(self) -> None:
        layers = self.folder.layers
        kinds = {layer.rpartition(".")[2] for layer in layers}
        if not kinds <= set(get_args(Target)):
            raise UserError(f"{self.adapter} adapts {', '.join(sorted(kinds))}, wanted some of {get_args(Target)}")
        found = {"rank": max(a.rank for a in layers.values()), "alpha": self.folder.config["lora_alpha"]}
        default = {"rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj"]}
        ours = {"rank": self.rank, "alpha": self.alpha, "targets": self.target_names}
        for name, value in (found | {"targets": sorted(kinds)}).items():
            if ours[name] not in (default[name], value):
                warnings.warn(
                    f"lora.{name} is {ours[name]}, but {value} in {self.adapter}: that is taken", stacklevel=3
                )
            object.__setattr__(self, name, value)

    @cached_property
    def folder(self) -> PeftFolder:
        """What `adapter` says."""
        return read_peft_folder(self.adapter)

    @cached_property
    def config(self) -> dict[str, Any]:
        """PEFT's fields that say what the adapters are; checkpoints hold them."""
        if self.adapter is not None:
            return self.folder.config
        return {"r": self.rank, "lora_alpha": self.alpha, "target_modules": self.target_names}

    @property
    def target_names(self) -> list[str]:
        return sorted(get_args(Target) if self.targets == "all-linear" else set(self.targets))


class LoraLinear(nn.Module):
    """A frozen linear layer, plain or quantized, with a float32 adapter that changes nothing at first."""

    def __init__(
        self, base_layer: nn.Linear, adapter: Adapter, generator: torch.Generator | None, device: torch.device
    ) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, adapter.scale
        options = {"bias": False, "device": device, "dtype": torch.float32}
        self.lora_A = skip_init(nn.Linear, base_layer.in_features, adapter.rank, **options)
        self.lora_B = skip_init(nn.Linear, adapter.rank, base_layer.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)
        a = torch.empty(self.lora_A.weight.shape, device="cpu")  # the same random numbers for every device
        self.lora_A.weight.data.copy_(nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator))
        self.lora_bias = None
        if adapter.has_bias:
            self.base_layer.bias = None
            self.lora_bias = nn.Parameter(torch.zeros(base_layer.out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)  # [..., out]
        if self.lora_bias is not None:
            out = out + self.lora_bias.to(out.dtype)
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
    if params.adapter is not None:
        add_trained_lora(model, params.config, read_peft_weights(params.folder), device=device)
        return
    layers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in params.target_names]
    if absent := set(params.target_names) - {name.rpartition(".")[2] for name in layers}:
        raise UserError(f"{type(model).__name__} has no {', '.join(sorted(absent))}: take them out of targets")
    _add(model, dict.fromkeys(layers, Adapter(params.rank, params.alpha / params.rank)), generator, device)


def add_trained_lora(
    model: nn.Module, config: dict[str, Any], state: dict[str, Tensor], *, device: torch.device | None = None
) -> None:
    """Add the adapters of a checkpoint or PEFT folder, as `add_lora`.

    Args:
        config: PEFT's fields, as in `LoraParams.config`.
        state: as `adapter_state` gives it.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    _add(model, adapted_layers(config, shapes, "the adapters"), None, device)
    load_adapter_state(model, state)


def _add(
    model: nn.Module,
    layers: dict[str, Adapter],
    generator: torch.Generator | None,
    device: torch.device | None,
) -> None:
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError("the model already has adapters: merge_lora them first, or load the base again")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if absent := sorted(layers.keys() - linears.keys()):
        raise UserError(f"the adapters are of another model: {type(model).__name__} has no {', '.join(absent[:4])}")
    model.requires_grad_(False)
    for name, adapter in layers.items():
        adapted = LoraLinear(linears[name], adapter, generator, device or linears[name].weight.device)
        model.set_submodule(name, adapted.train(linears[name].training))


def adapter_state(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a model's state dict, under the names of PEFT's files (`base_model.model.….lora_A.weight`)."""
    names = {name: f"{PREFIX}{name.replace('.lora_bias', '.base_layer.bias')}" for name in sorted(state_dict)}
    return {peft: state_dict[name].detach() for name, peft in names.items() if ".lora_" in name}


def model_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `adapter_state`: tensors under the names of the model's state dict."""
    return {n.removeprefix(PREFIX).replace(".base_layer.bias", ".lora_bias"): t for n, t in state.items()}


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
    model.load_state_dict(model_names(state), strict=False)


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
        if layer.lora_bias is not None:
            layer.base_layer.bias = nn.Parameter(layer.lora_bias.to(weight.dtype), requires_grad=False)
        model.set_submodule(name, layer.base_layer)


def trainable_summary(model: nn.Module) -> str:
    """How many parameters there are and how many train, also on the meta device and in packed 4-bit weights."""
    total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.4f} %)"
