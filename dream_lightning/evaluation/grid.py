"""Accuracy against speed: one benchmark answered with every combination of sampling options."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dream_lightning.atomic import write_texts
from dream_lightning.errors import UserError
from dream_lightning.evaluation.evaluate import evaluate
from dream_lightning.evaluation.pages import grid_page
from dream_lightning.evaluation.statistics import aup
from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams


def combinations(sampling: SamplingParams, grid: dict[str, Sequence[Any]]) -> dict[str, SamplingParams]:
    """Name, such as `steps=64,alg=entropy` → options, for every combination that is valid; the others are printed.

    Raises:
        UserError: an unknown option, an empty list, or no combination is valid.
    """
    known = vars(sampling).keys()
    for option, values in grid.items():
        if option not in known or not isinstance(values, list | tuple) or not values:
            raise UserError(f"grid has {option}: {values!r}, wanted options of sampling ({', '.join(known)}) and lists")
    found, reason = {}, "the grid is empty"
    for values in itertools.product(*grid.values()):
        name = ",".join(f"{option}={value}" for option, value in zip(grid, values, strict=True))
        try:
            found[name] = replace(sampling, **dict(zip(grid, values, strict=True)))
        except UserError as error:
            reason = f"{name}: {error}"
            print(f"left out: {reason}")
    if not found or not grid:
        raise UserError(f"no combination of the grid is valid; {reason}")
    return found


def evaluate_grid(
    model: DreamModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    name: str,
    grid: dict[str, list[Any]],
    out: str | Path = "grid",
    sampling: SamplingParams = SamplingParams(forbid_mask=True),  # noqa: B008 (frozen)
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a benchmark with every combination; writes `grid.json` and `grid.html`, and returns the former.

    Started again, it resumes. `aup` is the area under accuracy × tokens per forward, see `statistics.aup`.

    Args:
        grid: option of SamplingParams → values, such as `{"steps": [64, 128], "threshold": [null, 0.9]}`.
        out: the folder to write; each combination is the folder of an evaluation in it.
        sampling: the options that the grid does not name.
        options: those of `evaluate`.

    Raises:
        UserError: as `combinations` and `evaluate`.
    """
    out, rows = Path(out).expanduser(), []
    for number, (label, params) in enumerate(combinations(sampling, grid).items()):
        folder = out / f"{number:03}-{re.sub('[^-_.=,0-9A-Za-z]', '_', label):.100}"  # a name on every system
        card = evaluate(model, tokenizer, [task], name=name, out=folder, sampling=params, **options)
        (scores,) = card["tasks"].values()
        if "accuracy" not in scores:
            raise UserError(f"{task} has no question that can be scored: a grid needs references")
        timing = json.loads((folder / "timing.json").read_text("utf-8"))
        (speed,) = timing["tasks"].values()
        kept = {key: scores[key] for key in ("accuracy", "interval", "tokens_per_forward")}
        rows.append({"sampling": label, **kept, "tokens_per_second": speed["tokens_per_second"]})
    result = {"model": name, "task": task, "device": timing["device"], "rows": rows}
    result["aup"] = aup([(row["tokens_per_forward"], row["accuracy"]) for row in rows])
    files = {"grid.html": grid_page(result), "grid.json": json.dumps(result, indent=2, ensure_ascii=False) + "\n"}
    write_texts(out, files)
    return result
