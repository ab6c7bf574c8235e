"""One page and one Markdown file from any runs: what differs, scores with intervals, curves, texts and cost."""

import json
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib import pyplot, rc_context

from dream_lightning.atomic import write_texts
from dream_lightning.evaluation.card import percent
from dream_lightning.evaluation.pages import STYLES, intervals, new_figure, page, svg, table
from dream_lightning.evaluation.statistics import student_interval
from dream_lightning.experiments.pruning import import_optuna, open_study
from dream_lightning.experiments.runs import Run, differing, find_runs

_CURVES = ("train/loss", "val/nll", "val/accuracy", "train/gradient_norm")
_MOST = 8  # runs whose curves have a color and a name; the best ones
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
    if groups := _groups(found, monitor, min if mode == "min" else max):
        blocks += [("heading", "Seeds: mean and 95 % interval"), ("table", groups)]
    if differ := differing(found):
        blocks += [("heading", "What differs"), ("table", _settings(found, differ))]
    blocks += [b for tag in _CURVES for b in _curve(tag, found, order[:_MOST])]
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


def _groups(runs: list[Run], monitor: str, best: Any) -> tuple[list[str], list[list[str]]] | None:
    """Runs of a sweep that differ in their seed only."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        if run.record and run.curves.get(monitor):
            groups.setdefault(run.record["name"].rpartition(",seed=")[0], []).append(best(run.curves[monitor].values()))
    rows = []
    for name, values in groups.items():
        if name and len(values) > 1:
            low, high = student_interval(values)
            rows.append([name, str(len(values)), f"{fmean(values):.4f} [{low:.4f}, {high:.4f}]"])
    return (["variant", "seeds", f"best {monitor}"], rows) if rows else None


def _settings(runs: list[Run], differ: dict[str, list[Any]]) -> tuple[list[str], list[list[str]]]:
    """One line for each option; one for each run if there are more runs than options."""
    texts = {name: [v if isinstance(v, str) else json.dumps(v) for v in values] for name, values in differ.items()}
    if len(runs) <= len(differ):
        return ["option", *(run.name for run in runs)], [[name, *values] for name, values in texts.items()]
    return ["run", *texts], [[run.name, *values] for run, *values in zip(runs, *texts.values(), strict=True)]


def _curve(tag: str, runs: list[Run], named: list[Run]) -> list[Block]:
    if not (runs := [run for run in runs if run.curves.get(tag)]):
        return []
    figure, axes = new_figure(3.5)
    for run in runs:
        points = sorted(run.curves[tag].items())
        style = {"color": "#bbb"}
        if run in named:
            style = STYLES[named.index(run)] | {"label": run.name, "zorder": 3, "markevery": -(-len(points) // 15)}
        axes.plot([step for step, _ in points], [value for _, value in points], linewidth=1, markersize=4, **style)
    axes.set_xlabel("step")
    axes.set_ylabel(tag)
    if any(run in named for run in runs):
        axes.legend(frameon=False, fontsize=8)
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
