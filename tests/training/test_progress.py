"""The progress bar is short, and shows a loss only when it has arrived on the host."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from dream_lightning.training import ProgressBar, progress


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
    assert ", ".join(f"{name} {value}" for name, value in shown.items()) == (
        "loss 0.6123, val_nll 0.5, val_acc 96.9%, tok/s 10,448, mfu 43.1%, GiB 19.9, useful 99%, wait 1%, mine 3"
    )


@pytest.mark.parametrize(
    ("polls", "steps", "copied", "seen"),
    [
        (0, (0, 1, 2, 3), [1, 2, 3], [None, None, "1", "2"]),  # on a CPU
        (1, (0, 1, 1, 1, 2, 2, 3), [1, 2, 3], [None, None, None, "1", "1", "1", "2"]),
        (2, (1, 2, 3, 4), [1, 4], [None, None, None, "1"]),  # the next copy starts when the last has arrived
    ],
)
def test_the_loss_is_shown_when_it_has_arrived(monkeypatch, polls, steps, copied, seen):
    """Between two micro-batches nothing synchronizes; at the end of an epoch the bar does."""

    class AsyncCopy(progress._AsyncCopy):
        def __init__(self, number):
            super().__init__(number)
            self.polls = 0
            copies.append(float(number))

        def done(self):
            self.polls += 1
            return super().done() and self.polls > polls

    copies, shown = [], []
    trainer = SimpleNamespace(global_step=0, callback_metrics={}, progress_bar_metrics={})
    monkeypatch.setattr(progress, "_AsyncCopy", AsyncCopy)
    for hook in ("on_train_batch_end", "on_train_epoch_end"):
        monkeypatch.setattr(
            TQDMProgressBar, hook, lambda bar, trainer, *_: shown.append(bar.get_metrics(trainer, None).get("loss"))
        )
    bar = ProgressBar()
    for step in steps:  # done after this micro-batch
        trainer.global_step = step
        if step:
            trainer.callback_metrics["train/loss"] = torch.tensor(float(step))
        bar.on_train_batch_end(trainer, None, None, None, 0)
    assert copies == copied and shown == seen
    bar.on_train_epoch_end(trainer, None)
    assert shown[-1] == str(steps[-1])
