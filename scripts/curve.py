"""Accuracy against tokens per forward, for every algorithm and cache of a trained model, as a Markdown table.

dream-lightning export --checkpoint lightning_logs/tiny/checkpoints/last.ckpt --folder tiny --tokenizer bytes
python scripts/curve.py --pretrained tiny --new_tokens 30 --block 10 --out curve.md
python scripts/draw_curve.py --table curve.md --out curve.svg
"""

import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from jsonargparse import auto_cli

from dream_lightning import DreamModel, S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.answering import answer_questions
from dream_lightning.cli import readable_errors
from dream_lightning.tasks import AnswerScores

CACHES = ("no blocks", "none", "prefix", "dual")
ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy", "origin")


@dataclass(frozen=True)
class Point:
    """One setting and its result."""

    alg: str
    cache: str
    way: str
    value: float
    accuracy: float
    tokens_per_forward: float
    seconds: float


def main(
    pretrained: str,
    out: str = "curve.md",
    source: str = "bundled",
    questions: int = 64,
    batch_size: int = 64,
    new_tokens: int = 256,
    block: int = 32,
    tokens_per_step: tuple[int, ...] = (1, 2, 3, 5, 10),
    thresholds: tuple[float, ...] = (0.99, 0.9, 0.5),
    factors: tuple[float, ...] = (0.25, 1.0, 3.0),
) -> None:
    """Write the table.

    Args:
        pretrained: an official-format folder of a trained model, with its tokenizer.
        out: file.
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
    asked = [n for n, example in enumerate(data.questions) if example.reference is not None][:questions]
    data.skip_questions(set(range(len(data.questions))) - set(asked))
    points = []
    for options in settings(tokens_per_step, thresholds, factors, new_tokens, block):
        points.append(measure(model, tokenizer, data, options, new_tokens, block))
        print(points[-1], flush=True)
    Path(out).write_text(table(points, questions=len(asked), source=source, new_tokens=new_tokens, block=block))
    print(f"wrote {out}")


def settings(tokens_per_step, thresholds, factors, new_tokens: int, block: int) -> list[tuple[str, str, str, float]]:
    """(alg, cache, way, value) of every point."""
    ways = [("tokens_per_step", k) for k in tokens_per_step]
    ways += [("threshold", v) for v in thresholds] + [("factor", v) for v in factors]
    found = [
        (alg, cache, way, value)
        for cache, alg, (way, value) in product(CACHES, ALGORITHMS[:3], ways)
        if cache == "no blocks" or way != "tokens_per_step" or value <= block
    ]
    steps = [new_tokens // k for k in tokens_per_step]
    found += [("origin", "no blocks", "steps", s) for s in steps]
    return found + [("origin", c, "steps", s) for c, s in product(CACHES[1:], steps) if s % (new_tokens // block) == 0]


def measure(model, tokenizer, data, options: tuple[str, str, str, float], new_tokens: int, block: int) -> Point:
    """Answer all questions with one setting."""
    alg, cache, way, value = options
    blocks = {} if cache == "no blocks" else {"block_length": block, "cache": cache}
    params = SamplingParams(
        **{"max_new_tokens": new_tokens, "steps": new_tokens, "alg": alg, "forbid_mask": True, **blocks, way: value}
    )
    scores, started = AnswerScores(), time.perf_counter()
    for batch in data.predict_dataloader():
        scores.update(answer_questions(model, tokenizer, batch.to(model.device), params))
    found = {name: score.item() for name, score in scores.compute().items()}
    seconds = time.perf_counter() - started
    return Point(alg, cache, way, value, found["accuracy"], found["tokens_per_forward"], seconds)


def table(points: list[Point], *, questions: int, source: str, new_tokens: int, block: int) -> str:
    """Tokens per forward and accuracy; a table for each cache, a column for each algorithm."""
    lines = [f"{questions} questions of {source}, {new_tokens} new tokens, blocks of {block}."]
    lines += ["In every cell: tokens per forward · accuracy.", ""]
    for cache in CACHES:
        lines += [
            f"| {_title(cache)} | " + " | ".join(ALGORITHMS) + " |",
            "|---|" + "---|" * len(ALGORITHMS),
        ]
        for way, value in dict.fromkeys((p.way, p.value) for p in points if p.cache == cache):
            cells = [f"{way} {value:g}"]
            for alg in ALGORITHMS:
                key = (alg, cache, way, value)
                found = [p for p in points if (p.alg, p.cache, p.way, p.value) == key]
                cells += [f"{p.tokens_per_forward:.2f} · {p.accuracy:.1%}" for p in found] or ["–"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _title(cache: str) -> str:
    return cache if cache == "no blocks" else f"blocks, cache {cache}"


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
