"""The bar holds in a terminal and shows what README says."""

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


@pytest.mark.parametrize(
    ("micro_batches", "steps", "asked_for", "seen"),
    [
        (1, (0, 0, 1, 1, 1, 2, 3), [1, 2, 3], [None, None, None, "1", "1", "1", "2"]),
        (2, (1, 2, 3, 4), [1, 3], [None, None, "1", "1"]),  # the next one is asked for when the last has arrived
    ],
)
def test_the_loss_is_shown_when_it_has_arrived(monkeypatch, micro_batches, steps, asked_for, seen):
    """Nobody waits for it between two micro-batches; at the end of an epoch one does."""

    class OnItsWay:
        def __init__(self, number):
            self.value, self.polls = number, 0
            asked.append(float(number))

        def arrived(self):
            self.polls += 1
            return self.polls > micro_batches

    asked, shown = [], []
    trainer = SimpleNamespace(global_step=0, callback_metrics={}, progress_bar_metrics={})
    monkeypatch.setattr(progress, "_OnItsWay", OnItsWay)
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
    assert asked == asked_for and shown == seen
    bar.on_train_epoch_end(trainer, None)
    assert shown[-1] == str(steps[-1])


def test_on_a_cpu_the_loss_is_there_at_once():
    number = progress._OnItsWay(torch.tensor(0.5))
    assert number.arrived() and float(number.value) == 0.5
