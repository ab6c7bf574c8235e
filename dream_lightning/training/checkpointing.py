"""Checkpoint files that are whole or not there, and never of a run that has diverged."""

import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from torch import Tensor

from dream_lightning.errors import UserError

_PARTIAL = ".partial"  # never taken for a checkpoint: those end in .ckpt


def refuse_diverged(metrics: Mapping[str, Tensor], step: int) -> None:
    """Stop a run whose weights are lost before they replace its last good checkpoint.

    Raises:
        UserError: the last loss or the last norm of the gradients is not finite.
    """
    for name in ("train/loss", "train/gradient_norm"):
        if name in metrics and not metrics[name].isfinite():
            raise UserError(
                f"{name} is {metrics[name].item()} at step {step}: the run has diverged, and its weights are not "
                "saved. Begin anew with a lower learning rate or a longer warm-up (model.warmup_fraction); the last "
                "checkpoint is of before"
            )


class SafeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, bring it onto the disk, and only then put it there in one step.

    A kill, a full disk or a power cut while saving leaves the previous file of that name as it was. Lightning's own
    way builds the file in memory first, twice (for full fine-tuning of 7B, 2 × 46 GB), writes it into the temporary
    folder of the machine, and copies it over the previous one if that lies on another disk. URLs are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one file.

        Raises:
            UserError: it could not be written, most often because the disk is full.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        partial = path.with_name(path.name + _PARTIAL)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            # torch ends a file that could not be written with a RuntimeError of its own
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise UserError(_explain(checkpoint, path, partial, reason)) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read one file.

        Raises:
            UserError: nothing there, a sharded checkpoint, or a damaged one.
        """
        if _is_local_file_protocol(path):
            if Path(path).is_dir():
                raise UserError(
                    f"{path} is a folder, as trainer.strategy fsdp2 saves: set trainer.strategy=fsdp2, which goes on "
                    "from it on any number of GPUs, or export it and name the new folder in model.pretrained"
                )
            if not Path(path).exists():
                raise UserError(
                    f"{path} does not exist: set ckpt_path to a checkpoint of this run, such as "
                    "lightning_logs/…/checkpoints/last.ckpt, or to `last` for the newest in checkpoint.dirpath and "
                    "autosave.dirpath"
                )
            if not zipfile.is_zipfile(path):  # its table of contents stands at its end
                raise UserError(f"{path} is not whole, or no checkpoint: take an earlier one")
        return super().load_checkpoint(path, *args, **kwargs)


def remove_partials(folder: str | Path) -> list[Path]:
    """Delete what a kill in the middle of saving left in a folder, sharded or not; returns what there was."""
    partials = sorted(Path(folder).glob(f"*{_PARTIAL}"))
    for partial in partials:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    return partials


def _explain(checkpoint: dict[str, Any], path: Path, partial: Path, reason: OSError) -> str:
    partial.unlink(missing_ok=True)  # so that what it took counts as free
    if path.is_dir():
        return (
            f"{path} was not saved: a sharded checkpoint, which is a folder, stands there, and a file does not replace "
            "it. Set autosave.dirpath and checkpoint.dirpath to folders of this run"
        )
    disk = os.statvfs(path.parent)
    kept = "the one before it is still there" if path.exists() else "earlier checkpoints are untouched"
    return (
        f"{path} was not saved: {reason.strerror}. It needs about {_size(tensor_bytes(checkpoint))}, and "
        f"{_size(disk.f_bavail * disk.f_frsize)} are free there; {kept}. Make room, or set autosave.dirpath and "
        "checkpoint.dirpath to a larger disk, and go on with --ckpt_path last"
    )


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples, shared ones counted once."""
    storages: dict[int, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Tensor):
            storages[node.untyped_storage().data_ptr()] = node.untyped_storage().nbytes()
        elif isinstance(node, dict):
            for value in node.values():
                visit(value)
        elif isinstance(node, list | tuple):
            for value in node:
                visit(value)

    visit(tree)
    return sum(storages.values())


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _sync_folder(folder: Path) -> None:
    """Bring the renaming onto the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
