"""Answers of `predict` in a JSON Lines file: every rank appends to a part of its own; the end merges the parts."""

import errno
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.distributed.tensor import DTensor

from dream_lightning.atomic import PARTIAL, atomic_write, lock, on_rank_zero, remove_locked, write_texts
from dream_lightning.batch import Answers, PromptBatch
from dream_lightning.errors import UserError, reading
from dream_lightning.tasks import proportion_interval
from dream_lightning.training.fsdp import whole

REMEDY = "Move it away, or write elsewhere (predict: --trainer.callbacks.path=FILE, evaluate: --out=FOLDER)"


class PredictionFile:
    """The file at `path`, and next to it what makes `predict` safe to kill and resume.

    - `<path>.rank-<r>.jsonl`: what rank r has answered, one JSON object per line, in any order. The rank holds a lock
      on its part while it runs. A kill can tear only the last line, which is then removed and answered again.
    - `<path>.settings.json`: what the answers depend on.
    - `<path>`: all answers, sorted by `number`, the position of the question. Written atomically at the end.

    Rank 0 calls all methods, the others only `append` and `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = path.with_name(f"{path.name}.settings.json")
        self._part: BinaryIO | None = None

    def open(self, settings: dict[str, Any], *, resumable: bool = True, overwrite: bool = False) -> set[int]:
        """Lock the file and return the numbers of the questions that are answered.

        Raises:
            UserError: another process is writing; the answers have other settings, or are there and not `resumable`;
                the file cannot be written.
        """
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part = self._locked(self._part_of(0))
            for part in self._parts():
                with nullcontext(self._part) if part == self._part_of(0) else self._locked(part) as file:
                    file.truncate(0 if overwrite else part.read_bytes().rfind(b"\n") + 1)
            if overwrite:
                self.path.unlink(missing_ok=True)
            answered = self._read()
        if not answered and not (self.path.exists() and self.path.stat().st_size):
            self._settings.unlink(missing_ok=True)  # of a run that ended before its first answer
            return set()
        self.check(settings)
        if not resumable:
            raise UserError(f"{self.path} has answers, and only an S1KDataModule leaves their questions out. {REMEDY}")
        return set(answered)

    def check(self, settings: dict[str, Any]) -> None:
        """Raise UserError if a setting differs from that of the answers, or they have none."""
        with reading(self._settings, "a JSON object", REMEDY):
            before = dict(json.loads(self._settings.read_text("utf-8"))) if self._settings.exists() else {}
        now = json.loads(json.dumps(settings))  # tuples become lists
        changed = [name for name in now if before.get(name, ...) != now[name]]
        if changed:
            told = "; ".join(f"{name} was {before.get(name)!r:.160} and is {now[name]!r:.160}" for name in changed)
            raise UserError(f"{self.path} was written with other settings: {told}. {REMEDY}")

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Save what the answers depend on. Comes before the first answer."""
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_texts(self._settings.parent, {self._settings.name: text})

    def append(self, rank: int, answers: dict[int, dict[str, Any]]) -> None:
        """Append answers, keyed by the number of the question, to the rank's part."""
        lines = [json.dumps({"number": n, **answer}, ensure_ascii=False) + "\n" for n, answer in answers.items()]
        content = "".join(lines).encode()
        with self._writing():
            if self._part is None:
                self._part = self._locked(self._part_of(rank))
            if self._part.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def merge(self, count: int) -> None:
        """Write all `count` answers in order and remove the parts. The other ranks have closed theirs."""
        lines = self._read()
        if len(lines) != count:
            raise UserError(
                f"{count} answers were written but {len(lines)} found: all ranks must see the folder of {self.path} "
                "(copy the files .rank-… there and run predict again), and sample ids must not repeat"
            )
        with atomic_write(self.path) as partial:
            partial.write_bytes(b"".join(lines[number] for number in sorted(lines)))
        for leftover in (*self._parts(), *self.path.parent.glob(f"{glob.escape(self.path.name)}*{PARTIAL}")):
            if self._part is None or leftover != Path(self._part.name):
                leftover.unlink()
        if self._part is not None:
            remove_locked(self._part)
            self._part = None

    def close(self) -> None:
        """Release the lock, and remove a part without answers."""
        if self._part is not None:
            state = os.fstat(self._part.fileno())
            if state.st_size == 0 and state.st_nlink:
                remove_locked(self._part)
            self._part.close()
            self._part = None

    def _part_of(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank-{rank}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank-*.jsonl"))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}); the answers in it are kept. Make room, or "
                "set --trainer.callbacks.path=FILE in a folder of your own"
            ) from error

    def _locked(self, part: Path) -> BinaryIO:
        return lock(
            part, f"another predict is writing {self.path}: wait for it or end it, or set --trainer.callbacks.path=FILE"
        )

    def _read(self) -> dict[int, bytes]:
        """Whole lines of the merged file and of all parts, by number."""
        lines: dict[int, bytes] = {}
        for file in (self.path, *self._parts()):
            for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
                try:
                    if line.endswith(b"\n"):
                        lines.setdefault(json.loads(line)["number"], line)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(f"{file} has a line that is no prediction ({line!r:.160}). {REMEDY}") from error
        return lines


class PredictionWriter(L.Callback):
    """Write the answers of `predict` to a JSON Lines file, one question per line, in the order of the questions.

    `predict` resumes: with the same weights, questions and sampling, also after a kill or on another number of
    processes, it adds the missing answers. Lightning's TQDMProgressBar shows tokens per second of all processes.

    Args:
        path: by default `predictions.jsonl` in the folder of the logger's name, such as `lightning_logs/tiny`. All
            processes must see that folder.
        overwrite: discard the answers that are there.

    Raises:
        UserError: there are answers with other settings; another process is writing the file.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.overwrite = overwrite
        self._file: PredictionFile | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the answered questions before the questions are put into batches."""
        if stage != "predict":
            return
        if self.path is None:  # not in the folder of one version of the logger: predict resumes
            logger = trainer.logger
            named = logger is not None and logger.save_dir
            folder = Path(logger.save_dir, logger.name or "") if named else Path(trainer.default_root_dir)
            self.path = folder / "predictions.jsonl"
        data = trainer.datamodule
        resumable = hasattr(data, "skip_questions")
        self._settings = {"pretrained": pl_module.pretrained, "precision": trainer.precision}
        self._settings |= {f"sampling.{name}": value for name, value in asdict(pl_module.sampling).items()}
        self._settings |= data.question_settings() if resumable else {"questions": None}
        self._file = file = PredictionFile(self.path)
        self._started, self._written, self._tokens = False, 0, 0
        self._answered = on_rank_zero(
            trainer.strategy, lambda: file.open(self._settings, resumable=resumable, overwrite=self.overwrite)
        )
        if self._answered:
            data.skip_questions(self._answered)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the weights, too: Lightning loads a checkpoint after `setup`."""
        self._settings["weights"] = weights_fingerprint(pl_module)
        if self._answered:
            on_rank_zero(trainer.strategy, lambda: self._file.check(self._settings))
        on_rank_zero(trainer.strategy, lambda: self._file.write_settings(self._settings))
        self._started, self._since = True, time.perf_counter()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Answers, batch: PromptBatch, *indices: int
    ) -> None:
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
        if not trainer.is_global_zero:
            self._file.close()
        written = trainer.strategy.reduce(torch.tensor(self._written, device=pl_module.device), reduce_op="sum")
        on_rank_zero(trainer.strategy, lambda: self._file.merge(len(self._answered) + int(written)))

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
        predictions = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        verdicts = [p["correct"] for p in predictions if p["correct"] is not None]
        right, scored = sum(verdicts), len(verdicts)
        told, counts = ["none could be scored"], {"too long": sum(p["too_long"] for p in predictions)}
        if scored:
            low, high = proportion_interval(right, scored)
            share = f"{right / scored:.1%}, 95 % interval {low:.1%} to {high:.1%}"
            told = [f"{right} of {scored} scored are correct ({share})"]
            counts = {"not scored": len(predictions) - scored} | counts
        told += [f"{count} {what}" for what, count in counts.items() if count]
        unparsed = sum(p["answer"] is None for p in predictions)
        print(f"{len(predictions)} questions, {unparsed} without an answer; {', '.join(told)}: {self.path.resolve()}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Release the lock, so that the same process can try again."""
        if self._file is not None:
            self._file.close()


def weights_fingerprint(module: L.LightningModule) -> str:
    """A hash of about a thousand elements of every weight (10 s for 7B). All processes must call it: it gathers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = whole(tensor).detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, len(flat) // 1000)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
