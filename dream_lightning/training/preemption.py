"""The newest state of a run on disk, whatever happens to it."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dream_lightning.training.checkpointing import remove_partials

STEP_METRICS = "step_metrics"  # key in a checkpoint: step and metrics


class Autosave(ModelCheckpoint):
    """Save every n steps, after the last step, and when the run is told to stop.

    SIGTERM (a scheduler, `kill`) and the first Ctrl-C end the run after the optimiser step under way, on all ranks
    after the same one, with a checkpoint and the exit status of that signal (143 and 130). A step is never saved half:
    gradients summed over its first micro-batches would be lost. A second Ctrl-C stops at once without saving.
    """

    _asked: signal.Signals | None = None  # the signal that told this rank to stop
    _preempted = False  # SLURM told this rank
    _requeue: Callable[[int, FrameType | None], None] | None = None  # what Lightning does then
    _stopping = False  # all ranks agreed
    _in_step = False  # some of a step's micro-batches are done
    _validation_ahead = False
    _unlogged: tuple[int, dict[str, float]] | None = None  # step and metrics that a checkpoint brought along
    _last_step: float = float("inf")
    _steps_seen: int = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clear away what a kill while saving left."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for partial in remove_partials(self.dirpath):
                rank_zero_info(f"Removed {partial}, which was being written when a run was killed")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nobody has told this run to stop."""
        self._asked, self._preempted, self._stopping = None, False, False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals from here on."""
        self._listen()

    def _listen(self) -> None:
        """In place of Lightning, which restores the former handlers when it is done.

        Its own handler of SIGTERM stops after a micro-batch without saving, with exit status 0; between ranks it
        broadcasts from inside the handler, wherever the others are. What it does when SLURM announces a preemption,
        save and requeue the job, is left to it, but waits for the end of the step.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)
        handler = signal.getsignal(signal.SIGUSR1)
        if isinstance(handler, _HandlersCompose):
            self._requeue = handler
            signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked is not None:
            signal.default_int_handler(number, frame)
        if number == signal.SIGUSR1:
            self._preempted = True
            return
        self._asked = signal.Signals(number)
        # not print: the signal may have come in the middle of one
        os.write(2, f"\n{self._asked.name}: stopping after this optimiser step, then saving\n".encode())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals, find out where the run will end, say so if it begins anew where another left its state."""
        super().on_train_start(trainer, pl_module)
        # not earlier: divided weights are restored after `on_fit_start`, and until then no ckpt_path is known
        if trainer.ckpt_path is None and (found := sorted(self._find_last_checkpoints(trainer))):
            rank_zero_warn(
                f"{found[-1]} belongs to another run, and this one was started without --ckpt_path: it begins anew and "
                "saves beside it. Stop it and add --ckpt_path last to go on instead, or name another folder in "
                "checkpoint.dirpath and autosave.dirpath"
            )
        self._listen()
        self._last_step, self._steps_seen = trainer.estimated_stepping_batches, trainer.global_step
        self._last_global_step_saved = trainer.global_step  # where it was resumed from, or nothing to save
        self._log_resumed_step(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time; stop when asked to."""
        self._in_step = trainer.global_step == self._steps_seen
        if self._in_step:
            return  # Lightning would save here too, in a run resumed from a step to save at
        self._steps_seen = trainer.global_step
        loop = trainer.fit_loop
        self._validation_ahead = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._requeue is not None and self._any_rank(trainer, self._preempted):
            self._preempted = False
            self._requeue(signal.SIGUSR1, None)
        self._stopping = self._any_rank(trainer, self._asked is not None)
        if self._stopping or trainer.global_step >= self._last_step:
            self._save(trainer)
        self._validation_ahead = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, once the metrics of the last step are with the loggers."""
        self._stop(trainer)
        # In several processes Lightning asks before every micro-batch whether its handler of SIGTERM was called, which
        # makes each wait for its GPU. From `on_train_start` on it is not its handler any more, so once was enough.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _no_question

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same."""
        self._stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Do not wait for the end of a long validation, unless it lies in the middle of a step."""
        between_steps = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not self._in_step
        if between_steps and self._any_rank(trainer, self._asked is not None):
            self._stopping = self._validation_ahead = True  # all of it, again
            self._save(trainer)
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a resumed run begin with what belongs to this step and would be lost by a kill right behind the save.

        Its metrics, which Lightning hands to the loggers only after the callbacks, travel in the checkpoint. Its
        validation Lightning would leave out; it does one again that had begun its first batch, so this is what the
        checkpoint says.
        """
        connector = trainer._logger_connector
        if trainer.training and connector._first_loop_iter is not None and connector.should_update_logs:
            metrics = {"epoch": trainer.current_epoch} | convert_tensors_to_scalars(connector.metrics["log"])
            step = metrics.pop("step", trainer.fit_loop.epoch_loop._batches_that_stepped)
            checkpoint[STEP_METRICS] = int(step), metrics
        if self._validation_ahead:
            training, validation = (
                checkpoint["loops"]["fit_loop"][f"epoch_loop.{name}batch_progress"] for name in ("", "val_loop.")
            )
            for done in (training["total"], training["current"]):
                done["completed"] = done["processed"]
            total = validation["total"]
            total["ready"] = total["started"] = total["processed"] + 1
            total["completed"] = total["processed"]
            validation["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the metrics of the checkpoint's step, where the run goes on from it."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._unlogged = checkpoint.get(STEP_METRICS)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what a run leaves that ended before its last step, by early stopping."""
        self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what a checkpoint of the last step brought: such a run has no training to start."""
        self._log_resumed_step(trainer)

    @staticmethod
    def _any_rank(trainer: L.Trainer, told: bool) -> bool:
        """Whether any rank was told; the same on all."""
        return trainer.strategy.reduce_boolean_decision(told, all=False)

    def _log_resumed_step(self, trainer: L.Trainer) -> None:
        if self._unlogged is not None:
            step, metrics = self._unlogged
            trainer._logger_connector.log_metrics(metrics, step=step)
            self._unlogged = None

    def _save(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _stop(self, trainer: L.Trainer) -> None:
        if not self._stopping:
            return
        asked = self._asked or signal.SIGTERM  # only another rank was
        rank_zero_info(
            f"Stopped by {asked.name} after step {trainer.global_step}, saved as {self.last_model_path}: go on with "
            "--ckpt_path last"
        )
        raise SystemExit(128 + asked)


def _no_question() -> None:
    pass
