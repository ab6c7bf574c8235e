"""The bundled reasoning set: additions of three digits in s1K's columns, computed when needed.

question   457+286=?
trace      06 13 13 011
attempt    \\boxed{743}

The trace adds every column, then lists what each column carries to its left neighbor: with it, each digit of the
answer follows from one column; without it, the first digit depends on all six.
"""

import json
import random
from typing import Any, Literal

TRAIN_ROWS, VALIDATION_ROWS = 20_000, 500


def sample_rows(split: Literal["train", "validation"]) -> list[dict[str, Any]]:
    """Rows of one split, each question once. No validation sum is in training, not even with its terms exchanged."""
    rng = random.Random(0)
    validation = _draw(rng, VALIDATION_ROWS, set())
    if split == "validation":
        return [sample_row(*pair) for pair in validation]
    held_out = {frozenset(pair) for pair in validation}
    return [sample_row(*pair) for pair in _draw(rng, TRAIN_ROWS, held_out)]


def sample_row(a: int, b: int) -> dict[str, Any]:
    columns = [int(x) + int(y) for x, y in zip(str(a), str(b), strict=True)]
    # The carry out of each column, from the left.
    carries = [(a % 10**place + b % 10**place) // 10**place for place in range(len(columns), 0, -1)]
    return {
        "question": f"{a}+{b}=?",
        "solution": str(a + b),
        "cot_type": "math",
        "source_type": "addition",
        "metadata": json.dumps({"a": a, "b": b, "sum": a + b}),
        "thinking_trajectories": [" ".join(f"{column:02d}" for column in columns) + f" {''.join(map(str, carries))}"],
        "attempt": f"\\boxed{{{a + b}}}",
    }


def _draw(rng: random.Random, count: int, held_out: set[frozenset[int]]) -> list[tuple[int, int]]:
    drawn: dict[tuple[int, int], None] = {}  # a set that keeps its order
    while len(drawn) < count:
        pair = rng.randint(100, 999), rng.randint(100, 999)
        if frozenset(pair) not in held_out:
            drawn[pair] = None
    return list(drawn)
