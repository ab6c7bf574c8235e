"""Accuracy against tokens per forward, for every algorithm and cache of a trained model: a table and a plot.

python scripts/export.py --checkpoint lightning_logs/tiny/checkpoints/last.ckpt --folder tiny --tokenizer bytes
python scripts/curve.py --pretrained tiny --new_tokens 30 --block 10 --out curve
"""

import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from jsonargparse import auto_cli

from dream_lightning import DreamModel, S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.answering import answer_questions
from dream_lightning.readable_errors import readable_errors
from dream_lightning.tasks import AnswerAccuracy, TokensPerForward

CACHES = ("no blocks", "none", "prefix", "dual")
COLOURS = {"maskgit_plus": "#1b6ca8", "topk_margin": "#c8553d", "entropy": "#3a7d44", "origin": "#777777"}
MARKS = {"tokens_per_step": "circle", "threshold": "square", "factor": "diamond", "steps": "circle"}


@dataclass(frozen=True)
class Point:
    """One setting and what came of it."""

    alg: str
    cache: str
    way: str
    value: float
    accuracy: float
    tokens_per_forward: float
    seconds: float


def main(
    pretrained: str,
    out: str = "curve",
    source: str = "bundled",
    questions: int = 64,
    batch_size: int = 64,
    new_tokens: int = 256,
    block: int = 32,
    tokens_per_step: tuple[int, ...] = (1, 2, 3, 5, 10),
    thresholds: tuple[float, ...] = (0.99, 0.9, 0.5),
    factors: tuple[float, ...] = (0.25, 1.0, 3.0),
) -> None:
    """Write OUT.md and OUT.svg.

    Args:
        pretrained: an official-format folder of a trained model, with its tokenizer.
        out: path of both files without their endings.
        source: of the questions: those of its validation part.
        questions: how many.
        batch_size: at once.
        new_tokens: of every answer.
        block: block_length where there are blocks.
        tokens_per_step: to try; `origin` takes new_tokens / this as its steps.
        thresholds: to try.
        factors: to try.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DreamModel.from_pretrained(pretrained).to(device).eval()
    tokenizer = load_tokenizer(pretrained)
    data = S1KDataModule(source, tokenizer=tokenizer, validation_source=source, batch_size=batch_size)
    data.setup("predict")
    data.questions = [e for e in data.questions if e.reference is not None][:questions]
    points = []
    for options in settings(tokens_per_step, thresholds, factors, new_tokens, block):
        points.append(measure(model, tokenizer, data, options, new_tokens, block))
        print(points[-1], flush=True)
    text = table(points, questions=len(data.questions), source=source, new_tokens=new_tokens, block=block)
    Path(f"{out}.md").write_text(text)
    Path(f"{out}.svg").write_text(plot(points))
    print(f"wrote {out}.md and {out}.svg")


def settings(tokens_per_step, thresholds, factors, new_tokens: int, block: int) -> list[tuple[str, str, str, float]]:
    """(alg, cache, way, value) of every point."""
    ways = [("tokens_per_step", k) for k in tokens_per_step]
    ways += [("threshold", v) for v in thresholds] + [("factor", v) for v in factors]
    found = [
        (alg, cache, way, value)
        for cache, alg, (way, value) in product(CACHES, list(COLOURS)[:3], ways)
        if cache == "no blocks" or way != "tokens_per_step" or value <= block
    ]
    steps = [new_tokens // k for k in tokens_per_step]
    found += [("origin", "no blocks", "steps", s) for s in steps]
    return found + [("origin", c, "steps", s) for c, s in product(CACHES[1:], steps) if s % (new_tokens // block) == 0]


def measure(model, tokenizer, data, options: tuple[str, str, str, float], new_tokens: int, block: int) -> Point:
    """Answer all questions in one way."""
    alg, cache, way, value = options
    blocks = {} if cache == "no blocks" else {"block_length": block, "cache": cache}
    params = SamplingParams(
        **{"max_new_tokens": new_tokens, "steps": new_tokens, "alg": alg, "forbid_mask": True, **blocks, way: value}
    )
    accuracy, speed, started = AnswerAccuracy(), TokensPerForward(), time.perf_counter()
    for batch in data.predict_dataloader():
        answers = answer_questions(model, tokenizer, batch.to(model.device), params).predictions
        accuracy.update(answers, batch.counted)
        speed.update([p.filled for p in answers], [p.forwards for p in answers], batch.counted.tolist())
    seconds = time.perf_counter() - started
    return Point(alg, cache, way, value, accuracy.compute()["accuracy"].item(), speed.compute().item(), seconds)


def table(points: list[Point], *, questions: int, source: str, new_tokens: int, block: int) -> str:
    """Tokens per forward and accuracy; a table for each cache, a column for each algorithm."""
    lines = [f"{questions} questions of {source}, {new_tokens} new tokens, blocks of {block}."]
    lines += ["In every cell: tokens per forward · accuracy.", ""]
    for cache in CACHES:
        lines += [
            f"| {_title(cache)} | " + " | ".join(COLOURS) + " |",
            "|---|" + "---|" * len(COLOURS),
        ]
        for way, value in dict.fromkeys((p.way, p.value) for p in points if p.cache == cache):
            cells = [f"{way} {value:g}"]
            for alg in COLOURS:
                key = (alg, cache, way, value)
                found = [p for p in points if (p.alg, p.cache, p.way, p.value) == key]
                cells += [f"{p.tokens_per_forward:.2f} · {p.accuracy:.1%}" for p in found] or ["–"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _title(cache: str) -> str:
    return cache if cache == "no blocks" else f"blocks, cache {cache}"


def plot(points: list[Point], width: int = 300, height: int = 220) -> str:
    """Four panels, one a cache; a line joins the points of one algorithm with a fixed number of tokens a step."""
    top = max(2.0, *(p.tokens_per_forward for p in points))
    floor = min(0.9, int(min(p.accuracy for p in points) * 10) / 10)  # of the vertical axis
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{2 * height + 50}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for n, cache in enumerate(CACHES):
        left, upper = (n % 2) * width + 45, (n // 2) * height + 30
        wide, high = width - 65, height - 65

        def at(p: Point, left=left, upper=upper, wide=wide, high=high) -> tuple[float, float]:
            across = torch.tensor(max(p.tokens_per_forward, 1.0)).log2() / torch.tensor(top).log2()
            return left + wide * float(across), upper + high * (1 - p.accuracy) / (1 - floor)

        lines.append(f'<text x="{left}" y="{upper - 10}" font-weight="bold">{_title(cache)}: accuracy</text>')
        for share in (floor, (1 + floor) / 2, 1):
            y = upper + high * (1 - share) / (1 - floor)
            lines.append(f'<line x1="{left}" x2="{left + wide}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            lines.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
        tick = 1
        while tick <= top:
            x = left + wide * float(torch.tensor(float(tick)).log2() / torch.tensor(top).log2())
            lines.append(f'<text x="{x}" y="{upper + high + 16}" text-anchor="middle">{tick}</text>')
            tick *= 2
        middle = f'x="{left + wide / 2}" y="{upper + high + 30}" text-anchor="middle"'
        lines.append(f'<text {middle} fill="#555">tokens per forward</text>')
        for alg, colour in COLOURS.items():
            mine = [p for p in points if (p.alg, p.cache) == (alg, cache)]
            fixed = sorted(at(p) for p in mine if p.way in ("tokens_per_step", "steps"))
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in fixed)
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
            lines += [_mark(MARKS[p.way], *at(p), colour) for p in mine]
    y = 2 * height + 25
    for n, (alg, colour) in enumerate(COLOURS.items()):
        lines.append(f'<circle cx="{20 + 95 * n}" cy="{y}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{28 + 95 * n}" y="{y + 4}">{alg}</text>')
    for n, (name, mark) in enumerate((("fixed", "circle"), ("threshold", "square"), ("factor", "diamond"))):
        lines.append(_mark(mark, 405 + 62 * n, y, "#333"))
        lines.append(f'<text x="{412 + 62 * n}" y="{y + 4}">{name}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind == "diamond" else ""
    return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="none" stroke="{colour}"{turn}/>'


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
