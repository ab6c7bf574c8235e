"""Checkpoint files: written atomically, never of a diverged run, and refused by a model that they do not fit."""

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from torch import Tensor

from dream_lightning.adapters import LoraParams, check_adapters
from dream_lightning.atomic import atomic_write
from dream_lightning.errors import UserError
from dream_lightning.model import DreamConfig

# The fields of DreamConfig that must agree between a checkpoint and the model.
_NETWORK = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "mask_token_id", "eos_token_id"),
)


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically.

    Lightning's own writer builds the file in memory, twice (for full fine-tuning of 7B, 2 × 46 GB), and copies it over
    the previous one if that is on another disk. URLs use Lightning's writer.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Through a Python file: given a path, torch hides the cause of a failed write.
        with atomic_write(path, needed_bytes=tensor_bytes(checkpoint)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if _is_local_file_protocol(path):
            if Path(path).is_dir():
                raise UserError(
                    f"{path} is a folder, a sharded checkpoint: set trainer.strategy=fsdp2, which resumes from it on "
                    "any number of GPUs, or export it and name the new folder in model.pretrained"
                )
            if not Path(path).exists():
                raise UserError(
                    f"{path} does not exist: set ckpt_path to a checkpoint of this run, or to `last` for the newest in "
                    "checkpoint.dirpath and autosave.dirpath"
                )
            if not zipfile.is_zipfile(path):  # the table of contents is at the end of the file
                raise UserError(f"{path} is incomplete or not a checkpoint: use an earlier one")
        return super().load_checkpoint(path, *args, **kwargs)


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(tensor_bytes, tree.values()))
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


def refuse_diverged(metrics: Mapping[str, Tensor], step: int) -> None:
    """Stop a diverged run before it replaces its last good checkpoint.

    Raises:
        UserError: the last loss or gradient norm is not finite.
    """
    for name in ("train/loss", "train/gradient_norm"):
        if name in metrics and not metrics[name].isfinite():
            raise UserError(
                f"{name} is {metrics[name].item()} at step {step}: the run has diverged, and its weights are not "
                "saved. Start again with a lower learning rate or a longer warm-up (model.warmup_fraction), or resume "
                "from the last checkpoint"
            )


def describe_run(
    checkpoint: dict[str, Any],
    trainer: L.Trainer,
    config: DreamConfig,
    *,
    trained: Iterable[str],
    lora: LoraParams | None,
    base: dict[str, str] | None,
) -> None:
    """Add to a checkpoint what `check_checkpoint` and `resume` compare; of an adapted model keep only the adapters.

    Args:
        checkpoint: changed in place.
        trained: names of the parameters that train.
        lora, base: the adapters and the fingerprint of their base; None if all weights train.
    """
    checkpoint["dream_config"] = config.to_dict()
    checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    checkpoint["optimizer"] = next((type(optimizer).__name__ for optimizer in trainer.optimizers), None)
    if lora is not None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in trained if name in state}
        checkpoint["lora"], checkpoint["base"] = asdict(lora), base


def check_checkpoint(
    checkpoint: dict[str, Any], config: DreamConfig, *, lora: LoraParams | None, base: dict[str, str] | None
) -> None:
    """Refuse a checkpoint of another network, with other adapters, or of another base; reads no tensor.

    Raises:
        UserError: not a checkpoint of a DreamModule; other sizes, constants or token ids, by name; other adapters or
            base.
    """
    if "dream_config" not in checkpoint:
        raise UserError("the checkpoint was not saved by a DreamModule: name one of a run of this package")
    saved, ours = checkpoint["dream_config"], config.to_dict()
    if others := [f"{name} {saved[name]}, here {ours[name]}" for name in _NETWORK if saved[name] != ours[name]]:
        raise UserError(
            f"the checkpoint is of another network: {'; '.join(others)}. Use the configuration of the run that saved "
            "it, or start a new run without ckpt_path"
        )
    check_adapters(checkpoint, lora, base)


def resume(trainer: L.Trainer, saved_optimizer: str | None) -> None:
    """Continue at the checkpoint's row of the data; call it when training starts.

    Args:
        saved_optimizer: class name of the checkpoint's optimizer; None without a checkpoint.

    Raises:
        UserError: the checkpoint holds the states of another optimizer.
    """
    ours = type(trainer.optimizers[0]).__name__
    if saved_optimizer not in (None, ours):
        raise UserError(
            f"the checkpoint holds the states of {saved_optimizer} and model.optimizer is {ours}: use the optimizer of "
            "the run that saved it, or export it and start a new run with the folder as model.pretrained"
        )
    # Where the schedule needs the length of an epoch, Lightning makes the loader before it reads the checkpoint, and
    # would start the epoch again.
    trainer.fit_loop._load_combined_loader_states()


def rescale_progress(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Convert a checkpoint's progress in its epoch to micro-batches of this run, in place.

    With another number of processes a step of as many rows has another number of micro-batches, which Lightning counts.

    Args:
        accumulate: micro-batches of a step now.
    """
    before = checkpoint.get("accumulate_grad_batches", accumulate)
    if before == accumulate:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name, count in counts.items():
            counts[name] = -(-count // before) * accumulate  # the last step of an epoch may be a short one
