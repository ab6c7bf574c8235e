"""Self-contained HTML pages of a card and of a comparison, and the model card for a hub."""

import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dream_lightning.evaluation.card import Item, percent

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d0d0d0, #444); --soft: light-dark(#f4f4f4, #222) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse } td, th { border-bottom: 1px solid var(--line) }
td, th { padding: .3rem .5rem; text-align: left; vertical-align: bottom } td { white-space: nowrap }
td.n, th.n { text-align: right } figure { margin: 1rem 0 }
svg { width: 100%; max-width: 44rem; height: auto }
@media (prefers-color-scheme: dark) { svg { filter: invert(.93) hue-rotate(180deg) } }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem .7rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; border-radius: .4rem }
.two { display: grid; gap: 1rem } @media (min-width: 45rem) { .two { grid-template-columns: 1fr 1fr } }
.note { color: light-dark(#555, #aaa) }
"""
_SCORES = {  # name → key of a card's task, share or number
    "accuracy": ("accuracy", True),
    "unparsed": ("unparsed", True),
    "empty": ("empty", True),
    "terminated": ("terminated", True),
    "tokens": ("mean_tokens", False),
    "thinking tokens": ("mean_thinking_tokens", False),
    "tokens/forward": ("tokens_per_forward", False),
}
# Of lines: colors that color-blind readers can tell apart (Okabe and Ito), each with a marker of its own.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f5539")
STYLES = [{"color": color, "marker": marker} for color, marker in zip(_COLORS, "os^DvPX*", strict=True)]
_ACCURACY = "accuracy, 95 % interval"
_MOST_TEXTS = 200  # on a page; items.jsonl has all


def card_page(card: dict[str, Any], items: Sequence[Item], timing: dict[str, Any]) -> str:
    """The page of `evaluate`: scores, plots, breakdowns, settings and texts."""
    tasks, blocks = card["tasks"], []
    head = ["benchmark", "n", *_SCORES, "tokens/s"]
    rows = [
        [name, s["scored"], *(_shown(s, *key) for key in _SCORES.values()), timing["tasks"][name]["tokens_per_second"]]
        for name, s in tasks.items()
    ]
    blocks.append(table(head, rows))
    sampled = [
        [name, key, percent(value)]
        for name, s in tasks.items()
        for key, value in s.items()
        if key.startswith(("pass@", "maj@"))
    ]
    if sampled:
        blocks.append("<h2>Several answers to a question</h2>" + table(["benchmark", "score", "value"], sampled))
    scored = {name: s for name, s in tasks.items() if "accuracy" in s}
    if scored:
        points = [(name, s["accuracy"], *s["interval"]) for name, s in scored.items()]
        blocks.append("<h2>Accuracy</h2>" + intervals(points, _ACCURACY))
    blocks.append("<h2>Length of answers</h2>" + _lengths(items))
    for name, s in scored.items():
        for column, groups in s["groups"].items():
            points = [(f"{value} ({g['scored']})", g["accuracy"], *g["interval"]) for value, g in groups.items()]
            blocks.append(f"<h2>{escape(name)} by {escape(column)}</h2>" + intervals(points, _ACCURACY))
    blocks.append("<h2>Answers</h2>" + _texts(items))
    settings = {key: card[key] for key in ("model", "settings", "versions")} | {"device": timing["device"]}
    blocks.append(f"<h2>Settings</h2><pre>{escape(json.dumps(settings, indent=2, ensure_ascii=False))}</pre>")
    return page(f"Evaluation of {card['model']['name']}", blocks)


def comparison_page(comparison: dict[str, Any], flips: Iterable[tuple[Item, Item]]) -> str:
    """The page of `compare`: differences with intervals, and the questions whose verdict changed."""
    a, b = comparison["a"], comparison["b"]
    head = ["benchmark", "n", "A", "B", "B − A", "p (McNemar)", "only A right", "only B right"]
    rows = [
        [
            *(name, s["scored"], percent(s["accuracy_a"]), percent(s["accuracy_b"])),
            percent(s["difference"], s["interval"]),
            *("–" if s["p"] is None else f"{s['p']:.3g}", len(s["only_a"]), len(s["only_b"])),
        ]
        for name, s in comparison["tasks"].items()
    ]
    points = [(name, s["difference"], *s["interval"]) for name, s in comparison["tasks"].items()]
    blocks = [f"<p>A: {escape(a)}<br>B: {escape(b)}</p>", table(head, rows)]
    if differ := comparison["settings"]["differ"]:
        blocks.append(table(["what differs", "A", "B"], [[name, *values] for name, values in differ.items()]))
    blocks.append(intervals(points, "accuracy of B − A, 95 % interval", zero=True))
    blocks.append("<h2>Questions whose verdict changed</h2>")
    for n, (one, other) in enumerate(flips):
        if n == _MOST_TEXTS:
            blocks.append(f"<p class=note>The first {_MOST_TEXTS}; comparison.json names all.</p>")
            break
        better = "only B is right" if other["correct"] else "only A is right"
        texts = "".join(f"<div>{who}: {answer_block(item)}</div>" for who, item in (("A", one), ("B", other)))
        blocks.append(folded(f"{one['task']} · {one['id']} · {better}", one, f"<div class=two>{texts}</div>"))
    return page("Comparison", blocks)


def grid_page(grid: dict[str, Any]) -> str:
    """The page of `evaluate-grid`: a table, and accuracy against both measures of speed."""
    head = ["", "sampling", "accuracy [95 % interval]", "tokens/forward", "tokens/s"]
    rows = [
        [
            *(number, row["sampling"], percent(row["accuracy"], row["interval"])),
            *(f"{row['tokens_per_forward']:.2f}", f"{row['tokens_per_second']:,.0f}"),
        ]
        for number, row in enumerate(grid["rows"], 1)
    ]
    about = f"{grid['task']} · {grid['device']} · area under accuracy × tokens per forward (AUP): {grid['aup']:.1f}"
    blocks = [f"<p>{escape(about)}</p>", table(head, rows)]
    for key, label in (("tokens_per_forward", "tokens per forward"), ("tokens_per_second", "tokens/s")):
        figure, axes = new_figure(3.5)
        numbers: dict[tuple[float, float], list[str]] = {}  # of the rows at a point
        for number, row in enumerate(grid["rows"], 1):
            point, (low, high) = (row[key], row["accuracy"]), row["interval"]
            numbers.setdefault(point, []).append(str(number))
            error = [[max(row["accuracy"] - low, 0)], [max(high - row["accuracy"], 0)]]
            axes.errorbar(*point, yerr=error, fmt="o", color=_COLORS[0], capsize=4)
        for point, names in numbers.items():
            axes.annotate(", ".join(names), point, (6, -3), textcoords="offset points", fontsize=9)
        axes.set_xlabel(f"{label}; numbers are rows of the table")
        axes.set_ylabel(_ACCURACY)
        blocks.append(svg(figure))
    return page(f"Sampling of {grid['model']}", blocks)


def model_card(card: dict[str, Any], *, sections: Sequence[str] = (), **about: Any) -> str:
    """README.md of a hub repository: the scores as metadata that the hub reads, and as a table.

    Args:
        sections: lines before the scores.
        about: more fields of huggingface_hub's `ModelCardData`.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=Path(s["source"]).name if Path(s["source"]).exists() else s["source"],
            dataset_name=task,
            metric_type="accuracy",
            metric_value=round(s["accuracy"], 4),
        )
        for task, s in card["tasks"].items()
        if "accuracy" in s
    ]
    name = card["model"]["name"].rstrip("/").rpartition("/")[2] or "model"
    options = about | ({"model_name": name, "eval_results": results} if results else {})
    data = ModelCardData(library_name="dream_lightning", tags=["masked-diffusion", "dream"], **options)
    lines = [f"---\n{data.to_yaml()}\n---\n", f"# {name}\n", *sections]
    if card["tasks"]:
        lines += ["| benchmark | n | accuracy [95 % interval] | tokens per forward |", "|---|---:|---:|---:|"]
        for task, s in card["tasks"].items():
            score = percent(s["accuracy"], s["interval"]) if "accuracy" in s else "not scored"
            lines.append(f"| {task} | {s['scored']} | {score} | {s['tokens_per_forward']:.2f} |")
        lines.append(f"\nSampling: `{json.dumps(card['settings']['sampling'])}`. All settings: card.json.\n")
    return "\n".join(lines)


def page(title: str, blocks: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(blocks)
    return f'<!doctype html><html lang="en">{head}<style>{_STYLE}</style><h1>{escape(title)}</h1>\n{body}</html>\n'


def _shown(scores: dict[str, Any], key: str, share: bool) -> str:
    if key not in scores:
        return "–"
    return percent(scores[key], scores["interval"] if key == "accuracy" else None) if share else f"{scores[key]:.4g}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["".join(f"<th{' class=n' * (i > 0)}>{escape(name)}" for i, name in enumerate(head))]
    lines += ["".join(f"<td{' class=n' * (i > 0)}>{escape(str(v))}" for i, v in enumerate(row)) for row in rows]
    return "<div class=wide><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _texts(items: Sequence[Item]) -> str:
    """Wrong answers first: they are what one looks for."""
    order = sorted(items, key=lambda item: (item["correct"] is not False, item["task"], item["sample"]))[:_MOST_TEXTS]
    verdicts = {True: "right", False: "wrong", None: "not scored"}
    parts = [folded(f"{i['task']} · {i['id']} · {verdicts[i['correct']]}", i, answer_block(i)) for i in order]
    more = f"<p class=note>{len(order)} of {len(items)}; items.jsonl has all.</p>" if len(order) < len(items) else ""
    return "".join(parts) + more


def folded(summary: str, item: Item, content: str) -> str:
    reference = escape(str(item.get("target") or item["reference"]))
    question = f"<pre>{escape(item['prompt'])}</pre><p>Reference: {reference}</p>"
    return f"<details><summary>{escape(summary)}</summary>{question}{content}</details>"


def answer_block(item: Item) -> str:
    return f"<pre>{escape(item['prediction'])}</pre><p>Extracted: {escape(str(item['answer']))}</p>"


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Of 6 inches: its words can be read where a phone shows it at 60 %."""
    figure = Figure(figsize=(6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Figure) -> str:
    file = io.StringIO()
    with rc_context({"svg.hashsalt": "dream_lightning", "svg.fonttype": "none"}):  # the same bytes for the same card
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def intervals(points: Sequence[tuple[str, float, float, float]], label: str, *, zero: bool = False) -> str:
    """Estimates with their intervals, one line for each name."""
    figure, axes = new_figure(0.9 + 0.35 * len(points))
    for y, (_, value, low, high) in enumerate(points):
        error = [[max(value - low, 0)], [max(high - value, 0)]]
        axes.errorbar(value, y, xerr=error, fmt="o", color=_COLORS[0], capsize=4)
    axes.set_yticks(range(len(points)), [name for name, *_ in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_xlabel(label)
    if zero:
        axes.axvline(0, color="#666", linewidth=1)
    else:
        axes.set_xlim(-0.02, 1.02)
    return svg(figure)


def _lengths(items: Sequence[Item]) -> str:
    """Histogram of the answers' lengths, right and wrong ones."""
    figure, axes = new_figure(3)
    kinds = ((True, "right", _COLORS[0], ""), (False, "wrong", _COLORS[1], "//"), (None, "not scored", "#999", ".."))
    kept = [(*kind, n) for v, *kind in kinds if (n := [i["tokens"] for i in items if i["correct"] is v])]
    label, color, hatch, lengths = map(list, zip(*kept, strict=True))
    least, most = min(map(min, lengths)), max(map(max, lengths))
    width = (most - least) // 30 + 1  # whole tokens
    bins = [edge - 0.5 for edge in range(least, most + width + 1, width)]
    axes.hist(lengths, bins=bins, stacked=True, label=label, color=color, hatch=hatch, edgecolor="white")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("tokens of an answer")
    axes.set_ylabel("answers")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(lengths))
    return svg(figure)
