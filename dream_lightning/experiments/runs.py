"""What a folder of runs holds: settings, curves, texts, scores and cost of every run."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dream_lightning.errors import UserError, reading
from dream_lightning.evaluation.card import Item
from dream_lightning.evaluation.compare import read_run

Curve = dict[int, float]  # step → value

# Where a run writes and resumes, not what it does.
_OUTPUTS = (
    *("trainer.logger", "trainer.callbacks", "trainer.default_root_dir"),
    *("checkpoint.dirpath", "autosave.dirpath", "ckpt_path"),
)
_TEXTS = "/text_summary"  # TensorBoard's suffix of texts


@dataclass
class Run:
    """One training or evaluation."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # dotted option → value
    curves: dict[str, Curve] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # the last of each tag
    seconds: float | None = None  # between the first and the last logged value, without the time between restarts
    record: dict[str, Any] = field(default_factory=dict)  # run.json of a sweep
    cards: list[dict[str, Any]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    def total(self, tag: str) -> float | None:
        """The last value of a scalar that counts up."""
        return max(self.curves[tag].values()) if self.curves.get(tag) else None


def find_runs(path: str | Path) -> list[Run]:
    """Every run in a folder, at any depth: those with TensorBoard or CSV metrics, and evaluations.

    An evaluation within the folder of a training belongs to it.

    Raises:
        UserError: the folder does not exist or holds no run, or a file in it is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path} is no folder, wanted the folder of a fit, a sweep or an evaluation: correct the path")
    metrics = {file.parent for name in ("events.out.tfevents.*", "metrics.csv") for file in path.rglob(name)}
    cards = {file.parent for file in path.rglob("card.json")}
    runs = []
    for folder in sorted(metrics | cards):
        if folder in cards and any(parent in metrics for parent in folder.parents):
            continue
        run = _read(folder, "/".join([path.resolve().name, *folder.relative_to(path).parts]))
        for card in sorted(c for c in cards if c == folder or folder in c.parents):
            read, items = read_run(card)
            run.cards.append(read)
            run.items += items
        if folder not in metrics:
            run.settings = _flat(run.cards[0]["settings"] | {"model": run.cards[0]["model"]["name"]})
        runs.append(run)
    if not runs:
        raise UserError(
            f"{path} holds no run: no TensorBoard events, metrics.csv or card.json; name the folder of a fit, a sweep "
            "or an evaluation"
        )
    return runs


def _read(folder: Path, name: str) -> Run:
    run = Run(name)
    for file in (folder / "config.yaml", folder / "hparams.yaml"):
        if file.exists() and not run.settings:
            with reading(file, "a YAML file"):
                run.settings = _flat(yaml.safe_load(file.read_text("utf-8")) or {})
    if (record := folder / "run.json").exists():
        with reading(record, "a JSON object"):
            run.record = dict(json.loads(record.read_text("utf-8")))
    for file in sorted(folder.glob("events.out.tfevents.*")):  # their names begin with the time
        _add_events(run, file)
    if (table := folder / "metrics.csv").exists():
        with reading(table, "the file of a CSVLogger"), table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for tag, text in row.items():
                    if text and tag not in ("step", "epoch"):
                        _add(run, tag, int(row["step"]), float(text))
    return run


def _add_events(run: Run, file: Path) -> None:
    with reading(file, "an event file of TensorBoard"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    counted = {tag: run.total(tag) or 0.0 for tag in ("train/tokens", "train/device_hours")}
    times = []
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            times.append(event.wall_time)
            _add(run, tag, event.step, event.value + counted.get(tag, 0.0))  # a resumed run counts from 0
    if times:
        run.seconds = (run.seconds or 0.0) + max(times) - min(times)
    for tag in events.Tags()["tensors"]:
        if tag.endswith(_TEXTS):
            run.texts[tag.removesuffix(_TEXTS)] = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


def _add(run: Run, tag: str, step: int, value: float) -> None:
    if math.isfinite(value):
        run.curves.setdefault(tag, {})[step] = value


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _leaves(settings) if not name.startswith(_OUTPUTS)}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Option → its value in every run, None if it has none; only the options in which the runs differ."""
    names = {name: None for run in runs for name in run.settings}
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}
