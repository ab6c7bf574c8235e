"""Sudoku, 4 × 4 or 9 × 9. Every valid completion of the puzzle is right."""

import re
from math import isqrt

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.tasks.math import stated_answer, tagged_answer
from dream_lightning.tasks.registry import Task, record_value, register

IGNORED = re.compile(r"[\s,|\[\]]")  # what may be between the digits of a grid
GRID = re.compile(r"\d[\d\s,|\[\]]*")


def extract(response: str) -> str | None:
    """The last grid of 16 or 81 digits: in `<answer>` tags, in a box or after "the answer is", else in the text."""
    stated = tagged_answer(response) or stated_answer(response) or ""
    for text in (stated, *reversed(GRID.findall(response))):
        cells = IGNORED.sub("", text)
        if re.fullmatch(r"\d{16}|\d{81}", cells, re.ASCII):
            return cells
    return None


def reference(example: Example) -> str:
    """The puzzle of a record, from its column `puzzle` or `input`, else its prompt.

    Raises:
        UserError: it is not 16 or 81 digits.
    """
    puzzle = record_value(example, "puzzle", "input")
    puzzle = IGNORED.sub("", example.prompt[-1]["content"] if puzzle is None else str(puzzle))
    _check(puzzle, f"{example.origin}: ")
    return puzzle


def prompt(example: Example) -> str:
    """The record's prompt if it is in words; a problem is put for a record that has only the puzzle."""
    text = example.prompt[-1]["content"]
    if re.search("[A-Za-z]{2}", text):
        return text
    puzzle = reference(example)
    side = isqrt(len(puzzle))
    rows = "\n".join(puzzle[start : start + side] for start in range(0, len(puzzle), side))
    return (
        f"Complete this {side} × {side} sudoku, in which 0 is an empty cell:\n{rows}\n"
        rf"Put all {len(puzzle)} digits, row by row, in \boxed{{}}."
    )


def sudoku_correct(grid: str, puzzle: str) -> bool:
    """Whether `grid` is a valid completion of `puzzle`.

    Args:
        grid: an answer, row by row; white space, commas, bars and square brackets between the digits are ignored.
        puzzle: 16 digits row by row (4 × 4 with 2 × 2 boxes), or 81; 0 = empty.

    Raises:
        UserError: `puzzle` is not 16 or 81 digits between 0 and its side.
    """
    _check(puzzle)
    cells = IGNORED.sub("", grid)
    if len(cells) != len(puzzle) or any(clue not in ("0", cell) for clue, cell in zip(puzzle, cells, strict=True)):
        return False
    side = isqrt(len(puzzle))
    box = isqrt(side)
    groups: dict[tuple[str, int], list[str]] = {}
    for position, cell in enumerate(cells):
        row, column = divmod(position, side)
        for group in (("row", row), ("column", column), ("box", row // box * side + column // box)):
            groups.setdefault(group, []).append(cell)
    return all(sorted(group) == list("123456789"[:side]) for group in groups.values())


def _check(puzzle: str, origin: str = "") -> None:
    if len(puzzle) not in (16, 81) or not set(puzzle) <= set("0123456789"[: isqrt(len(puzzle)) + 1]):
        raise UserError(
            f"{origin}a puzzle is 16 digits 0-4 or 81 digits 0-9, row by row with 0 = empty, in a column puzzle; got "
            f"{puzzle!r:.100}"
        )


register(Task("sudoku", extract, sudoku_correct, reference, prompt))
