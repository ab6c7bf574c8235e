"""The progress bar is short, and shows a loss only when it has arrived on the host."""

import io
import logging
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from material import quiet_trainer, tiny_data, tiny_module

from dream_lightning.training import ProgressBar, progress

FOUND = {
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


def test_a_narrow_terminal_leaves_out_the_least_important_numbers(monkeypatch):
    bar, trainer = ProgressBar(), SimpleNamespace(progress_bar_metrics=FOUND, global_step=12)
    bar._began, bar._total = (0.0, 2), 1002
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 50.0))
    line = progress._Line(file=io.StringIO(), total=1002, initial=12, ncols=80, bar_format=progress._Line.FORMAT)
    line.items = [f"{name} {value}" for name, value in bar.get_metrics(trainer, None).items()]
    line.step = "12/1,002"
    assert str(line).startswith("loss 0.6123 val_acc 96.9% tok/s 10,448 eta 1:22:30 |") and len(str(line)) == 80
    line.ncols = 160
    all_of_it = "eta 1:22:30 val_nll 0.5 GiB 19.9 mfu 43.1% useful 99% wait 1% mine 3 |"
    assert all_of_it in str(line) and len(str(line)) == 160


class Talker(L.Callback):
    def on_train_batch_end(self, *_):
        print("printed", end="")
        print(" in parts")
        logging.getLogger("lightning.pytorch").info("logged")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_printed_meanwhile_has_its_own_lines(sums, tmp_path, monkeypatch, terminal):
    """In a terminal above the bar; elsewhere there is no bar but a line for each validation and the end."""
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    handler, logger = logging.StreamHandler(screen), logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    with redirect_stdout(screen):
        options = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0, "enable_progress_bar": True}
        trainer = quiet_trainer(Talker(), ProgressBar(seconds=1000), **options)
        trainer.fit(tiny_module(), tiny_data(sums, tmp_path, validation_questions=0))
        assert sys.stdout is screen and handler.stream is screen
    logger.removeHandler(handler)
    text = screen.getvalue()
    lines = [line.rpartition("\r")[2] for line in text.splitlines()]
    assert lines.count("printed in parts") == lines.count("logged") == 4
    assert ("\r" in text) is terminal
    shown = [line for line in lines if "4/4" in line and "loss" in line and "val_nll" in line]
    assert shown and all(line.startswith("loss" if terminal else "step 4/4 · epoch") for line in shown)


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
    bar = ProgressBar()
    monkeypatch.setattr(bar, "_show", lambda *_: shown.append(bar.get_metrics(trainer, None).get("loss")))
    bar._plain, bar._total = False, None
    for step in steps:  # done after this micro-batch
        trainer.global_step, bar._drawn = step, 0.0
        if step:
            trainer.callback_metrics["train/loss"] = torch.tensor(float(step))
        bar.on_train_batch_end(trainer, None, None, None, 0)
    assert copies == copied and shown == seen
    bar.on_train_epoch_end(trainer, None)
    assert shown[-1] == str(steps[-1])
