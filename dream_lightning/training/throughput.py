"""Speed of training, MFU, padding, data waits and memory."""

import time
from typing import Any

import lightning as L
import torch

from dream_lightning.batch import Batch

_COST = ("tokens", "device_hours")  # logged, but not in the progress bar


class Throughput(L.Callback):
    """Log the speed of training every `log_every_n_steps`, over the optimizer steps since the last time.

    | scalar                    | meaning                                                                           |
    |---------------------------|-----------------------------------------------------------------------------------|
    | `train/tokens_per_second` | real (non-padding) tokens of all ranks over wall time without validation          |
    | `train/useful_share`      | real tokens over positions: 1 is no padding                                       |
    | `train/mfu`               | useful FLOP/s over those of a large matrix product, measured at the start; no CPU |
    | `train/data_wait_share`   | part of wall time in which the process waited for its next batch                  |
    | `train/peak_memory_gib`   | most GPU memory allocated by any rank since training started                      |
    | `train/tokens`            | real tokens of all ranks since this process started training                      |
    | `train/device_hours`      | wall time since then with validation, times the number of ranks                   |

    MFU needs a module with `training_flops` and `matmul_ceiling` (`DreamModule`), the data wait a loader that measures
    it (`S1KDataModule`'s); a scalar that is not known is not logged. The process synchronizes with its GPU only to log
    and where a validation starts.
    """

    _ceiling = _since = _seconds = _tokens = _all_tokens = _began = 0.0  # of training; a sanity check comes before

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(pl_module, "matmul_ceiling"):
            self._ceiling = pl_module.matmul_ceiling()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start(trainer, flops=0)  # the module counts from 0 too
        self._all_tokens, self._began = 0.0, self._since

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock when the GPU has finished its training work."""
        self._tokens = int(self._tokens)  # synchronizes
        self._seconds += time.perf_counter() - self._since

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += (batch.document_ids >= 0).sum()  # a tensor: does not synchronize
        self._positions += batch.document_ids.numel()
        step = trainer.global_step  # constant while micro-batches accumulate
        if trainer.log_every_n_steps and step > self._logged_at and step % trainer.log_every_n_steps == 0:
            flops = pl_module.training_flops() if self._ceiling else 0
            for name, value in self._scalars(trainer, pl_module, flops).items():
                # A tensor on the host: Lightning reads what a bar shows after every micro-batch.
                pl_module.log(f"train/{name}", torch.tensor(value), prog_bar=name not in _COST)
            self._start(trainer, flops)

    def _scalars(self, trainer: L.Trainer, pl_module: L.LightningModule, flops: int) -> dict[str, float]:
        tokens = float(self._tokens)  # synchronizes, so read it before the clock
        seconds = self._seconds + time.perf_counter() - self._since
        waited = getattr(trainer.train_dataloader, "waited", 0.0) - self._waited
        mine = [tokens, self._positions, flops - self._flops, self._ceiling * seconds, waited, seconds]
        sums = trainer.strategy.reduce(torch.tensor(mine, device=pl_module.device), reduce_op="sum").tolist()
        tokens, positions, done, could, waited, all_seconds = sums
        self._all_tokens += tokens
        scalars = {"tokens_per_second": tokens / seconds, "useful_share": tokens / positions}
        hours = (time.perf_counter() - self._began) * trainer.world_size / 3600
        scalars |= {"tokens": self._all_tokens, "device_hours": hours}
        if could:
            scalars["mfu"] = done / could
        if hasattr(trainer.train_dataloader, "waited"):
            scalars["data_wait_share"] = waited / all_seconds
        if pl_module.device.type == "cuda":
            peak = torch.tensor(torch.cuda.max_memory_allocated(pl_module.device) / 2**30, device=pl_module.device)
            scalars["peak_memory_gib"] = float(trainer.strategy.reduce(peak, reduce_op="max"))
        return scalars

    def _start(self, trainer: L.Trainer, flops: int) -> None:
        self._tokens, self._positions = 0, 0
        self._flops, self._waited = flops, getattr(trainer.train_dataloader, "waited", 0.0)
        self._seconds, self._since, self._logged_at = 0.0, time.perf_counter(), trainer.global_step
