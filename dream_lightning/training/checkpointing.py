"""Checkpoint files: written atomically, never of a diverged run, and refused by a model that they do not fit."""

import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dream_lightning.adapters import check_base, is_peft_folder
from dream_lightning.atomic import atomic_write
from dream_lightning.errors import UserError, reading

# The fields of DreamConfig that must agree between a checkpoint and the model.
_NETWORK = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "mask_token_id", "eos_token_id"),
)

# What a run depends on and a checkpoint does not fix, as attributes of the module, the trainer and an S1KDataModule;
# `training_encoding` and `reading` are dicts of options.
_SETTINGS = {
    "model": (
        *("pretrained", "seed", "weighting", "cart_p", "normalizer", "focal_alpha", "focal_gamma", "treat_eos_as_one"),
        *("stratified_t", "complementary_masks", "lr_schedule", "warmup_fraction", "weights_dtype", "float8_products"),
        *("from_autoregressive", "causal", "anneal_causal_steps", "certainty_weight", "certainty_temperature"),
    ),
    "trainer": ("precision", "max_steps", "max_epochs", "gradient_clip_val"),
    "data": (
        *("source", "validation_source", "validation_fraction", "first_n", "seed", "packing", "batch_cutoff"),
        *("short_first", "training_filters", "several_turns", "streaming", "shuffle_mib", "training_encoding"),
        "reading",
    ),
}

_PATHS = (  # options that may name local files
    *("pretrained", "from_autoregressive", "tokenizer", "source", "validation_source", "predict_source", "cache_dir"),
)


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and without Lightning's two copies in memory; URLs excepted."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Through a Python file: given a path, torch hides the cause of a failed write.
        with atomic_write(path, needed_bytes=tensor_bytes(checkpoint)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, *args, **kwargs)
        refuse_weights(Path(path))
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder, a sharded checkpoint: set trainer.strategy=fsdp2, or export it")
        if not Path(path).exists():
            raise UserError(f"{path} does not exist: set ckpt_path to a checkpoint of this run, or to `last`")
        with reading_checkpoint(path):
            return super().load_checkpoint(path, *args, **kwargs)


def refuse_weights(path: Path) -> None:
    """Raise UserError for adapters and models without the state of a run, with the option that loads them."""
    folder = path if path.is_dir() else path.parent
    if is_peft_folder(path):
        raise UserError(f"{path} holds adapters, not a checkpoint of a run: set model.lora.adapter to {folder}")
    if path.suffix == ".safetensors" or (path / "config.json").is_file():
        raise UserError(f"{path} holds a model, not a checkpoint of a run: set model.pretrained to {folder}")


def check_keyword(trainer: L.Trainer, ckpt_path: str | None) -> None:
    """Raise UserError for `best`, and for `last` where there is none: Lightning would use the initial weights."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    folders = ", ".join(sorted({str(c.dirpath or "the folder of the logger") for c in savers})) or "no folder"
    if ckpt_path == "last" and not any(c._find_last_checkpoints(trainer) for c in savers):
        raise UserError(
            f"ckpt_path is last, and there is no last.ckpt in {folders}: leave --ckpt_path out to start anew from the "
            "weights of the config, or set checkpoint.dirpath and autosave.dirpath to the folder of the run"
        )
    if ckpt_path == "best":
        raise UserError(
            f"ckpt_path is best, which only the process that trained knows: name the best-step=….ckpt in {folders}"
        )


@contextmanager
def reading_checkpoint(path: str | Path) -> Iterator[None]:
    """Check the checksums of a checkpoint file, which torch does not, and name the file in every error of reading it.

    Raises:
        UserError: it is incomplete, damaged, no checkpoint, or holds more than tensors and plain values.
    """
    with reading(Path(path), "a checkpoint", "use an earlier one"):
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        yield


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return sum(map(tensor_bytes, tree))
    return tree.nbytes if isinstance(tree, Tensor) else 0


def refuse_diverged(metrics: Mapping[str, Tensor], step: int) -> None:
    """Raise UserError if the last loss or gradient norm is not finite, before the last good checkpoint is replaced.

    A norm of 0 is that of a step that was skipped.
    """
    if metrics.get("train/gradient_norm") == 0:
        return
    for name in ("train/loss", "train/gradient_norm"):
        if name in metrics and not metrics[name].isfinite():
            raise UserError(
                f"{name} is {metrics[name].item()} at step {step}: the run has diverged and is not saved. Resume from "
                "its last checkpoint, or lower the learning rate or lengthen the warm-up (model.warmup_fraction)"
            )


def describe_run(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    """Add to a DreamModule's checkpoint what its use depends on; of an adapted model keep only adapters."""
    checkpoint["dream_config"] = module.model.config.to_dict()
    checkpoint["accumulate_grad_batches"] = module.trainer.accumulate_grad_batches
    checkpoint["optimizer"] = next((type(optimizer).__name__ for optimizer in module.trainer.optimizers), None)
    checkpoint["settings"], checkpoint["logged_step"] = settings_of_run(module), module.logged_step
    checkpoint["tokenizer"] = module.tokenizer_name
    checkpoint["run"] = getattr(module.trainer.logger, "log_dir", None)
    for name in ("hyper_parameters", "datamodule_hyper_parameters"):
        checkpoint[name] = _constructor_options(checkpoint.get(name, {}))
    if module.lora is not None:
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}
        checkpoint["lora"], checkpoint["base"] = module.lora.config, module.base


def _constructor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values among a constructor's options, local folders by their whole paths; Lightning passes them on."""
    plain = {}
    for name, value in options.items():
        value = asdict(value) if is_dataclass(value) else value
        if name in _PATHS and value not in ("bytes", "bundled", None) and Path(str(value)).expanduser().exists():
            value = str(Path(value).expanduser().resolve())
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError:  # such as a function
            continue
    plain.pop("_instantiator", None)  # of Lightning's command line
    return plain


def check_checkpoint(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    """Raise UserError for a checkpoint of another network (by name), with other adapters, or of another base."""
    if "dream_config" not in checkpoint:
        raise UserError(
            "the checkpoint was not saved by a DreamModule, or by one whose on_save_checkpoint does not call super(): "
            "name one of a run of this package"
        )
    saved, ours = checkpoint["dream_config"], module.model.config.to_dict()
    if others := [f"{name} {saved[name]}, here {ours[name]}" for name in _NETWORK if saved[name] != ours[name]]:
        raise UserError(
            f"the checkpoint is of another network: {'; '.join(others)}. Use the configuration of the run that saved it"
        )
    lora, adapters = module.lora, checkpoint.get("lora")
    if lora is None and adapters is None:
        return
    if lora is None or adapters is None:
        raise UserError(
            f"the checkpoint's adapters are {adapters} and model.lora is {lora}: use the configuration of its run"
        )
    check_base(checkpoint["base"], module.base)
    if adapters != lora.config:
        raise UserError(f"the checkpoint's adapters are {adapters}, model.lora is {lora.config}")
    if (trained_on := checkpoint["base"]["quantize"]) != (now := module.base["quantize"]):
        warnings.warn(
            f"the adapters were trained with model.quantize {trained_on}, now it is {now}: answers change a little",
            stacklevel=2,
        )


def resume(module: L.LightningModule, saved: Mapping[str, Any]) -> None:
    """Continue at the checkpoint's row of the data, and say which settings differ; call it when training starts.

    Args:
        saved: the checkpoint's `optimizer`, a class name, and `settings`; empty for a new run.

    Raises:
        UserError: the optimizer is of another class.
    """
    trainer = module.trainer
    ours = type(trainer.optimizers[0]).__name__
    if saved.get("optimizer") not in (None, ours):
        raise UserError(
            f"the checkpoint holds the states of {saved['optimizer']} and model.optimizer is {ours}: use the optimizer "
            "of the run that saved it, or export it and name the folder in model.pretrained"
        )
    before, now = saved.get("settings", {}), settings_of_run(module, restored=False)
    for name in [name for name in now if name in before and before[name] != now[name]]:
        what = "taken"
        if name.startswith("model.optimizer."):
            what = (
                "ignored, the optimizer's states keep it; to change it, export and set model.pretrained to the folder"
            )
        rank_zero_warn(f"{name} was {before[name]!r} in the checkpoint and is {now[name]!r}: {what}")
    # Where the schedule needs the length of an epoch, Lightning makes the loader before it reads the checkpoint, and
    # would start the epoch again.
    trainer.fit_loop._load_combined_loader_states()


def settings_of_run(module: L.LightningModule, *, restored: bool = True) -> dict[str, Any]:
    """What the run depends on, as plain values: those of the optimizer as it uses them, or as it was configured."""
    trainer, data = module.trainer, module.trainer.datamodule
    found = {}
    for part, owner in (("model", module), ("trainer", trainer), ("data", data)):
        for name in _SETTINGS[part] if owner is not None else ():
            value = getattr(owner, name, None)
            found |= {f"{part}.{k}": v for k, v in (value.items() if isinstance(value, dict) else [(name, value)])}
    for optimizer in trainer.optimizers[:1]:
        group = optimizer.param_groups[0]
        used = {**group, "lr": group.get("initial_lr", group["lr"])} if restored else optimizer.defaults
        found |= {f"model.optimizer.{name}": used.get(name) for name in optimizer.defaults}
    if hasattr(data, "batch_size"):
        rows = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        found["rows of an optimizer step (devices × batch_size × accumulate_grad_batches)"] = rows
    return json.loads(json.dumps(found, default=_plain))  # tuples become lists


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else str(value)


def rescale_progress(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Convert a checkpoint's progress in its epoch, counted in micro-batches, to steps of `accumulate`, in place."""
    before = checkpoint.get("accumulate_grad_batches", accumulate)
    if before == accumulate:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name, count in counts.items():
            counts[name] = -(-count // before) * accumulate  # the last step of an epoch may be a short one
