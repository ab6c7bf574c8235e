"""The newest checkpoint of a run, a folder for one run at a time, and a run that saves when it is told to stop."""

import os
import signal
import subprocess
import threading
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dream_lightning.atomic import check_folder, lock, on_rank_zero, remove_locked, remove_partials
from dream_lightning.training.checkpointing import refuse_diverged
from dream_lightning.training.step_accumulator import ends_step

_SLURM = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # not on Windows


class Autosave(ModelCheckpoint):
    """Save every n steps, after the last step, and when the run is told to stop.

    SIGTERM (a scheduler, `kill`), SIGUSR1 (SLURM) and the first Ctrl-C end the run after the current optimizer step, on
    all ranks after the same one, with a checkpoint and the exit status of that signal (143, 138, 130). A checkpoint is
    never saved in the middle of a step, because the gradients of its first micro-batches would be lost. A second Ctrl-C
    stops at once without saving. After SIGUSR1 a SLURM job is requeued.

    A resumed run makes the validation that was due or running when its checkpoint was saved.

    The folders of all checkpoint callbacks are locked while the run trains. Checkpoints of another run, one that is not
    resumed, are moved into their subfolder `version_<n>` right before this run first saves, so `last.ckpt` is always
    the newest.

    Raises:
        UserError: another process trains in the folder; no file can be written there.
    """

    _locks: tuple[BinaryIO, ...] = ()
    _others: tuple[Path, ...] = ()  # folders with checkpoints of another run
    _signal = 0  # number of the signal that told this rank to stop
    _stopping = False  # all ranks agreed
    _last_step: float = float("inf")
    _step = 0  # optimizer steps at the end of the last one

    def __init__(self, *args: Any, enable_version_counter: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, enable_version_counter=enable_version_counter, **kwargs)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._signal, self._stopping = 0, False
        if stage == "fit":
            on_rank_zero(trainer.strategy, lambda: self._lock(self._folders(trainer)))

    def _folders(self, trainer: L.Trainer) -> list[Path]:
        """Of all checkpoint callbacks, once if there are several of this class."""
        callbacks = trainer.checkpoint_callbacks
        first = next(c for c in callbacks if isinstance(c, Autosave)) is self
        names = {str(c.dirpath) for c in callbacks if c.dirpath and "://" not in str(c.dirpath)}
        return [Path(name) for name in sorted(names)] if first else []

    def _lock(self, folders: list[Path]) -> None:
        self._unlock()
        for folder in folders:
            refusal = (
                f"another process trains in {folder}: wait for it or end it, or name another folder in "
                "checkpoint.dirpath and autosave.dirpath"
            )
            check_folder("the folder of checkpoints", folder)
            self._locks += (lock(folder / ".lock", refusal),)
            for partial in remove_partials(folder, "*.ckpt.*"):
                rank_zero_info(f"Removed {partial}, which was incomplete when an earlier run was killed")

    def _unlock(self) -> None:
        for file in self._locks:
            remove_locked(file)
        self._locks = ()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._unlock()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._unlock()

    def move_other_runs(self, trainer: L.Trainer) -> None:
        """Move checkpoints of other runs out of the folders; called on all ranks right before a checkpoint is saved."""
        refuse_diverged(trainer.callback_metrics, trainer.global_step)
        others, self._others = self._others, ()
        if others:
            on_rank_zero(trainer.strategy, lambda: [_move_checkpoints(folder) for folder in others] and None)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._handle_signals()

    def _handle_signals(self) -> None:
        # Lightning's own handler of SIGTERM stops after a micro-batch without saving, with exit status 0, and
        # broadcasts from inside the handler. Lightning restores the former handlers when it is done.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, *_SLURM):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal:
            signal.default_int_handler(number, frame)
        self._signal = number
        # not print: the signal may interrupt one
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this optimizer step, then saving\n".encode())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        folders = self._folders(trainer)
        resumed = Path(trainer.ckpt_path).absolute().parent in folders if trainer.ckpt_path else trainer.global_step > 0
        found = [folder for folder in folders if not resumed and any(folder.glob("*.ckpt"))]
        self._others = trainer.strategy.broadcast(tuple(found))
        for folder in self._others:
            rank_zero_warn(
                f"{folder} holds checkpoints of another run, which are moved to a folder {folder.name}/version_… when "
                "this one first saves: stop it and add --ckpt_path last to resume that run instead"
            )
        self._handle_signals()
        self._last_step, self._step = trainer.estimated_stepping_batches, trainer.global_step
        self._last_global_step_saved = trainer.global_step  # this step is on the disk already, or there is none
        # On several processes Lightning asks before every micro-batch whether its handler of SIGTERM was called, which
        # synchronizes with the GPU. Its handler is replaced.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of a step
        self._step = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._stopping = self._any_signal(trainer)
        if self._stopping or trainer.global_step >= self._last_step:
            self._save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop, after the metrics of the last step were logged."""
        if self._stopping:
            self._stop(trainer)

    on_validation_start = on_train_batch_start

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop without waiting for the end of a long validation, unless it runs in the middle of a step."""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if training and ends_step(trainer) and self._any_signal(trainer):
            self._stopping = True
            self._save(trainer)
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a resumed run make the validation that is due after this step, or that is being stopped.

        Lightning would skip it. It repeats one that had begun its first batch, so the checkpoint says that.
        """
        self.move_other_runs(trainer)
        loop = trainer.fit_loop.epoch_loop
        done = loop.batch_progress.current
        if done.processed > done.completed:  # at the end of a step
            due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        else:
            due = trainer.validating and self._stopping
        if due:
            loops = checkpoint["loops"]["fit_loop"]
            for counts in map(loops["epoch_loop.batch_progress"].get, ("total", "current")):
                counts["completed"] = counts["processed"]
            validation = loops["epoch_loop.val_loop.batch_progress"]
            finished = validation["total"]["processed"]
            validation["total"] |= {"ready": finished + 1, "started": finished + 1, "completed": finished}
            validation["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a run that ended before its last step, by early stopping."""
        self._save(trainer)

    def _any_signal(self, trainer: L.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._signal != 0, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _stop(self, trainer: L.Trainer) -> None:
        number = torch.tensor(self._signal, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(number, reduce_op="max"))
        rank_zero_info(
            f"Stopped by {signal.Signals(number).name} after step {trainer.global_step}, saved as "
            f"{self.last_model_path}: resume with --ckpt_path last"
        )
        job = os.environ.get("SLURM_JOB_ID")
        if number in _SLURM and job and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=True)
        raise SystemExit(128 + number)


def _move_checkpoints(folder: Path) -> None:
    """Rename them, `last` at the end: a kill in between leaves it where the run can be resumed."""
    version = next(path for n in count() if not (path := folder / f"version_{n}").exists())
    version.mkdir()
    for checkpoint in sorted(folder.glob("*.ckpt"), key=lambda path: path.name.startswith("last")):
        checkpoint.rename(version / checkpoint.name)
    rank_zero_info(f"The checkpoints of an earlier run are in {version}")
