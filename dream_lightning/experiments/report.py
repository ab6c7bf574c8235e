"""One page and one Markdown file from any runs: what differs, scores with intervals, curves, texts and cost."""

import json
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from matplotlib import pyplot, rc_context

from dream_lightning.atomic import write_texts
from dream_lightning.evaluation.card import percent
from dream_lightning.evaluation.pages import STYLES, intervals, new_figure, page, svg, table
from dream_lightning.evaluation.statistics import student_interval
from dream_lightning.experiments.pruning import import_optuna, open_study
from dream_lightning.experiments.runs import Run, differing, find_runs
from dream_lightning.tasks import proportion_interval

_CURVES = ("train/loss", "val/nll", "val/accuracy", "train/gradient_norm")
_MOST = 8  # curves with a color and a name, and runs whose texts are shown; the best ones
_LONGEST = 4000  # characters of a run's texts

Block = tuple[str, Any]  # kind → content: heading, table, html or text


def report(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "report",
    monitor: str = "val/nll",
    mode: Literal["min", "max"] = "min",
) -> list[Run]:
    """Write `report.html`, self-contained, and `report.md` about any runs, and return the runs.

    Args:
        runs: folders of `fit` with TensorBoard or CSV metrics, of `sweep` and of `evaluate`.
        out: the folder to write.
        monitor: the scalar that says which run is best.
        mode: `min` if a lower one is better, else `max`.

    Raises:
        UserError: a folder holds no run, or a file in it is damaged.
    """
    found = [run for path in runs for run in find_runs(path)]
    sign = 1 if mode == "min" else -1
    order = sorted(found, key=lambda run: min((sign * v for v in run.curves.get(monitor, {}).values()), default=9e99))
    blocks: list[Block] = [("table", _summary(found, monitor, min if mode == "min" else max))]
    groups = _groups(order)
    if seeds := _seeds(groups, monitor, min if mode == "min" else max):
        head = ["variant", "seeds", f"best {monitor}"]
        blocks += [("heading", "Seeds: mean and 95 % interval"), ("table", (head, seeds))]
    if differ := differing(found):
        blocks += [("heading", "What differs"), ("table", _settings(found, differ))]
    blocks += [b for tag in _CURVES for b in _curve(tag, groups)]
    blocks += _scores(found)
    for path in map(Path, runs):
        if (path / "study.log").exists():
            blocks += [("heading", "Search"), *(("html", text) for text in _study_plots(path / "study.log", mode))]
    for run in order[:_MOST]:
        if texts := _sample(run):
            blocks += [("heading", f"Texts of {run.name}"), ("text", texts)]
    title = f"Report of {len(found)} runs" if len(found) > 1 else f"Report of {found[0].name}"
    files = {"report.html": page(title, [_html(*block) for block in blocks]), "report.md": _markdown(title, blocks)}
    write_texts(Path(out).expanduser(), files)
    return found


def _summary(runs: list[Run], monitor: str, best: Any) -> tuple[list[str], list[list[str]]]:
    columns: dict[str, list[str]] = {"run": [run.name for run in runs]}
    columns["state"] = [run.record.get("state", "") for run in runs]
    columns[f"best {monitor}"] = [_best(run, monitor, best) for run in runs]
    for task in {task: None for run in runs for card in run.cards for task in card["tasks"]}:
        scores = [next((c["tasks"][task] for c in run.cards if task in c["tasks"]), {}) for run in runs]
        columns[task] = [percent(s["accuracy"], s["interval"]) if "accuracy" in s else "" for s in scores]
        for name in ("empty", "terminated"):
            columns[f"{task} {name}"] = [percent(s[name]) if name in s else "" for s in scores]
    columns["steps"] = [f"{max(max(c) for c in run.curves.values()) + 1:,}" if run.curves else "" for run in runs]
    columns["tokens"] = [_number(run.total("train/tokens"), ",.0f") for run in runs]
    columns["minutes"] = [_number(None if run.seconds is None else run.seconds / 60, ",.1f") for run in runs]
    columns["device hours"] = [_number(run.total("train/device_hours"), ".3g") for run in runs]
    kept = {name: values for name, values in columns.items() if any(values)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def _best(run: Run, monitor: str, best: Any) -> str:
    curve = run.curves.get(monitor)
    if not curve:
        return ""
    step = best(curve, key=curve.__getitem__)
    return f"{curve[step]:.4f} (step {step + 1:,})"


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Name → a run, or the runs of a sweep that differ in their seed only."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.record and run.name.rpartition(",seed=")[0]) or run.name, []).append(run)
    return groups


def _seeds(groups: dict[str, list[Run]], monitor: str, best: Any) -> list[list[str]]:
    rows = []
    for name, runs in groups.items():
        values = [best(run.curves[monitor].values()) for run in runs if run.curves.get(monitor)]
        if len(values) > 1:
            low, high = student_interval(values)
            rows.append([name, str(len(values)), f"{fmean(values):.4f} [{low:.4f}, {high:.4f}]"])
    return rows


def _settings(runs: list[Run], differ: dict[str, list[Any]]) -> tuple[list[str], list[list[str]]]:
    """One line for each option; one for each run if there are more runs than options."""
    texts = {name: [v if isinstance(v, str) else json.dumps(v) for v in values] for name, values in differ.items()}
    if len(runs) <= len(differ):
        return ["option", *(run.name for run in runs)], [[name, *values] for name, values in texts.items()]
    return ["run", *texts], [[run.name, *values] for run, *values in zip(runs, *texts.values(), strict=True)]


def _points(tag: str, runs: list[Run]) -> tuple[np.ndarray, str]:
    """Step, mean of the runs, lower and upper end of its bar [4, steps]; and what the bars are, if there are any."""
    curves = [run.curves.get(tag, {}) for run in runs]
    values = {step: [curve[step] for curve in curves if step in curve] for step in sorted(set().union(*curves))}
    counts = {step: round(runs[0].curves.get("val/scored", {}).get(step, 0)) for step in values}
    if scored := len(runs) == 1 and tag == "val/accuracy" and all(counts.values()):
        ends = {step: proportion_interval(round(v[0] * counts[step]), counts[step]) for step, v in values.items()}
    else:
        ends = {step: (min(v), max(v)) for step, v in values.items()}
    note = "95 % interval" if scored else "range of seeds" if len(runs) > 1 else ""
    return np.array([(step, fmean(v), *ends[step]) for step, v in values.items()]).T, note


def _curve(tag: str, groups: dict[str, list[Run]]) -> list[Block]:
    drawn = {n: _points(tag, runs) for n, runs in groups.items() if any(run.curves.get(tag) for run in runs)}
    if not drawn:
        return []
    notes = " or ".join({note: None for _, note in drawn.values() if note})
    figure, axes = new_figure(3.2 + 0.2 * min(len(drawn), _MOST))
    width = max(points[0].max() for points, _ in drawn.values())
    for number, name in enumerate(groups):
        if name in drawn:
            (steps, means, low, high), note = drawn[name]
            every, style = -(-len(steps) // 15), {"color": "#bbb", "linewidth": 1}
            if number < _MOST:
                label = name if len(groups[name]) == 1 else f"{name} ({len(groups[name])} seeds)"
                style |= STYLES[number] | {"label": label, "markersize": 4, "markevery": every, "zorder": 3}
                steps = steps + number * width / 150  # bars side by side
            bars = np.maximum([means - low, high - means], 0) if note and number < _MOST else None
            axes.errorbar(steps, means, yerr=bars, errorevery=every, capsize=2, **style)
    axes.set_xlabel(f"step; bars: {notes}" if notes else "step")
    axes.set_ylabel(tag)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return [("heading", tag), ("html", svg(figure))]


def _scores(runs: list[Run]) -> list[Block]:
    blocks: list[Block] = []
    for task in {task: None for run in runs for card in run.cards for task in card["tasks"]}:
        cards = [(run.name, card["tasks"].get(task, {})) for run in runs for card in run.cards]
        points = [(name, s["accuracy"], *s["interval"]) for name, s in cards if "accuracy" in s]
        if points:
            blocks += [("heading", f"Accuracy: {task}"), ("html", intervals(points, "accuracy, 95 % interval"))]
    return blocks


def _study_plots(file: Path, mode: str) -> list[str]:
    study, _ = open_study(str(file), mode=mode)
    warnings.filterwarnings("ignore", category=import_optuna().exceptions.ExperimentalWarning)
    from optuna.visualization import matplotlib as plots

    drawn = []
    with rc_context():  # Optuna sets a style
        drawable = [plots.plot_optimization_history, plots.plot_slice]
        if any(trial.intermediate_values for trial in study.trials):
            drawable.insert(1, plots.plot_intermediate_values)
        for plot in drawable:
            axes = plot(study)
            figure = getattr(axes, "figure", None) or axes.flat[0].figure
            drawn.append(svg(figure))
            pyplot.close(figure)
    return drawn


def _sample(run: Run) -> str:
    if run.items:
        names = ("prompt", "prediction", "answer", "reference")
        return "\n\n".join("\n".join(f"{n}: {i[n]}" for n in names) for i in run.items[:5])[:_LONGEST]
    return run.texts.get("val/samples", "")[:_LONGEST]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _html(kind: str, content: Any) -> str:
    if kind == "table":
        return table(*content)
    if kind == "text":
        return f"<details><summary>show</summary><pre>{escape(content)}</pre></details>"
    return f"<h2>{escape(content)}</h2>" if kind == "heading" else content


def _markdown(title: str, blocks: list[Block]) -> str:
    """Without the figures."""
    lines = [f"# {title}", ""]
    for (kind, content), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "heading" and following[0] != "html":
            lines += [f"## {content}", ""]
        elif kind == "table":
            head, rows = content
            cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
            cells.insert(1, ["---"] * len(head))
            lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
        elif kind == "text":
            lines += [*(f"    {line}" for line in content.splitlines()), ""]
    return "\n".join(lines)
