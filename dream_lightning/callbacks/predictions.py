"""Predictions as a file that grows with every batch, and goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dream_lightning.types import Answers


class PredictionWriter(L.Callback):
    """Write `predict`'s answers to a JSON Lines file, one question a line, as each batch is done.

    Started again with the same checkpoint and sampling, it keeps the lines that are there, leaves their questions out
    and appends the rest. A line torn by a kill is removed.

    Args:
        path: the file, by default `predictions.jsonl` in the folder that the logger has for this name, such as
            `lightning_logs/tiny`; its settings stand beside it in `<path>.settings.json`.
        overwrite: start anew although the file is there.
        show: how many predictions to print as a table at the end.

    Raises:
        ValueError: the file is there and comes from other weights, questions, prompting or sampling.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False, show: int = 10) -> None:
        self.path = None if path is None else Path(path)
        self.overwrite, self.show = overwrite, show

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out what is already answered, before the questions are put into batches."""
        if stage != "predict":
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"predict runs on {trainer.world_size} processes, but one file is written by one: set trainer.devices=1"
            )
        if self.path is None:
            self.path = _logger_folder(trainer) / "predictions.jsonl"
        self._settings = {
            "pretrained": pl_module.pretrained,
            "questions": getattr(trainer.datamodule, "question_source", None),
            "prompting": getattr(trainer.datamodule, "prompting", None),
            "sampling": asdict(pl_module.sampling),
        }
        self._weights = None
        if self.overwrite or not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")
            return
        self._refuse_others(self._settings)
        _drop_torn_line(self.path)
        done = {line["id"] for line in read_predictions(self.path)}
        if done and not hasattr(trainer.datamodule, "skip_questions"):
            raise ValueError(
                f"{self.path} holds {len(done)} answers, but these dataloaders cannot leave questions out: predict "
                "with an S1KDataModule, or set overwrite to true on the PredictionWriter"
            )
        if done:
            trainer.datamodule.skip_questions(done)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold the weights against the file's; Lightning loads a checkpoint after `setup` only."""
        self._weights = _fingerprint(pl_module)
        settings = {**self._settings, "weights": self._weights}
        if self.path.stat().st_size:
            self._refuse_others(settings)
        else:
            self._beside.write_text(json.dumps(settings, indent=2) + "\n")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Answers,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch, whole lines only."""
        lines = [
            json.dumps(asdict(prediction), ensure_ascii=False) + "\n"
            for prediction, counted in zip(outputs.predictions, outputs.counted, strict=True)
            if counted
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Show a few and the score of all, also when all were answered already."""
        if stage != "predict":
            return
        if self._weights is None:  # no question was open, so nothing has started
            self.on_predict_start(trainer, pl_module)
        predictions = list(read_predictions(self.path))
        console = Console()
        if self.show and predictions:
            console.print(_table(predictions[: self.show]))
        scored = [p for p in predictions if p["correct"] is not None]
        right, unparsed = sum(p["correct"] for p in scored), sum(p["answer"] is None for p in scored)
        share = f" ({right / len(scored):.1%}), {unparsed} without an answer" if scored else ""
        console.print(f"{len(predictions)} questions answered, {right} of {len(scored)} scored are correct{share}")
        console.print(Text(f"predictions: {self.path.resolve()}"), soft_wrap=True)

    @property
    def _beside(self) -> Path:
        return self.path.with_name(self.path.name + ".settings.json")

    def _refuse_others(self, settings: dict[str, Any]) -> None:
        earlier = json.loads(self._beside.read_text()) if self._beside.exists() else {}
        if changed := [name for name, value in settings.items() if earlier.get(name, ...) != value]:
            raise ValueError(
                f"{self.path} was written with other settings ({', '.join(changed)} differ, see {self._beside}): move "
                "it away, name another path, or set overwrite to true on the PredictionWriter"
            )


def read_predictions(path: str | Path) -> Iterable[dict[str, Any]]:
    """The lines of a predictions file."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _logger_folder(trainer: L.Trainer) -> Path:
    """Where all runs of one name log, whatever their version; without a logger the trainer's own folder."""
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    return Path(logger.save_dir) / (logger.name or "")


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)


def _fingerprint(module: L.LightningModule) -> str:
    """A hash of about a thousand elements of every weight, whatever file it came from; of all of 7B it takes 10 s."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
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
