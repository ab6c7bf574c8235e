"""The bundled reasoning set: additions, by default of three digits, in s1K's columns, computed when needed.

question   457+286=?
trace      06 13 13 011
attempt    \\boxed{743}

The trace adds every column, then lists what each column carries to its left neighbor. With it, each digit of the
answer follows from one column; without it, the first digit depends on all six. A trace in words is easier to read and
slower to learn. 810,000 questions of three digits exist.
"""

import json
import random
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
    """Rows of one split, in s1K's columns, each question once; a pure function of the arguments.

    No validation question is in training, nor the same sum with its terms exchanged. The validation rows depend on
    `seed`, `validation_rows` and `digits` only.

    Args:
        digits: of both terms; more digits make longer traces and harder sums.

    Raises:
        UserError: an unknown split, no digits, a negative size, or more rows than there are questions.
    """
    if digits < 1:
        raise UserError(f"digits is {digits}, wanted at least 1")
    questions = (9 * 10 ** (digits - 1)) ** 2
    if split not in ("train", "validation"):
        raise UserError(f"split is {split!r}, wanted 'train' or 'validation'")
    if min(train_rows, validation_rows) < 0 or train_rows + 2 * validation_rows > questions // 2:
        raise UserError(
            f"train_rows is {train_rows:,} and validation_rows {validation_rows:,}, wanted sizes from 0 with "
            f"train_rows + 2 · validation_rows at most {questions // 2:,} for sums of {digits} digits"
        )
    rng = random.Random(seed)
    validation = _draw(rng, validation_rows, digits, held_out=set())
    if split == "validation":
        return [sample_row(pair) for pair in validation]
    held_out = {_sorted(pair) for pair in validation}
    return [sample_row(pair) for pair in _draw(rng, train_rows, digits, held_out=held_out)]


def sample_row(pair: _Pair) -> dict[str, Any]:
    """The sum of two terms that have the same number of digits, in s1K's columns."""
    a, b = pair
    columns = [int(x) + int(y) for x, y in zip(str(a), str(b), strict=True)]
    # The carry out of each column, from the left: for three digits into the thousands, the hundreds and the tens.
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


def _draw(rng: random.Random, count: int, digits: int, *, held_out: set[_Pair]) -> list[_Pair]:
    """Different pairs, none of which is held out in either order."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    drawn: dict[_Pair, None] = {}  # a set that keeps its order
    while len(drawn) < count:
        pair = rng.randint(low, high), rng.randint(low, high)
        if _sorted(pair) not in held_out:
            drawn[pair] = None
    return list(drawn)


def _sorted(pair: _Pair) -> _Pair:
    return min(pair), max(pair)
