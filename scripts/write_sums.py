"""Additions of any number of digits as files in s1K's columns: the bundled set, larger, and some that are harder.

python scripts/write_sums.py --folder sums --digits 8
"""

import json
import random
from pathlib import Path

from jsonargparse import auto_cli

from dream_lightning.data.additions import sample_row, sample_rows
from dream_lightning.readable_errors import readable_errors


def main(
    folder: str,
    digits: int = 8,
    train_rows: int = 200_000,
    validation_rows: int = 500,
    carried_through: int = 5,
    seed: int = 0,
) -> None:
    """Write FOLDER/train.jsonl, validation.jsonl and hard.jsonl; no sum of training is in the others.

    Args:
        folder: is made.
        digits: of both terms.
        train_rows: to write.
        validation_rows: to write, and as many hard ones.
        carried_through: columns that a carry passes through in a hard sum, each because its digits add up to 9. Of
            random sums of 8 digits one in 70,000 is like that with 5.
        seed: of the draw.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    sizes = {"seed": seed, "train_rows": train_rows, "validation_rows": validation_rows, "digits": digits}
    splits = {split: sample_rows(split, **sizes) for split in ("train", "validation")}
    rng = random.Random(seed)
    trained = {question(row) for row in splits["train"]}
    splits["hard"] = []
    while len(splits["hard"]) < validation_rows:
        row = sample_row(hard_sum(rng, digits, carried_through))
        if question(row) not in trained:
            splits["hard"].append(row)
    for split, rows in splits.items():
        file = Path(folder, f"{split}.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows):,} sums of {digits} digits")


def question(row: dict) -> frozenset[str]:
    """The same for a+b and b+a."""
    return frozenset(row["question"].removesuffix("=?").split("+"))


def hard_sum(rng: random.Random, digits: int, through: int) -> tuple[int, int]:
    """Two terms; in one column a carry begins, and the next `through` columns to the left pass it on."""
    if not 0 <= through < digits:
        raise ValueError(
            f"a carry cannot pass through {through} of {digits} columns: take carried_through below digits"
        )
    begins = rng.randrange(digits - through)  # counted from the right
    a = b = 0
    for column in range(digits):
        least = int(column == digits - 1)  # no term begins with a zero
        if begins < column <= begins + through:
            x = rng.randint(least, 9 - least)
            y = 9 - x
        else:
            x = rng.randint(max(least, int(column == begins)), 9)
            y = rng.randint(10 - x if column == begins else least, 9)
        a, b = a + x * 10**column, b + y * 10**column
    return a, b


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
