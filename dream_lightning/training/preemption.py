"""The newest checkpoint of a run, and a run that saves it when it is told to stop."""

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dream_lightning.atomic import remove_partials


class Autosave(ModelCheckpoint):
    """Save every n steps, after the last step, and when the run is told to stop.

    SIGTERM (a scheduler, `kill`), SIGUSR1 (SLURM) and the first Ctrl-C end the run after the current optimizer step, on
    all ranks after the same one, with a checkpoint and the exit status of that signal (143, 138, 130). A checkpoint is
    never saved in the middle of a step, because the gradients of its first micro-batches would be lost. A second Ctrl-C
    stops at once without saving. After SIGUSR1 a SLURM job is requeued.

    A resumed run makes the validation that was due or running when its checkpoint was saved.
    """

    _signal = 0  # number of the signal that told this rank to stop
    _stopping = False  # all ranks agreed
    _last_step: float = float("inf")
    _step = 0  # optimizer steps at the end of the last one

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._signal, self._stopping = 0, False
        if stage == "fit" and trainer.is_global_zero:
            for partial in remove_partials(self.dirpath):
                rank_zero_info(f"Removed {partial}, which was incomplete when an earlier run was killed")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._handle_signals()

    def _handle_signals(self) -> None:
        # Lightning's own handler of SIGTERM stops after a micro-batch without saving, with exit status 0, and
        # broadcasts from inside the handler. Lightning restores the former handlers when it is done.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal:
            signal.default_int_handler(number, frame)
        self._signal = number
        # not print: the signal may interrupt one
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this optimizer step, then saving\n".encode())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        found = set().union(*(c._find_last_checkpoints(trainer) for c in trainer.checkpoint_callbacks))
        if found and trainer.ckpt_path is None:
            rank_zero_warn(
                f"{max(found)} belongs to another run, and this one starts anew next to it: add --ckpt_path last to "
                "resume that run, or name another folder in checkpoint.dirpath and autosave.dirpath"
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
        between_steps = training and not trainer.fit_loop._should_accumulate()
        if between_steps and self._any_signal(trainer):
            self._stopping = True
            self._save(trainer)
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a resumed run make the validation that is due after this step, or that is being stopped.

        Lightning would skip it. It repeats one that had begun its first batch, so the checkpoint says that.
        """
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
        if number == signal.SIGUSR1 and job and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=True)
        raise SystemExit(128 + number)
