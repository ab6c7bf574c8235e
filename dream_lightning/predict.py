"""Answers of `predict` in a JSON Lines file: every rank appends to a part of its own; the end merges the parts."""

import fcntl
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.distributed.tensor import DTensor

from dream_lightning.atomic import PARTIAL, atomic_write
from dream_lightning.batch import Answers, PromptBatch
from dream_lightning.errors import UserError

T = TypeVar("T")
REMEDY = "Move it away, or set --trainer.callbacks.path=FILE or --trainer.callbacks.overwrite=true"


class PredictionFile:
    """The file at `path`, and next to it what makes `predict` safe to kill and resume.

    - `<path>.rank-<r>.jsonl`: what rank r has answered, one JSON object per line, in any order. The rank holds a lock
      on its part while it runs. A kill can tear only the last line, which is then ignored and answered again.
    - `<path>.settings.json`: what the answers depend on.
    - `<path>`: all answers, sorted by `number`, the position of the question. Written in one atomic step at the end;
      then the parts are removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings_path = path.with_name(f"{path.name}.settings.json")
        self._part: BinaryIO | None = None

    # Methods of rank 0

    def open(self, settings: dict[str, Any], *, resumable: bool = True, overwrite: bool = False) -> set[int]:
        """Lock the file and return the numbers of the questions that are answered.

        Args:
            settings: what the answers depend on, as far as it is known.
            resumable: whether questions can be left out.
            overwrite: remove the answers that are there.

        Raises:
            UserError: another process is writing; there are answers with other settings, or not resumable ones.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._locked(self._part_of(0))
        for part in self._parts():
            with nullcontext(self._part) if part == self._part_of(0) else self._locked(part) as file:
                file.truncate(0 if overwrite else part.read_bytes().rfind(b"\n") + 1)
        if overwrite:
            self.path.unlink(missing_ok=True)
        answered = self._read()
        if not answered and not (self.path.exists() and self.path.stat().st_size):
            self._settings_path.unlink(missing_ok=True)  # of a run that ended before its first answer
            return set()
        self.check(settings)
        if not resumable:
            raise UserError(
                f"{self.path} has answers, but these dataloaders cannot leave questions out: predict with an "
                f"S1KDataModule. {REMEDY}"
            )
        return set(answered)

    def check(self, settings: dict[str, Any]) -> None:
        """Compare settings with those of the answers.

        Raises:
            UserError: a value differs, or the answers have no settings.
        """
        stated = json.loads(self._settings_path.read_text("utf-8")) if self._settings_path.exists() else {}
        settings = json.loads(json.dumps(settings))  # tuples become lists
        changed = [name for name, value in settings.items() if stated.get(name, ...) != value]
        if changed:
            told = "; ".join(_difference(name, stated.get(name), settings[name]) for name in changed)
            raise UserError(
                f"{self.path} was written with other settings ({', '.join(changed)} differ): {told}. {REMEDY}"
            )

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Save what the answers depend on. Comes before the first answer."""
        with atomic_write(self._settings_path) as partial:
            partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def merge(self, count: int) -> None:
        """Write all answers in order and remove the parts, when every rank has closed its own.

        Raises:
            UserError: there are not `count` answers.
        """
        lines = self._read()
        if len(lines) != count:
            raise UserError(
                f"{count} answers were written but {len(lines)} found: all ranks must see the folder of {self.path} "
                "(copy the files .rank-… there and run predict again), and sample ids must not repeat"
            )
        with atomic_write(self.path) as partial, partial.open("wb") as file:
            file.writelines(lines[number] for number in sorted(lines))
        for leftover in (*self._parts(), *self.path.parent.glob(f"{glob.escape(self.path.name)}*{PARTIAL}")):
            leftover.unlink()

    # Methods of every rank

    def append(self, rank: int, answers: dict[int, dict[str, Any]]) -> None:
        """Append answers, keyed by the number of the question, to the rank's part."""
        if self._part is None:
            self._part = self._locked(self._part_of(rank))
        lines = [json.dumps({"number": n, **answer}, ensure_ascii=False) + "\n" for n, answer in answers.items()]
        self._part.write("".join(lines).encode())
        self._part.flush()

    def close(self) -> None:
        """Release the lock, and remove a part without answers."""
        if self._part is not None:
            state = os.fstat(self._part.fileno())
            if state.st_size == 0 and state.st_nlink:
                os.unlink(self._part.name)
            self._part.close()
            self._part = None

    def _part_of(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank-{rank}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank-*.jsonl"))

    def _locked(self, part: Path) -> BinaryIO:
        file = part.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError("removed by the process that held the lock")
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another predict is writing {self.path}: wait for it or end it, or set --trainer.callbacks.path=FILE"
            ) from None
        return file

    def _read(self) -> dict[int, bytes]:
        """Whole lines of the merged file and of all parts, by number."""
        lines: dict[int, bytes] = {}
        for file in (self.path, *self._parts()):
            for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
                if line.endswith(b"\n"):
                    lines.setdefault(_number(line, file), line)
        return lines


class PredictionWriter(L.Callback):
    """Write the answers of `predict` to a JSON Lines file, one question per line, in the order of the questions.

    If `predict` is started again with the same weights, questions and sampling, also after a kill or on another number
    of processes, it keeps the answers that are there and adds the missing ones. The progress bar (Lightning's
    TQDMProgressBar) shows tokens per second: those of rank 0 times the number of processes.

    Args:
        path: the file, by default `predictions.jsonl` in the folder of the logger's name, such as
            `lightning_logs/tiny`. All processes must see that folder; see `PredictionFile` for the other files in it.
        overwrite: discard the answers that are there.

    Raises:
        UserError: there are answers from other weights, questions, prompts, sampling or precision; another process is
            writing the file.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.overwrite = overwrite
        self._file: PredictionFile | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the answered questions before the questions are put into batches."""
        if stage != "predict":
            return
        if self.path is None:
            self.path = _logger_folder(trainer) / "predictions.jsonl"
        data = trainer.datamodule
        resumable = hasattr(data, "skip_questions")
        self._settings = {
            "pretrained": pl_module.pretrained,
            "sampling": asdict(pl_module.sampling),
            "precision": trainer.precision,
            **(data.question_settings() if resumable else {"questions": None}),
        }
        self._file = file = PredictionFile(self.path)
        self._started, self._written, self._tokens = False, 0, 0
        self._answered = _on_rank_zero(
            trainer, lambda: file.open(self._settings, resumable=resumable, overwrite=self.overwrite)
        )
        if self._answered:
            data.skip_questions(self._answered)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the weights, too: Lightning loads a checkpoint after `setup`."""
        settings = {**self._settings, "weights": weights_fingerprint(pl_module)}

        def start() -> None:
            if self._answered:
                self._file.check(settings)
            self._file.write_settings(settings)

        _on_rank_zero(trainer, start)
        self._started, self._since = True, time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Answers,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch to this rank's part."""
        rows = zip(batch.sample_ids.tolist(), outputs.predictions, outputs.counted, strict=True)
        answers = {number: asdict(prediction) for number, prediction, counted in rows if counted}
        self._file.append(trainer.global_rank, answers)
        self._written += sum(outputs.counted)
        self._tokens += sum(answer["tokens"] for answer in answers.values())
        bar = trainer.progress_bar_callback
        if trainer.is_global_zero and isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            speed = self._tokens * trainer.world_size / (time.perf_counter() - self._since)
            bar.predict_progress_bar.set_postfix_str(f"{speed:,.0f} tokens/s")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the parts when the last rank is done."""
        if not trainer.is_global_zero:
            self._file.close()
        written = trainer.strategy.reduce(torch.tensor(self._written, device=pl_module.device), reduce_op="sum")
        _on_rank_zero(trainer, lambda: self._file.merge(len(self._answered) + int(written)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the score. If all questions were answered before, `on_predict_start` and `_end` have not run."""
        if stage != "predict" or not trainer.is_global_zero:
            return
        if not self._started:
            if any(isinstance(p, DTensor) for p in pl_module.parameters()):  # the other ranks may have left
                print("all questions were answered before; sharded weights were not compared with those of the file")
            else:
                self._file.check({**self._settings, "weights": weights_fingerprint(pl_module)})
            self._file.merge(len(self._answered))
        self._file.close()
        with self.path.open(encoding="utf-8") as file:
            predictions = [(p["answer"], p["correct"]) for p in map(json.loads, file)]
        verdicts = [correct for _, correct in predictions if correct is not None]
        score = f"{sum(verdicts)} of {len(verdicts)} scored are correct" if verdicts else "none could be scored"
        unparsed = sum(answer is None for answer, _ in predictions)
        print(f"{len(predictions)} questions, {unparsed} without an answer; {score}: {self.path.resolve()}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Release the lock, so that the same process can try again."""
        if self._file is not None:
            self._file.close()


def weights_fingerprint(module: L.LightningModule) -> str:
    """A hash of about a thousand elements of every weight, independent of the file they came from (10 s for 7B).

    All processes must call it: sharded weights are gathered one by one.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        flat = whole.detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, len(flat) // 1000)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _on_rank_zero(trainer: L.Trainer, act: Callable[[], T]) -> T:
    """Broadcasts what `act` returns on rank 0, or its UserError, so that all ranks raise it."""
    outcome = None
    if trainer.is_global_zero:
        try:
            outcome = act(), None
        except UserError as error:
            outcome = None, str(error)
    result, message = trainer.strategy.broadcast(outcome)
    if message is not None:
        raise UserError(message)
    return result


def _logger_folder(trainer: L.Trainer) -> Path:
    """Where all versions of the logger's name are; without a logger the trainer's own folder."""
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    return Path(logger.save_dir) / (logger.name or "")


def _number(line: bytes, file: Path) -> int:
    try:
        return json.loads(line)["number"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} has a line that is no prediction ({_short(line.decode(errors='replace'))}): remove it. {REMEDY}"
        ) from error


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):  # name only the entries that differ
        entries = [entry for entry in {**before, **now} if before.get(entry, ...) != now.get(entry, ...)]
        return "; ".join(_difference(f"{name}.{entry}", before.get(entry), now.get(entry)) for entry in entries)
    return f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}…"
