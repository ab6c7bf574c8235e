"""How fast training runs, as people quote it."""

import time
from typing import Any

import lightning as L

from dream_lightning.types import Batch


class Throughput(L.Callback):
    """Log `train/tokens_per_second`: real (non-padding) tokens of all ranks over wall time, data loading included.

    The mean over the optimiser steps since the last logged value; time spent in validation is left out.
    """

    def __init__(self) -> None:
        self._tokens, self._seconds, self._since, self._logged_at = 0, 0.0, 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._tokens, self._seconds, self._since = 0, 0.0, time.perf_counter()
        self._logged_at = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._since

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and log when Lightning logs."""
        self._tokens += (batch.places >= 0).sum()  # a tensor: no synchronisation until it is logged
        step = trainer.global_step  # already counts this one; stands still while micro-batches accumulate
        if trainer.log_every_n_steps and step > self._logged_at and step % trainer.log_every_n_steps == 0:
            seconds = self._seconds + time.perf_counter() - self._since
            tokens = float(trainer.strategy.reduce(self._tokens, reduce_op="sum"))
            pl_module.log("train/tokens_per_second", tokens / seconds, prog_bar=True)
            self._tokens, self._seconds, self._since, self._logged_at = 0, 0.0, time.perf_counter(), step
