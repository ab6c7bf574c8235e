"""The bar holds in a terminal and shows what README says."""

from types import SimpleNamespace

import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from dream_lightning.callbacks import ProgressBar


def test_names_are_short_and_the_most_important_come_first():
    found = {
        "train/data_wait_share": 0.0123,
        "train/tokens_per_second": 10448.2,
        "train/useful_share": 0.991,
        "train/mfu": 0.4312,
        "train/peak_memory_gib": 19.94,
        "train/loss": torch.tensor(0.61234567),
        "val/nll": 0.5,
        "val/accuracy": 0.96875,
        "mine": 3,
    }
    shown = ProgressBar().get_metrics(SimpleNamespace(progress_bar_metrics=found), None)
    assert list(shown.items()) == [
        ("loss", "0.6123"),
        ("val_nll", "0.5"),
        ("val_acc", "96.9%"),
        ("tok/s", "10,448"),
        ("mfu", "43.1%"),
        ("GiB", "19.9"),
        ("useful", "99%"),
        ("wait", "1%"),
        ("mine", 3),
    ]


def test_scalars_are_read_once_an_optimiser_step(monkeypatch):
    """Reading makes the process wait for the device; between two steps there is nothing new."""

    class Trainer:
        global_step, reads = 0, 0

        @property
        def progress_bar_metrics(self):
            self.reads += 1
            return {"train/loss": torch.tensor(float(self.global_step))}

    trainer, shown = Trainer(), []
    monkeypatch.setattr(
        TQDMProgressBar, "on_train_batch_end", lambda bar, trainer, *_: shown.append(bar.get_metrics(trainer, None))
    )
    bar = ProgressBar()
    for step in (0, 0, 1, 1, 1, 2):  # the optimiser steps after the third and the last micro-batch
        trainer.global_step = step
        bar.on_train_batch_end(trainer, None, None, None, 0)
    assert [s["loss"] for s in shown] == ["0", "0", "1", "1", "1", "2"]
    assert trainer.reads == 3
    bar.get_metrics(trainer, None)  # as at the end of a validation, which logs too
    assert trainer.reads == 4
