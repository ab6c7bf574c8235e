"""Low-rank adapters through PEFT, injected in place: the model keeps its class, its layers gain a bypass."""

import copy
import math
import os
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from dream_lightning.adapters.float8 import Float8Linear
from dream_lightning.adapters.quantization import is_4bit
from dream_lightning.errors import UserError

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_NAME = "default"  # of the one adapter, as PEFT calls it


@dataclass(frozen=True)
class LoraParams:
    """Which layers get adapters, and of what kind: W x → W x + scale · B A x, A [rank, in], B [out, rank].

    Source: arXiv:2106.09685.

    Raises:
        UserError: a field is out of its range.
    """

    rank: int = 16
    """Rank of the change. Costs rank · (in + out) float32 parameters a layer."""
    alpha: float = 32
    """scale = alpha / rank."""
    dropout: float = 0.0
    """Probability of zeroing an element of the adapter's input in training."""
    targets: list[Target] | Literal["all-linear"] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Kinds of layers, in every decoder layer; `all-linear` is all seven kinds. The head never gets one."""
    rslora: bool = False
    """scale = alpha / sqrt(rank), so that large ranks learn as fast as small ones (arXiv:2312.03732)."""
    dora: bool = False
    """Train the length of each row of W + scale · B A separately (arXiv:2402.09353). Slower: every forward
    builds the changed weight to measure its rows, from a 4-bit base in full."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise UserError(f"rank is {self.rank!r}, it must be an integer of at least 1, such as 16")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"alpha is {self.alpha}, it must be finite and above 0, such as twice the rank")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}, it must be at least 0 and below 1")
        known = get_args(Target)
        if self.targets != "all-linear" and (
            isinstance(self.targets, str) or not self.targets or not set(self.targets) <= set(known)
        ):
            raise UserError(f"targets is {self.targets!r}: wanted all-linear, or a list of some of {', '.join(known)}")

    @property
    def target_names(self) -> list[str]:
        """The kinds of layers, `all-linear` written out."""
        return sorted(get_args(Target) if self.targets == "all-linear" else set(self.targets))

    def computes_as(self, other: "LoraParams") -> bool:
        """Whether weights trained with these serve those: all but the dropout is the same."""
        ours, theirs = ((p.rank, p.alpha, p.target_names, p.rslora, p.dora) for p in (self, other))
        return ours == theirs


def add_lora(
    model: nn.Module,
    params: LoraParams,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> None:
    """Put fresh float32 adapters into the model, which computes the same as before, and freeze all else.

    Works on float, bfloat16 and 4-bit bases, and on the meta device for counting (DoRA there only unquantised).

    Args:
        model: a DreamModel, or any PreTrainedModel with these layer names.
        generator: on the CPU, for A; the same one gives the same adapters on every device, dtype and rank.
        device: of the adapters, where the base has no memory yet; by default they have none then either.

    Raises:
        UserError: the model has adapters already, lacks a target, or has one that is smaller than the rank; DoRA on an
            empty 4-bit model, or with `device`.
    """
    if hasattr(model, "peft_config"):
        raise UserError("the model already has adapters: merge_lora them first, or load the base again")
    modules = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in params.target_names}
    if absent := [t for t in params.target_names if not any(name.endswith(f".{t}") for name in modules)]:
        raise UserError(f"{type(model).__name__} has no layers called {', '.join(absent)}: take them out of targets")
    if small := [n for n, m in modules.items() if params.rank > min(m.in_features, m.out_features)]:
        read, written = modules[small[0]].in_features, modules[small[0]].out_features
        raise UserError(
            f"rank is {params.rank}, and {small[0]} has {read:,} inputs and {written:,} outputs: no change of it has "
            f"more than rank {min(read, written)}, take that or less"
        )
    if params.dora and is_4bit(model) and any(p.is_meta for p in model.parameters()):
        raise UserError(
            "DoRA measures the base's rows, an empty 4-bit model has none: load_4bit first, or count unquantised"
        )
    if params.dora and device is not None:
        raise UserError("DoRA measures the base's rows, a base that is read later has none: set dora to false")
    scale = {"r": params.rank, "lora_alpha": params.alpha, "use_rslora": params.rslora}
    kind = {"lora_dropout": params.dropout, "target_modules": params.target_names, "use_dora": params.dora}
    training = model.training
    inject_adapter_in_model(LoraConfig(**scale, **kind), model, _NAME)
    for _, layer in _layers(model):
        _reset(layer, generator, device)
        if not (params.dropout or params.dora):
            layer.forward = types.MethodType(_forward, layer)
    model.train(training)


def _forward(self: LoraLayer, x: Tensor) -> Tensor:
    """W x + B (scale · A x) in the dtype of x; PEFT's own goes through a float32 copy of every x and every product."""
    out = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return out
    low = F.linear(x, self.lora_A[_NAME].weight.to(x.dtype))  # [..., rank]
    return out + F.linear(low, (self.lora_B[_NAME].weight * self.scaling[_NAME]).to(low.dtype)).to(out.dtype)


def _reset(layer: LoraLayer, generator: torch.Generator | None, device: torch.device | None) -> None:
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        part.float()  # PEFT takes over the base's dtype, and its device
        if device is not None:
            part.to_empty(device=device)
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight  # [rank, in], [out, rank]
    nn.init.zeros_(b)
    if a.is_meta:
        return
    with torch.no_grad():
        a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape, device="cpu"), a=math.sqrt(5), generator=generator))
    if layer.lora_magnitude_vector:  # again, in float32: lengths rounded to bfloat16 would change the model by 0.4 %
        layer.lora_magnitude_vector[_NAME].update_layer(
            base_layer=layer.get_base_layer(), lora_A=a.detach(), lora_B=b.detach(), scaling=layer.scaling[_NAME]
        )


def adapter_state(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters alone, under the names of PEFT's files (`base_model.model.….lora_A.weight`).

    Args:
        state_dict: the model's, where it was gathered elsewhere (from shards, from a checkpoint); may hold more.
    """
    if state_dict is None:
        state_dict = {name: p.detach() for name, p in model.named_parameters()}
    adapters = {name: tensor for name, tensor in state_dict.items() if ".lora_" in name}
    state = get_peft_model_state_dict(model, adapters, _NAME, save_embedding_layers=False)
    return {f"base_model.model.{name.removeprefix('base_model.model.')}": state[name] for name in sorted(state)}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put what `adapter_state` gave, or PEFT's `adapter_model.safetensors` holds, into the adapters of a model.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    wanted = {name: list(tensor.shape) for name, tensor in adapter_state(model).items()}
    got = {name: list(tensor.shape) for name, tensor in state.items()}
    if wrong := sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)):
        name = wrong[0]
        raise UserError(
            f"{len(wrong)} adapter tensors do not fit the model's adapters, such as {name}: got {got.get(name)}, "
            f"wanted {wanted.get(name)}. Use the rank, targets and dora with which they were trained"
        )
    set_peft_model_state_dict(model, state, _NAME)


def save_peft_folder(
    model: nn.Module, folder: str | Path, base_name: str, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads.

    Each file replaces an older one only once it is whole.

    Args:
        base_name: folder or hub id of the base, for the configuration.
        state_dict: as of `adapter_state`; the model itself may then be on the meta device.
    """
    part = Path(folder) / "part"
    part.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model, state_dict).items()}
    save_file(state, part / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config[_NAME])
    config.base_model_name_or_path, config.target_modules = base_name, sorted(config.target_modules)
    config.inference_mode = True
    config.save_pretrained(part)
    for file in part.iterdir():
        os.replace(file, Path(folder) / file.name)
    part.rmdir()


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the base's weights, in float32 with one rounding to the base's dtype, and remove them.

    Raises:
        UserError: the base is quantised; there are no adapters.
    """
    if is_4bit(model) or any(isinstance(layer.get_base_layer(), Float8Linear) for _, layer in _layers(model)):
        raise UserError(
            "adapters are not merged into a quantised base, its rounding would be kept: load the bfloat16 checkpoint, "
            "add_lora, load_adapter_state, and merge there"
        )
    if not hasattr(model, "peft_config"):
        raise UserError("the model has no adapters to merge: add_lora and load_adapter_state first")
    for name, layer in _layers(model):
        linear = layer.get_base_layer()
        dtype = linear.weight.dtype
        linear.weight.data = linear.weight.data.float()
        layer.merge(safe_merge=True)
        linear.weight.data = linear.weight.data.to(dtype)
        model.set_submodule(name, linear)
    del model.peft_config


def _layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
