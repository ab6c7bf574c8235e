"""Answers of several processes, killed at any time, as one JSON Lines file in the order of the questions."""

import fcntl
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dream_lightning.errors import UserError

Line = tuple[int, str]  # number of the question in the set, its answer as JSON


class AnswerFile:
    """The file at `path`, and beside it what makes it safe to stop and go on.

    - `<path>.settings.json`: what the answers belong to, and the names of the runs that wrote them.
    - `<path>.part-<run>-<rank>`: what one process of one run has answered, in any order, a line `number<TAB>JSON` each.
      Only that process writes it, so nothing has to be waited for.

    The first process moves lines from the parts to the file when their turn comes: at any time the file is the
    beginning of the finished one. A kill tears at most the last line of each. The parts of named runs only are taken up
    again: a process that outlived the kill of its run, or belongs to a file that was removed, does no harm.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beside = path.with_name(path.name + ".settings.json")
        self._run = ""
        self._ahead: dict[int, str] = {}  # read from parts, their turn has not come
        self._next = 0  # number whose turn it is
        self._read: dict[Path, int] = {}  # part → bytes of it that were read
        self._lock: Any = None

    # ── the first process ────────────────────────────────────────────────────────────────────────────────────────

    def open(self, numbers: Mapping[str, int] | None, settings: dict[str, Any], *, overwrite: bool = False) -> set[int]:
        """Take the file, and find out what is answered.

        Args:
            numbers: id → number of every question; None if they are not known, then nothing can go on.
            settings: names and values that must be those of the answers in the file.
            overwrite: remove what is there.

        Raises:
            UserError: another process is writing it; it is not ours, or of other settings; it cannot go on.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = self.path.exists() and not overwrite  # without the file, parts and settings are a removed one's
        self._take()
        if not known:
            self._remove_parts()
            self._beside.unlink(missing_ok=True)
            self.path.write_text("")
        if self.path.stat().st_size:
            self.refuse_others(settings)  # before anything is touched
        runs = self._stated().get("runs", [])
        answered = {number: line for part in self._parts(runs) for number, line in _whole_lines(part, 0)[0]}
        if not answered and not self.path.stat().st_size:
            self._beside.unlink(missing_ok=True)  # a run that died before its first answer
            self._remove_parts()
            return set()
        self.refuse_others(settings)
        if numbers is None:
            raise UserError(
                f"{self.path} holds answers, but these dataloaders cannot leave questions out: predict with an "
                "S1KDataModule, or set overwrite to true on the PredictionWriter"
            )
        out_of_turn = self._cut_to_its_beginning(numbers, runs)
        self._ahead = {n: line for n, line in (answered | out_of_turn).items() if n >= self._next}
        done = {*range(self._next), *self._ahead}
        self._move()
        return done

    def refuse_others(self, settings: dict[str, Any]) -> None:
        """Compare with what stands beside the file.

        Raises:
            UserError: a value differs, or there are none.
        """
        stated = self._stated()
        changed = [name for name, value in settings.items() if stated.get(name, ...) != _plain(value)]
        if changed:
            told = "; ".join(_difference(name, stated.get(name), _plain(settings[name])) for name in changed)
            raise UserError(
                f"{self.path} was written with other settings ({', '.join(changed)} differ): {told}. Move it away, "
                "or set path or overwrite of the PredictionWriter: --trainer.callbacks.path=FILE, "
                "--trainer.callbacks.overwrite=true"
            )

    def start_run(self, settings: dict[str, Any]) -> str:
        """Note the settings and a new run; returns the run's name, for all its processes.

        Raises:
            UserError: there are answers already, of other settings.
        """
        if self._next or self._ahead:
            self.refuse_others(settings)
        run = uuid.uuid4().hex[:8]
        runs = [*self._stated().get("runs", []), run]
        new = self._beside.with_name(self._beside.name + ".new")
        new.write_text(json.dumps({**settings, "runs": runs}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self._beside)  # whole or not at all
        return run

    def advance(self) -> list[str]:
        """Read what all processes of this run have appended, and move what has its turn; returns the new lines.

        Raises:
            UserError: a number comes twice.
        """
        new: list[str] = []
        for part in self._parts([self._run]):
            lines, self._read[part] = _whole_lines(part, self._read.get(part, 0))
            for number, line in lines:
                if number < self._next or number in self._ahead:
                    raise UserError(f"two questions have the sample id {number}: number them 0, 1, 2, … in the batches")
                self._ahead[number] = line
                new.append(line)
        self._move()
        return new

    def finish(self) -> None:
        """All processes are done: what is left, where questions were left out, follows in order; the parts go."""
        self.advance()
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(self._ahead.pop(number) + "\n" for number in sorted(self._ahead)))
        self._remove_parts()

    def close(self) -> None:
        """Let another process take the file."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ── every process ────────────────────────────────────────────────────────────────────────────────────────────

    def join(self, run: str) -> None:
        """Write in this run from now on."""
        self._run = run

    def append(self, rank: int, lines: list[Line]) -> None:
        """Keep answers, whole lines only."""
        with self._part(self._run, rank).open("a", encoding="utf-8") as file:
            file.write("".join(f"{number}\t{line}\n" for number, line in lines))

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self) -> None:
        self.close()
        self._lock = self.path.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise UserError(f"another predict is writing {self.path}: wait for it, or name another path") from None

    def _cut_to_its_beginning(self, numbers: Mapping[str, int], runs: list[str]) -> dict[int, str]:
        """Leave questions 0, 1, … up to the first one missing; whole lines after it go to a part and are returned."""
        out_of_turn: dict[int, str] = {}
        position, self._next = 0, 0
        with self.path.open("rb") as file:
            for content in file:
                if not content.endswith(b"\n"):
                    break  # torn by a kill
                number = self._number(content, numbers)
                if number == self._next and not out_of_turn:
                    self._next, position = self._next + 1, position + len(content)
                else:
                    out_of_turn.setdefault(number, content.decode("utf-8").rstrip("\n"))
        if out_of_turn:
            with self._part(runs[-1], f"moved-{uuid.uuid4().hex[:8]}").open("w", encoding="utf-8") as part:
                part.write("".join(f"{number}\t{line}\n" for number, line in out_of_turn.items()))
        with self.path.open("r+b") as file:
            file.truncate(position)
        return out_of_turn

    def _number(self, content: bytes, numbers: Mapping[str, int]) -> int:
        try:
            return numbers[json.loads(content)["id"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} has a line that answers none of the questions ({_short(content.decode(errors='replace'))}"
                "): remove that line, move the file away, or set overwrite to true on the PredictionWriter"
            ) from error

    def _move(self) -> None:
        lines = []
        while self._next in self._ahead:
            lines.append(self._ahead.pop(self._next) + "\n")
            self._next += 1
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    def _part(self, run: str, rank: int | str) -> Path:
        return self.path.with_name(f"{self.path.name}.part-{run}-{rank}")

    def _parts(self, runs: list[str]) -> list[Path]:
        files = self.path.parent.iterdir()
        return sorted(f for f in files for run in runs if f.name.startswith(self._part(run, "").name))

    def _remove_parts(self) -> None:
        for part in [f for f in self.path.parent.iterdir() if f.name.startswith(f"{self.path.name}.part-")]:
            part.unlink()

    def _stated(self) -> dict[str, Any]:
        return json.loads(self._beside.read_text(encoding="utf-8")) if self._beside.exists() else {}


def read_predictions(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a predictions file."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _whole_lines(part: Path, start: int) -> tuple[list[Line], int]:
    """The lines of a part from byte `start` on, and where they end; one that is torn or still being written waits."""
    with part.open("rb") as file:
        file.seek(start)
        content = file.read()
    content = content[: content.rfind(b"\n") + 1]
    lines = []
    for line in content.decode("utf-8").split("\n")[:-1]:
        number, _, answer = line.partition("\t")
        lines.append((int(number), answer))
    return lines, start + len(content)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):  # name only the parts that differ
        parts = [part for part in {**before, **now} if before.get(part, ...) != now.get(part, ...)]
        return "; ".join(_difference(f"{name}.{part}", before.get(part), now.get(part)) for part in parts)
    return f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}…"
