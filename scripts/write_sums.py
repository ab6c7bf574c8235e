"""Additions of any number of digits as two files in s1K's columns: the bundled set, harder.

python scripts/write_sums.py --folder sums --digits 8
"""

import json
from pathlib import Path

from jsonargparse import auto_cli

from dream_lightning.data.sample_set import sample_rows
from dream_lightning.errors import readable_errors


def main(folder: str, digits: int = 8, train_rows: int = 200_000, validation_rows: int = 500, seed: int = 0) -> None:
    """Write FOLDER/train.jsonl and FOLDER/validation.jsonl; no sum of the one is in the other.

    Args:
        folder: is made.
        digits: of both terms.
        train_rows: to write.
        validation_rows: to write.
        seed: of the draw.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    sizes = {"seed": seed, "train_rows": train_rows, "validation_rows": validation_rows, "digits": digits}
    for split in ("train", "validation"):
        file = Path(folder, f"{split}.jsonl")
        rows = sample_rows(split, **sizes)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows):,} sums of {digits} digits")


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
