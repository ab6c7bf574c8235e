"""The progress bar, short enough for a terminal."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

# scalar → name and format in the bar; whole names and all digits are with the logger
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
    """Lightning's bar with short names, what matters most on the left: a narrow terminal cuts off the right.

    | in the bar | scalar                    |
    |------------|---------------------------|
    | `loss`     | `train/loss`              |
    | `val_nll`  | `val/nll`                 |
    | `val_acc`  | `val/accuracy`            |
    | `tok/s`    | `train/tokens_per_second` |
    | `mfu`      | `train/mfu`               |
    | `GiB`      | `train/peak_memory_gib`   |
    | `useful`   | `train/useful_share`      |
    | `wait`     | `train/data_wait_share`   |

    A GPU is never waited for: the loss is that of the last optimiser step whose loss has arrived on the host, which is
    most often one micro-batch behind. Other scalars that a module logs with `prog_bar=True` Lightning reads after every
    micro-batch; if they are tensors of a GPU, each time it waits until the GPU has done all its work.
    """

    fetches_loss = True  # DreamModule asks its trainer's bar
    _step = -1  # optimiser step whose loss was asked for last
    _loss: float | None = None
    _coming: "_OnItsWay | None" = None

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Ask for the loss of a new step, take what has arrived, move on."""
        self._take()
        if self._coming is None and self._step != trainer.global_step:
            loss = trainer.callback_metrics.get("train/loss")
            self._coming = None if loss is None else _OnItsWay(loss)
            self._step = trainer.global_step
            self._take()
        super().on_train_batch_end(trainer, *arguments)

    def _take(self) -> None:
        if self._coming is not None and self._coming.arrived():
            self._loss, self._coming = float(self._coming.value), None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last loss."""
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self._loss, self._coming = float(loss), None
        super().on_train_epoch_end(trainer, pl_module)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The scalars above, in this order, then others that were logged with `prog_bar=True`."""
        found = trainer.progress_bar_metrics | ({} if self._loss is None else {"train/loss": self._loss})
        shown = {name: format(found[key], form) for key, (name, form) in _SHOWN.items() if key in found}
        return shown | {key: value for key, value in found.items() if key not in _SHOWN}


class _OnItsWay:
    """A number on its way from a device to the host."""

    def __init__(self, number: Tensor) -> None:
        self.value = number.to("cpu", non_blocking=number.is_cuda)  # a GPU's goes into pinned memory
        self._sent = torch.cuda.Event() if number.is_cuda else None
        if self._sent is not None:
            self._sent.record()

    def arrived(self) -> bool:
        """Whether `value` may be read."""
        return self._sent is None or self._sent.query()
