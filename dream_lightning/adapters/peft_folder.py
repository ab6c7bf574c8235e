"""PEFT's folders of adapters: which layers have one, of which rank and scale.

What would be another network than Dream with LoRA on linear layers is refused by name.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dream_lightning.errors import UserError, check_range, reading
from dream_lightning.model.loading import check_finite, local_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in PEFT's files
_BIAS = ".base_layer.bias"
# What is read of CONFIG, and PEFT's default.
_READ = {
    **{"r": 8, "lora_alpha": 8, "target_modules": None, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}},
    **{"bias": "none", "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None},
}
# Fields that do not change the network. Any other must be unset: null, false or empty.
_WITHOUT_EFFECT = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "peft_type",
        "peft_version",
        "inference_mode",
    ),
    *("lora_dropout", "fan_in_fan_out", "megatron_core", "runtime_config", "qalora_group_size", "init_lora_weights"),
)


class Adapter(NamedTuple):
    """Of one layer: W x + bias → W x + bias + scale · B A x, A [rank, in]."""

    rank: int
    scale: float
    has_bias: bool = False  # of its own, which replaces the layer's


class PeftFolder(NamedTuple):
    """What a folder of adapters says, without its tensors."""

    path: Path
    config: dict[str, Any]  # the fields of `_READ` that are set
    layers: dict[str, Adapter]
    base: dict[str, str]  # `name` of the base, and `hash` if this package wrote it


def is_peft_folder(path: Path) -> bool:
    """Whether it is a folder of adapters, or the file of weights in one."""
    return path.name == WEIGHTS or (path / CONFIG).is_file()


def read_peft_folder(folder_or_hub_id: str | Path) -> PeftFolder:
    """Read `adapter_config.json` and the names in `adapter_model.safetensors`.

    Raises:
        UserError: no such folder; a file is missing or damaged; the adapters are no LoRA of Dream's linear layers.
    """
    path = local_folder(folder_or_hub_id, files=(CONFIG, WEIGHTS))
    for file in (path / CONFIG, path / WEIGHTS):
        if not file.is_file():
            raise UserError(f"{path} has no {file.name}, wanted a folder that PEFT saved, with {CONFIG} and {WEIGHTS}")
    with reading(path / CONFIG, "PEFT's JSON object"):
        fields = json.loads((path / CONFIG).read_text("utf-8")).items()
        fields = {name: value for name, value in fields if value or name in ("r", "lora_alpha")}
        if (kind := fields.get("peft_type")) != "LORA":
            raise UserError(f"{path / CONFIG}: peft_type is {kind}, wanted LORA")
        odd = sorted(fields.keys() - _READ.keys() - set(_WITHOUT_EFFECT))
        if (start := fields.get("init_lora_weights", True)) not in (True, "gaussian", "orthogonal"):
            odd.append(f"init_lora_weights {start}, which changes the base")
        if (bias := fields.get("bias", "none")) not in ("none", "lora_only"):
            odd.append(f"bias {bias}")
        if odd:
            raise UserError(f"{path / CONFIG} has {', '.join(odd)}: not supported, as it makes another network")
        config = {name: _READ[name] for name in ("r", "lora_alpha")}
        config |= {name: value for name, value in fields.items() if value != _READ.get(name, value)}
        if isinstance(targets := config.get("target_modules"), list):
            config["target_modules"] = sorted(targets)
    with reading(path / WEIGHTS, "a whole safetensors file"), safe_open(path / WEIGHTS, framework="pt") as file:
        shapes = {_renamed(name): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        base_hash = (file.metadata() or {}).get("base_hash")
    with reading(path / CONFIG, "PEFT's JSON object"):
        layers = adapted_layers(config, shapes, path)
    if config.pop("exclude_modules", None):  # PEFT 0.13 does not know it
        config["target_modules"] = sorted(layers)
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    name = f"{name}@{revision}" if name and revision and not Path(name).exists() else name
    base = {"name": name, "hash": base_hash}
    return PeftFolder(path, config, layers, {name: text for name, text in base.items() if text})


def read_peft_weights(folder: PeftFolder) -> dict[str, Tensor]:
    """The tensors, under the names of `lora.adapter_state`."""
    file = folder.path / WEIGHTS
    with reading(file, "a whole safetensors file"), safe_open(file, framework="pt") as opened:
        state = {_renamed(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, tensor in state.items():
        check_finite(name, tensor, file)
    return state


def adapted_layers(config: dict[str, Any], shapes: dict[str, Sequence[int]], where: str | Path) -> dict[str, Adapter]:
    """Layer name → its adapter, from PEFT's fields and the names and shapes of its tensors.

    Raises:
        UserError: tensors that belong to no adapter of a linear layer, or do not fit the fields.
    """
    config, layers = _READ | config, {}
    for name, shape in shapes.items():
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_A.weight")
        if part or not name.endswith(".lora_A.weight"):
            continue
        rank = _matching(config["rank_pattern"], layer, config["r"])
        alpha = _matching(config["alpha_pattern"], layer, config["lora_alpha"])
        for field, value, limits in (("r", rank, {"least": 1, "whole": True}), ("lora_alpha", alpha, {})):
            if value is None:
                raise UserError(f"{where}: {field} of {layer} is null, wanted a number")
            check_range(f"{where}: {field} of {layer}", value, **limits)
        if rank != shape[0]:
            raise UserError(f"{where}: {name} has rank {shape[0]}, {CONFIG} says {rank}: copy both files again")
        if not _targeted(config["target_modules"], layer):
            raise UserError(f"{where}: {CONFIG} has no target_modules for {name}: copy both files again")
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        layers[layer] = Adapter(rank, scale, f"{PREFIX}{layer}{_BIAS}" in shapes and config["bias"] == "lora_only")
    known = {
        f"{PREFIX}{layer}{part}"
        for layer, adapter in layers.items()
        for part in (".lora_A.weight", ".lora_B.weight", *([_BIAS] if adapter.has_bias else ()))
    }
    if odd := sorted(known ^ shapes.keys()):
        raise UserError(
            f"{where}: {len(odd)} tensors are no adapters of linear layers or are missing, such as {odd[0]}"
        )
    if not layers:
        raise UserError(f"{where} holds no adapters")
    return layers


def save_peft_folder(
    folder: str | Path, state: dict[str, Tensor], config: dict[str, Any], base: dict[str, str]
) -> None:
    """Write the two files, which `PeftModel.from_pretrained` loads, of PEFT 0.13 too: only fields that are set.

    `state` is that of `lora.adapter_state`, `config` that of `LoraParams.config`, `base` has the `name`, a folder or
    hub id, and perhaps the `hash`. `export.export_adapter` writes atomically.
    """
    name, _, revision = (base["name"], "", "") if Path(base["name"]).exists() else base["name"].partition("@")
    fields = {"base_model_name_or_path": name, "bias": "none", "peft_type": "LORA"} | config
    fields |= {"revision": revision} if revision else {}
    Path(folder).mkdir(exist_ok=True)
    metadata = {"format": "pt"} | ({"base_hash": base["hash"]} if "hash" in base else {})
    save_file({n: t.cpu().contiguous() for n, t in state.items()}, Path(folder, WEIGHTS), metadata=metadata)
    Path(folder, CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _renamed(name: str) -> str:
    """Older versions of PEFT name a layer's bias without `base_layer`."""
    return name if name.endswith(_BIAS) or not name.endswith(".bias") else f"{name.removesuffix('.bias')}{_BIAS}"


def _matching(pattern: dict[str, Any], layer: str, default: Any) -> Any:
    """As PEFT finds it: the first key that is the end of the layer's name, or a regular expression for it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _targeted(targets: str | list[str] | None, layer: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, layer) is not None
    return targets is None or any(layer == target or layer.endswith(f".{target}") for target in targets)
