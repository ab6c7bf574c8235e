"""The bundled reasoning set: sums of 8-bit binary numbers in s1K's columns, computed, never shipped.

    question   00101101+01010110=?       (45 + 86)
    trace      carries 11111000
    attempt    \\boxed{10000011}          (131)

The trace is what school writes above the columns: one digit a column, what that column receives from its right-hand
neighbour. With it every digit of the answer needs its own column only; without it the first digit needs all sixteen.
Numbers and sums all have eight digits, so every text has one length and columns keep their distance.

Measured, from scratch on two CPU threads within minutes: a two-layer Dream learns this. Decimal sums it does not (its
carries it does, the table of ten by ten digits not), nor sums mixed with differences: where the sign decides whether a
digit helps or hinders, no digit tells anything by itself, and the gradient has nothing to begin with.

32,896 questions exist, and a+b is a question of its own beside b+a.
"""

import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, Literal

_DIGITS = 8
_QUESTIONS = 32_896  # pairs with a + b < 256
_Pair = tuple[int, int]


def sample_rows(
    split: Literal["train", "validation"],
    *,
    seed: int = 0,
    train_rows: int = 20_000,
    validation_rows: int = 500,
) -> list[dict[str, Any]]:
    """Rows of one split, in s1K's columns, each question once; a pure function of its arguments, about 0.2 s.

    No validation question occurs in training, nor does its twin, the same sum with the terms exchanged. The validation
    rows depend on `seed` and `validation_rows` only: more training rows never change what is validated.

    Raises:
        ValueError: an unknown split; a negative size, or more rows than there are questions.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"the sample set has no split {split!r}: take 'train' or 'validation'")
    if min(train_rows, validation_rows) < 0 or train_rows + 2 * validation_rows > _QUESTIONS:
        raise ValueError(
            f"{train_rows:,} training and {validation_rows:,} validation rows cannot be had: take sizes from 0 up, "
            f"together at most {_QUESTIONS:,} with validation rows counted twice (training leaves their twins out)"
        )
    pairs = [(a, b) for a in range(1 << _DIGITS) for b in range((1 << _DIGITS) - a)]
    random.Random(seed).shuffle(pairs)
    validation = [_row(pair) for pair in pairs[:validation_rows]]
    if split == "validation":
        return validation
    held_out = {_sorted(pair) for pair in pairs[:validation_rows]}
    train = [_row(pair) for pair in pairs if _sorted(pair) not in held_out][:train_rows]
    check_disjoint(train, validation)
    return train


def check_disjoint(train: Iterable[Mapping[str, Any]], validation: Iterable[Mapping[str, Any]]) -> None:
    """Holds two lists of rows of this set apart: no question in both, exchanged terms (a+b, b+a) counted as the same.

    Raises:
        ValueError: naming the first questions that overlap, and how many do.
    """
    trained = {_sorted(_pair(row)): row["question"] for row in train}
    overlap = [
        f"{row['question']} (in training as {trained[key]})"
        for row in validation
        if (key := _sorted(_pair(row))) in trained
    ]
    if overlap:
        raise ValueError(
            f"{len(overlap):,} validation questions occur in training: {', '.join(overlap[:5])}"
            f"{', …' if len(overlap) > 5 else ''}; take both splits with the same seed and validation_rows"
        )


def _sorted(pair: _Pair) -> _Pair:
    """The same for a+b and b+a."""
    return min(pair), max(pair)


def _pair(row: Mapping[str, Any]) -> _Pair:
    a, b = row["question"].removesuffix("=?").split("+")
    return int(a, 2), int(b, 2)


def _binary(number: int) -> str:
    return f"{number:0{_DIGITS}b}"


def _row(pair: _Pair) -> dict[str, Any]:
    a, b = pair
    carries = (a + b) ^ a ^ b  # a digit of the sum is the parity of its column and of what the column receives
    return {
        "question": f"{_binary(a)}+{_binary(b)}=?",
        "solution": _binary(a + b),
        "cot_type": "math",
        "source_type": "binary_addition",
        "metadata": json.dumps({"a": a, "b": b, "sum": a + b}),
        "thinking_trajectories": [f"carries {_binary(carries)}"],
        "attempt": f"\\boxed{{{_binary(a + b)}}}",
    }
