"""The progress bar: the important numbers first in a terminal, plain lines in a log."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partialmethod
from typing import Any, TextIO

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from dream_lightning.batch import PromptBatch
from dream_lightning.errors import check_range

# scalar → name and format in the bar; the logger gets whole names and all digits
_SHOWN = {
    "train/loss": ("loss", ".4g"),
    "val/accuracy": ("val_acc", ".1%"),
    "train/tokens_per_second": ("tok/s", ",.0f"),
    "eta": ("eta", ""),
    "val/nll": ("val_nll", ".4g"),
    "train/peak_memory_gib": ("GiB", ".1f"),
    "train/mfu": ("mfu", ".1%"),
    "train/useful_share": ("useful", ".0%"),
    "train/data_wait_share": ("wait", ".0%"),
}
_HOOKS = {"val": "validation", "test": "test", "predict": "predict"}  # Lightning's names of a bar and of its hooks
_BAR = 8  # columns that the bar itself gets at least
_REFRESH = 0.1  # seconds


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over the steps of the whole fit; numbers that do not fit the terminal are left out.

    It shows `train/loss`, `val/accuracy`, the scalars of `Throughput`, `val/nll`, and the time that is left, and never
    synchronizes with the GPU: the loss is copied asynchronously, so it is about one micro-batch old. For other scalars
    on a GPU that a module logs with `prog_bar=True`, Lightning synchronizes after every micro-batch. What is printed
    meanwhile appears above the bar.

    Args:
        refresh_rate: batches between two updates; 0 shows nothing.
        seconds: where stdout is no terminal, such as a file: print one line every so many seconds instead of the bar.
    """

    fetches_loss = True  # DreamModule then logs the loss without showing it
    _step = -1  # optimizer step of the last copy
    _loss: float | None = None
    _copy: "_AsyncCopy | None" = None
    _began: tuple[float, int] | None = None  # time and step at the end of the first step
    _drawn = 0.0
    _wrapped: ExitStack | None = None

    def __init__(self, refresh_rate: int = 1, seconds: float = 10.0) -> None:
        check_range("ProgressBar's seconds", seconds, least=0)
        super().__init__(refresh_rate)
        self.seconds = seconds

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._plain, self._total = not sys.stdout.isatty(), None
        if self.is_enabled and not self._plain and self._wrapped is None:
            self._stdout, self._wrapped = sys.stdout, _print_above_bars(sys.stdout)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._wrapped is not None:
            self._wrapped.close()
            self._wrapped = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()  # leaves the cursor on a new line
        self.teardown(trainer, pl_module, "")

    @property
    def is_disabled(self) -> bool:  # of the bars, not of the lines
        return self._plain or super().is_disabled

    def init_train_tqdm(self) -> "_Line":
        options = {"disable": self.is_disabled, "leave": True, "dynamic_ncols": True, "bar_format": _Line.FORMAT}
        return self._on_terminal(lambda: _Line(file=sys.stdout, **options))

    def _init_tqdm(self, stage: str) -> Tqdm:
        return self._on_terminal(getattr(super(), f"init_{stage}_tqdm"))

    init_sanity_tqdm = partialmethod(_init_tqdm, "sanity")
    init_validation_tqdm = partialmethod(_init_tqdm, "validation")
    init_test_tqdm = partialmethod(_init_tqdm, "test")
    init_predict_tqdm = partialmethod(_init_tqdm, "predict")

    def _on_terminal(self, make: Callable[[], Tqdm]) -> Tqdm:
        with redirect_stdout(getattr(self, "_stdout", sys.stdout)):
            return make()

    def on_train_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        super().on_train_start(trainer, *arguments)
        steps = trainer.estimated_stepping_batches
        self._total = None if steps == float("inf") else int(steps)
        self.train_progress_bar.total, self._began, self._drawn = self._total, None, time.monotonic()

    def on_train_epoch_start(self, *arguments: Any) -> None:
        """Do not begin again: the bar is that of the whole fit."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        """Show the last loss that has arrived; start copying that of a new step."""
        if self._copy is not None and self._copy.done():
            self._loss, self._copy = float(self._copy.value), None
        if self._copy is None and self._step != trainer.global_step and "train/loss" in trainer.callback_metrics:
            self._copy, self._step = _AsyncCopy(trainer.callback_metrics["train/loss"]), trainer.global_step
        if self._began is None:
            self._began = time.monotonic(), trainer.global_step  # the first step compiles
        if self._is_due(arguments[-1] + 1):
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self._loss, self._copy = float(loss), None
        if not self._plain:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def _on_batch_start(self, stage: str, trainer: L.Trainer, module: Any, batch: Any, *index: int) -> None:
        getattr(super(), f"on_{_HOOKS[stage]}_batch_start")(trainer, module, batch, *index)
        bar: Tqdm = getattr(self, f"{stage}_progress_bar")
        if bar.desc != f"{_kind(batch)}: ":
            bar.set_description(_kind(batch))

    on_validation_batch_start = partialmethod(_on_batch_start, "val")
    on_test_batch_start = partialmethod(_on_batch_start, "test")
    on_predict_batch_start = partialmethod(_on_batch_start, "predict")

    def _on_batch_end(self, stage: str, trainer: L.Trainer, module: Any, out: Any, batch: Any, *index: int) -> None:
        getattr(super(), f"on_{_HOOKS[stage]}_batch_end")(trainer, module, out, batch, *index)
        if self._plain and self._is_due(index[0] + 1):
            self._drawn = time.monotonic()
            total = getattr(self, f"total_{stage}_batches_current_dataloader")
            print(f"{_kind(batch)} {index[0] + 1}/{total} batches", flush=True)

    on_validation_batch_end = partialmethod(_on_batch_end, "val")
    on_test_batch_end = partialmethod(_on_batch_end, "test")
    on_predict_batch_end = partialmethod(_on_batch_end, "predict")

    def _is_due(self, batches: int) -> bool:
        enough = self.is_enabled and batches % self.refresh_rate == 0
        return enough and time.monotonic() - self._drawn >= (self.seconds if self._plain else _REFRESH)

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._drawn = time.monotonic()
        items = [f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items()]
        step = f"{trainer.global_step:,}" + (f"/{self._total:,}" if self._total else "")
        if not self._plain:
            bar = self.train_progress_bar
            bar.items, bar.step, bar.n = items, step, trainer.global_step
            bar.refresh()
        elif self.is_enabled and items and trainer.is_global_zero:
            print(" · ".join([f"step {step}", f"epoch {trainer.current_epoch}", *items]), flush=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The scalars above, in this order, then others that were logged with `prog_bar=True`."""
        found = trainer.progress_bar_metrics | ({} if self._loss is None else {"train/loss": self._loss})
        if (left := self._seconds_left(trainer)) is not None:
            found["eta"] = Tqdm.format_interval(left)
        shown = {name: format(found[key], form) for key, (name, form) in _SHOWN.items() if key in found}
        return shown | {key: value for key, value in found.items() if key not in _SHOWN and key != "v_num"}

    def _seconds_left(self, trainer: L.Trainer) -> float | None:
        """Of the whole fit, at the speed since its first step, with the validations that were made."""
        began, step = self._began or (0.0, trainer.global_step)
        if self._total is None or trainer.global_step <= step:
            return None
        return (time.monotonic() - began) / (trainer.global_step - step) * (self._total - trainer.global_step)


class _Line(Tqdm):
    """The numbers that fit, the bar, and the step."""

    FORMAT = "{shown}|{bar}| {step}"
    items: Sequence[str] = ()
    step = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        about = super().format_dict
        left = (about["ncols"] or 80) - len(self.step) - 3 - _BAR
        shown = ""
        for item in self.items:
            if len(shown) + len(item) + 1 > left:
                break
            shown += f"{item} "
        return about | {"shown": shown, "step": self.step}


def _kind(batch: Any) -> str:
    return "answering questions" if isinstance(batch, PromptBatch) else "likelihood"


class _AboveBars:
    """A stream whose whole lines are printed above the bars on `terminal`, which are drawn again below."""

    def __init__(self, stream: TextIO, terminal: TextIO) -> None:
        self._stream, self._terminal, self._line = stream, terminal, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            with Tqdm.external_write_mode(file=self._terminal):
                self._stream.write("\n".join([*lines, ""]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _print_above_bars(terminal: TextIO) -> ExitStack:
    """Replace the streams that are terminals, also in handlers of logging; closing undoes it."""
    undo, replaced = ExitStack(), {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream.isatty():
            replaced[stream] = _AboveBars(stream, terminal)
            setattr(sys, name, replaced[stream])
            undo.callback(setattr, sys, name, stream)
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for handler in {h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)}:
        if (stream := handler.stream) in replaced:
            handler.setStream(replaced[stream])
            undo.callback(handler.setStream, stream)
    return undo


class _AsyncCopy:
    """A number that is being copied from its device to the host."""

    def __init__(self, number: Tensor) -> None:
        self.value = number.to("cpu", non_blocking=number.is_cuda)  # into pinned memory
        self._event = torch.cuda.Event() if number.is_cuda else None
        if self._event is not None:
            self._event.record()

    def done(self) -> bool:
        return self._event is None or self._event.query()
