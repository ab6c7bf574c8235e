"""The bundled reasoning set: additions, by default of three digits, in s1K's columns, computed, never shipped.

    question   457+286=?
    trace      06 13 13 011
    attempt    \\boxed{743}

The trace adds every column on its own and then says what each column passes to its left neighbour: with it each digit
of the answer follows from one column, without it the first digit needs all six. Words in the trace would be read more
easily and learned more slowly. 810,000 questions of three digits exist.
"""

import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from dream_lightning.errors import UserError

_Pair = tuple[int, int]


def sample_rows(
    split: Literal["train", "validation"],
    *,
    seed: int = 0,
    train_rows: int = 20_000,
    validation_rows: int = 500,
    digits: int = 3,
) -> list[dict[str, Any]]:
    """Rows of one split, in s1K's columns, each question once; a pure function of its arguments, in less than a second.

    No validation question occurs in training, nor does its twin, the same sum with the terms exchanged. The validation
    rows depend on `seed`, `validation_rows` and `digits` only: more training rows never change what is validated.

    Args:
        digits: of both terms; more make longer traces and harder sums.

    Raises:
        UserError: an unknown split; no digits; a negative size, or more rows than there are questions.
    """
    if digits < 1:
        raise UserError(f"sums of {digits} digits cannot be had: take digits from 1 up")
    questions = (9 * 10 ** (digits - 1)) ** 2
    if split not in ("train", "validation"):
        raise UserError(f"the sample set has no split {split!r}: take 'train' or 'validation'")
    if min(train_rows, validation_rows) < 0 or train_rows + 2 * validation_rows > questions // 2:
        raise UserError(
            f"{train_rows:,} training and {validation_rows:,} validation rows cannot be had: take sizes from 0 up, "
            f"together at most {questions // 2:,} with validation rows counted twice (training leaves their twins out)"
        )
    rng = random.Random(seed)
    validation = _draw(rng, validation_rows, digits, held_out=set())
    if split == "validation":
        return [sample_row(pair) for pair in validation]
    train = [
        sample_row(pair) for pair in _draw(rng, train_rows, digits, held_out={_sorted(pair) for pair in validation})
    ]
    check_disjoint(train, [sample_row(pair) for pair in validation])
    return train


def check_disjoint(train: Iterable[Mapping[str, Any]], validation: Iterable[Mapping[str, Any]]) -> None:
    """Holds two lists of rows of this set apart: no question in both, exchanged terms (a+b, b+a) counted as the same.

    Raises:
        UserError: naming the first questions that overlap, and how many do.
    """
    trained = {_sorted(_pair(row)): row["question"] for row in train}
    overlap = [
        f"{row['question']} (in training as {trained[key]})"
        for row in validation
        if (key := _sorted(_pair(row))) in trained
    ]
    if overlap:
        raise UserError(
            f"{len(overlap):,} validation questions occur in training: {', '.join(overlap[:5])}"
            f"{', …' if len(overlap) > 5 else ''}; take both splits with the same seed and validation_rows"
        )


def _draw(rng: random.Random, count: int, digits: int, *, held_out: set[_Pair]) -> list[_Pair]:
    """Different pairs, none of them or of their twins held out."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    drawn: dict[_Pair, None] = {}  # a set that keeps its order
    while len(drawn) < count:
        pair = rng.randint(low, high), rng.randint(low, high)
        if _sorted(pair) not in held_out:
            drawn[pair] = None
    return list(drawn)


def _sorted(pair: _Pair) -> _Pair:
    """The same for a+b and b+a."""
    return min(pair), max(pair)


def _pair(row: Mapping[str, Any]) -> _Pair:
    a, b = row["question"].removesuffix("=?").split("+")
    return int(a), int(b)


def sample_row(pair: _Pair) -> dict[str, Any]:
    """The sum of two terms with as many digits, in s1K's columns."""
    a, b = pair
    columns = [int(x) + int(y) for x, y in zip(str(a), str(b), strict=True)]
    # What each column passes to the left: of three digits the first digit of a four-digit sum, then into the hundreds,
    # into the tens.
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
