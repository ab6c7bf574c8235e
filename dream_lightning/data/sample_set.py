"""The bundled reasoning set: three-digit sums and differences in s1K's columns, computed, never shipped.

    question   457+286=?                 743-286=?
    trace      carries 110               borrows 110
    attempt    \\boxed{743}               \\boxed{457}

The trace is what school writes above the columns: one digit a column, what that column receives from its right-hand
neighbour. With it every digit of the answer needs its own column only; without it the first digit needs all six.
All numbers lie in 100 … 999, results too, so that every text has one length and columns keep their distance: a
transformer with relative positions learns one column and has learned all three. 640,800 questions exist.
"""

import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, Literal

_LOW, _HIGH = 100, 999
_Problem = tuple[int, str, int]


def sample_rows(
    split: Literal["train", "validation"],
    *,
    seed: int = 0,
    train_rows: int = 20_000,
    validation_rows: int = 500,
) -> list[dict[str, Any]]:
    """Rows of one split, in s1K's columns; a pure function of its arguments, about 0.2 s for the default sizes.

    Half the rows of each split are sums, half differences, each question once. No validation question occurs in
    training, nor does its twin, the same sum with the terms exchanged (`check_disjoint`). The validation rows depend
    on `seed` and `validation_rows` only: more training rows never change what is validated.

    Raises:
        ValueError: an unknown split; a negative size, or more rows than there are questions.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"the sample set has no split {split!r}: take 'train' or 'validation'")
    if min(train_rows, validation_rows) < 0 or train_rows + 2 * validation_rows > 500_000:
        raise ValueError(
            f"{train_rows:,} training and {validation_rows:,} validation rows cannot be had: take sizes from 0 up, "
            "together below 500,000 with validation rows counted twice (their twins are left out of training)"
        )
    rng = random.Random(seed)
    validation = _draw(rng, validation_rows, taken=set())
    train = _draw(rng, train_rows, taken={_twin_free(problem) for problem in validation}) if split == "train" else []
    rows = [_row(problem) for problem in (train if split == "train" else validation)]
    if split == "train":
        check_disjoint(rows, [_row(problem) for problem in validation])
    return rows


def check_disjoint(train: Iterable[Mapping[str, Any]], validation: Iterable[Mapping[str, Any]]) -> None:
    """Holds two lists of rows of this set apart: no question in both, exchanged terms (a+b, b+a) counted as the same.

    Raises:
        ValueError: naming the first questions that overlap, and how many do.
    """
    trained = {_twin_free(_problem(row)): row["question"] for row in train}
    overlap = [
        f"{row['question']} (in training as {trained[key]})"
        for row in validation
        if (key := _twin_free(_problem(row))) in trained
    ]
    if overlap:
        raise ValueError(
            f"{len(overlap):,} validation questions occur in training: {', '.join(overlap[:5])}"
            f"{', …' if len(overlap) > 5 else ''}; take both splits with the same seed and validation_rows"
        )


def _draw(rng: random.Random, count: int, *, taken: set[_Problem]) -> list[_Problem]:
    """Different problems, sums and differences in turn, none of them taken."""
    drawn: dict[_Problem, None] = {}  # a set that keeps its order
    while len(drawn) < count:
        a, b = rng.randint(_LOW, _HIGH), rng.randint(_LOW, _HIGH)
        problem = (a, "+" if len(drawn) % 2 == 0 else "-", b)
        if _LOW <= _result(problem) <= _HIGH and _twin_free(problem) not in taken:
            drawn[problem] = None
    return list(drawn)


def _result(problem: _Problem) -> int:
    a, sign, b = problem
    return a + b if sign == "+" else a - b


def _twin_free(problem: _Problem) -> _Problem:
    """The same for a+b and b+a."""
    a, sign, b = problem
    return (min(a, b), sign, max(a, b)) if sign == "+" else problem


def _problem(row: Mapping[str, Any]) -> _Problem:
    said = json.loads(row["metadata"])
    return said["a"], said["sign"], said["b"]


def _received(problem: _Problem) -> str:
    """What each column receives from the column to its right: 457+286 → 110, the units nothing, the others 1."""
    a, sign, b = problem
    received = "0"
    for place in (1, 10):
        x, y, before = a // place % 10, b // place % 10, int(received[0])
        received = str(int(x + y + before > 9 if sign == "+" else x < y + before)) + received
    return received


def _row(problem: _Problem) -> dict[str, Any]:
    a, sign, b = problem
    return {
        "question": f"{a}{sign}{b}=?",
        "solution": str(_result(problem)),
        "cot_type": "math",
        "source_type": "addition" if sign == "+" else "subtraction",
        "metadata": json.dumps({"a": a, "sign": sign, "b": b}),
        "thinking_trajectories": [f"{'carries' if sign == '+' else 'borrows'} {_received(problem)}"],
        "attempt": f"\\boxed{{{_result(problem)}}}",
    }
