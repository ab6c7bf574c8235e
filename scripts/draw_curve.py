"""Draw a table that curve.py wrote: accuracy against tokens per forward, with 95 % intervals.

python scripts/draw_curve.py --table docs/history.md --section "the quickstart's model" --out docs/images/curve_tiny.svg
"""

import re
from collections import defaultdict
from pathlib import Path

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from dream_lightning.cli import readable_errors
from dream_lightning.errors import UserError
from dream_lightning.evaluation.pages import STYLES, svg
from dream_lightning.tasks import proportion_interval

_DARK = "<style>@media (prefers-color-scheme: dark) { svg { filter: invert(.93) hue-rotate(180deg) } }</style>"
Points = dict[str, list[tuple[float, float]]]  # name of a line → tokens per forward and accuracy


def main(table: str, out: str, section: str = "") -> None:
    """Write the picture.

    Args:
        table: the Markdown file, with the number of questions.
        out: the SVG file.
        section: the end of the heading under which the tables are; by default the whole file.
    """
    text = Path(table).read_text(encoding="utf-8")
    if section:
        parts = [part for part in re.split(r"^## ", text, flags=re.M) if part.split("\n")[0].endswith(section)]
        text = "".join(parts)
    tables, found = read_tables(text), re.search(r"\b([\d,]+)\s(?:held-out\s)?questions", text)
    if not tables or not found:
        raise UserError(f"{table} holds no table of scripts/curve.py under {section!r}")
    Path(out).write_text(draw(tables, questions=int(found[1].replace(",", ""))), encoding="utf-8")
    print(f"wrote {out}")


def read_tables(text: str) -> dict[str, Points]:
    """Without blocks a line for each algorithm, and one for fixed numbers; in blocks one for each cache."""
    panels: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for name, *cells in rows:
            for alg, cell in zip(head[1:], cells, strict=True):
                if not (numbers := re.fullmatch(r"([\d.]+) · ([\d.]+)%", cell)):
                    continue
                fixed, blocks = name.startswith("tokens_per_step"), head[0] != "no blocks"
                if (fixed and alg != "maskgit_plus") or (blocks and not fixed):  # on the same points, or nearly
                    continue
                line = "random order (origin)" if alg == "origin" else f"{alg}, threshold or factor"
                line = head[0].removeprefix("blocks, ") if blocks else "fixed number a step" if fixed else line
                panel = "in blocks, fixed number a step" if blocks else "without blocks"
                panels[panel][line].append((float(numbers[1]), float(numbers[2]) / 100))
    return panels


def draw(panels: dict[str, Points], questions: int) -> str:
    """An SVG: a panel for each kind, on axes of its own, so that no panel is empty."""
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            x, y = zip(*sorted(points), strict=True)
            ends = [proportion_interval(round(p * questions), questions) for p in y]
            errors = [[max(p - low, 0) for p, (low, _) in zip(y, ends, strict=True)]]
            errors += [[max(high - p, 0) for p, (_, high) in zip(y, ends, strict=True)]]
            x = [value * (1 + 0.02 * number) for value in x]  # lines that lie on each other stay visible
            axes.errorbar(x, y, yerr=errors, label=name, capsize=2, elinewidth=0.8, markersize=5, **STYLES[number])
        axes.set(title=title, xscale="log", xlabel="tokens per forward")
        ticks = [n for n in (1, 2, 4, 8, 16, 32, 64) if axes.get_xlim()[0] <= n <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xticks([], minor=True)
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=low - 0.3 * (high - low))  # room for the legend
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#ddd")
        axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.axes[0].set_ylabel(f"accuracy of {questions} questions, 95 % interval")
    text = svg(figure).removeprefix("<figure>").removesuffix("</figure>")
    return text.replace("<defs>", _DARK + "<defs>", 1)


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
