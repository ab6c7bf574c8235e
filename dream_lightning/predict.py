"""Predictions as a file that grows with every batch, and goes on where it stopped."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.distributed.tensor import DTensor

from dream_lightning.answer_file import AnswerFile, read_predictions
from dream_lightning.batch import Answers, PromptBatch
from dream_lightning.errors import UserError

T = TypeVar("T")


class PredictionWriter(L.Callback):
    """Write `predict`'s answers to a JSON Lines file, one question a line, in the order of the questions.

    The file grows while `predict` runs, on one process or several. Started again with the same weights, questions and
    sampling, also after a kill or on another number of processes, it keeps what is there, leaves those questions out
    and adds the others. The progress bar (Lightning's TQDMProgressBar) shows the tokens a second of all processes.

    Args:
        path: the file, by default `predictions.jsonl` in the folder that the logger has for this name, such as
            `lightning_logs/tiny`; its settings stand beside it in `<path>.settings.json`, and while `predict` runs
            answers whose turn has not come in `<path>.part-…`. All processes must see it.
        overwrite: start anew although the file is there.
        show: how many predictions to print as a table at the end.

    Raises:
        UserError: the file is there and comes from other weights, questions, prompting, sampling or precision; another
            process is writing it.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False, show: int = 10) -> None:
        self.path = None if path is None else Path(path)
        self.overwrite, self.show = overwrite, show
        self._file: AnswerFile | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out what is already answered, before the questions are put into batches."""
        if stage != "predict":
            return
        if self.path is None:
            self.path = _logger_folder(trainer) / "predictions.jsonl"
        data = trainer.datamodule
        self._file = file = AnswerFile(self.path)
        self._weights, self._written, self._seen, self._tokens = None, 0, 0, 0
        self._settings = {
            "pretrained": pl_module.pretrained,
            "sampling": asdict(pl_module.sampling),
            "precision": trainer.precision,
            **(data.question_settings() if hasattr(data, "question_settings") else {"questions": None}),
        }
        numbers = data.question_numbers() if hasattr(data, "question_numbers") else None
        done = _on_first(trainer, lambda: file.open(numbers, self._settings, overwrite=self.overwrite))
        if done:
            data.skip_questions(done)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold the weights against the file's; Lightning loads a checkpoint after `setup` only."""
        self._weights = _fingerprint(pl_module)
        settings = {**self._settings, "weights": self._weights}
        self._file.join(_on_first(trainer, lambda: self._file.start_run(settings)))
        self._since = time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Answers,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch; the first process puts into the file what has its turn."""
        rows = zip(batch.sample_ids.tolist(), outputs.predictions, outputs.counted, strict=True)
        lines = [(number, json.dumps(asdict(p), ensure_ascii=False)) for number, p, counted in rows if counted]
        self._file.append(trainer.global_rank, lines)
        self._written += len(lines)
        if trainer.is_global_zero:
            self._advance()
            bar = trainer.progress_bar_callback
            if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
                speed = self._tokens / (time.perf_counter() - self._since)
                bar.predict_progress_bar.set_postfix_str(f"{speed:,.0f} tokens/s")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the file when the last process is done."""
        written = trainer.strategy.reduce(torch.tensor(self._written, device=pl_module.device), reduce_op="sum")
        _on_first(trainer, lambda: self._finish(int(written)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Show a few and the score of all, also when all were answered already."""
        if stage != "predict" or not trainer.is_global_zero:
            return
        console = Console()
        if self._weights is None:  # no question was open, so nothing has started
            if any(isinstance(p, DTensor) for p in pl_module.parameters()):  # the processes have parted already
                console.print("all questions were answered before: sharded weights are not compared with the file's")
            else:
                self._file.refuse_others({**self._settings, "weights": _fingerprint(pl_module)})
            self._file.finish()
        self._file.close()
        predictions = list(read_predictions(self.path))
        if self.show and predictions:
            console.print(_table(predictions[: self.show]))
        scored = [p for p in predictions if p["correct"] is not None]
        right, unparsed = sum(p["correct"] for p in scored), sum(p["answer"] is None for p in predictions)
        score = "none has a reference to be scored against"
        if scored:
            score = f"{right} of {len(scored)} scored are correct ({right / len(scored):.1%})"
        console.print(f"{len(predictions)} questions, {unparsed} without an answer; {score}", soft_wrap=True)
        console.print(Text(f"predictions: {self.path.resolve()}"), soft_wrap=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the file, for another try from the same process."""
        if self._file is not None:
            self._file.close()

    def _advance(self) -> None:
        new = self._file.advance()
        self._seen += len(new)
        self._tokens += sum(json.loads(line)["tokens"] for line in new)

    def _finish(self, written: int) -> None:
        self._advance()
        if self._seen != written:
            raise UserError(
                f"{written} answers were written and {self._seen} are to be seen from here: {self.path} must lie on a "
                "file system that all machines share; bring the files named .part- together there and start again"
            )
        self._file.finish()


def _on_first(trainer: L.Trainer, act: Callable[[], T]) -> T:
    """What `act` gives on the first process, on all; its ValueError too, so that none waits for one that left."""
    outcome = None
    if trainer.is_global_zero:
        try:
            outcome = act(), None
        except ValueError as error:
            outcome = None, str(error)
    result, complaint = trainer.strategy.broadcast(outcome)
    if complaint is not None:
        raise UserError(complaint)
    return result


def _logger_folder(trainer: L.Trainer) -> Path:
    """Where all runs of one name log, whatever their version; without a logger the trainer's own folder."""
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    return Path(logger.save_dir) / (logger.name or "")


def _fingerprint(module: L.LightningModule) -> str:
    """A hash of about a thousand elements of every weight, whatever file it came from; of all of 7B it takes 10 s.

    Sharded weights are gathered one by one, so all processes must call it.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        flat = whole.detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, len(flat) // 1000)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _table(predictions: list[dict[str, Any]]) -> Table:
    table = Table(title="Predictions", show_lines=False)
    for column, width in (("question", 44), ("prediction", 24), ("reference", 16), ("correct", 7)):
        table.add_column(column, max_width=width, overflow="ellipsis", no_wrap=True)
    for p in predictions:
        mark = Text(*{True: ("yes", "green"), False: ("no", "red"), None: ("–", "")}[p["correct"]])
        answer = "(unparsed)" if p["answer"] is None else p["answer"]
        reference = "–" if p["reference"] is None else p["reference"]
        # Text, so that brackets in it are not taken for rich's markup
        table.add_row(*(Text(" ".join(text.split())) for text in (p["prompt"], answer, reference)), mark)
    return table
