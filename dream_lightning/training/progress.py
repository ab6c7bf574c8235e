"""The progress bar, short enough for a terminal."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

# scalar → name and format in the bar; the logger gets whole names and all digits
_SHOWN = {
    "train/loss": ("loss", ".4g"),
    "val/nll": ("val_nll", ".4g"),
    "val/accuracy": ("val_acc", ".1%"),
    "train/tokens_per_second": ("tok/s", ",.0f"),
    "train/mfu": ("mfu", ".1%"),
    "train/peak_memory_gib": ("GiB", ".1f"),
    "train/useful_share": ("useful", ".0%"),
    "train/data_wait_share": ("wait", ".0%"),
}


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with short names, the most important on the left: a narrow terminal cuts off the right.

    It shows `train/loss`, `val/nll`, `val/accuracy` and the scalars of `Throughput`, and never synchronizes with the
    GPU: the loss is copied asynchronously, so it is about one micro-batch old. For other scalars on a GPU that a module
    logs with `prog_bar=True`, Lightning synchronizes after every micro-batch.
    """

    fetches_loss = True  # DreamModule then logs the loss without showing it
    _step = -1  # optimizer step of the last copy
    _loss: float | None = None
    _copy: "_AsyncCopy | None" = None

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Show the last loss that has arrived; start copying that of a new step."""
        if self._copy is not None and self._copy.done():
            self._loss, self._copy = float(self._copy.value), None
        if self._copy is None and self._step != trainer.global_step and "train/loss" in trainer.callback_metrics:
            self._copy, self._step = _AsyncCopy(trainer.callback_metrics["train/loss"]), trainer.global_step
        super().on_train_batch_end(trainer, *arguments)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self._loss, self._copy = float(loss), None
        super().on_train_epoch_end(trainer, pl_module)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The scalars above, in this order, then others that were logged with `prog_bar=True`."""
        found = trainer.progress_bar_metrics | ({} if self._loss is None else {"train/loss": self._loss})
        shown = {name: format(found[key], form) for key, (name, form) in _SHOWN.items() if key in found}
        return shown | {key: value for key, value in found.items() if key not in _SHOWN}


class _AsyncCopy:
    """A number that is being copied from its device to the host."""

    def __init__(self, number: Tensor) -> None:
        self.value = number.to("cpu", non_blocking=number.is_cuda)  # into pinned memory
        self._event = torch.cuda.Event() if number.is_cuda else None
        if self._event is not None:
            self._event.record()

    def done(self) -> bool:
        return self._event is None or self._event.query()
