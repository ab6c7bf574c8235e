"""The progress bar, short enough for a terminal."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

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
    """

    _step = -1  # optimiser step that was read last
    _shown: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)
    _between = False  # two optimiser steps

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Move on; read the scalars once an optimiser step, because reading makes the process wait for a GPU."""
        self._between = trainer.global_step == self._step
        super().on_train_batch_end(trainer, *arguments)
        self._between, self._step = False, trainer.global_step

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The scalars above, in this order, then others that were logged with `prog_bar=True`."""
        if self._between:
            return self._shown
        found = trainer.progress_bar_metrics
        shown = {name: format(found[key], form) for key, (name, form) in _SHOWN.items() if key in found}
        self._shown = shown | {key: value for key, value in found.items() if key not in _SHOWN}
        return self._shown
