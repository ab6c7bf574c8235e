"""Sudoku, 4 × 4 or 9 × 9. Every valid completion of the puzzle is right."""

import re
from math import isqrt

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.tasks.registry import TASKS, Task, record_value
from dream_lightning.tasks.statement import stated_answer

# What may be between the digits of a grid: bars, borders, brackets, a table in Markdown or LaTeX.
IGNORED = re.compile(r"[\s,;|\[\](){}+\-=:&*_$`─━│┃┼╋║═╬┌┐└┘├┤┬┴]|\\\\|\\hline|\\[a-z]+\{[a-z*|]+\}(?:\{[c|]*\})?")
LABEL = re.compile(r"\b(?:row|column|r|c) ?\d\b ?[:.)]?|^ *\d[:.)] ", re.IGNORECASE | re.MULTILINE)
GRID = re.compile(rf"\d(?:{IGNORED.pattern}|\d)*")


def extract(response: str) -> str | None:
    """The last grid of 16 or 81 digits: in `<answer>` tags, in a box or after "the answer is", else in the text."""
    response = LABEL.sub("", response)
    for text in (stated_answer(response) or "", *reversed(GRID.findall(response))):
        cells = IGNORED.sub("", text)
        if re.fullmatch(r"\d{16}|\d{81}", cells, re.ASCII):
            return cells
    return None


def reference(example: Example) -> str:
    """The puzzle in the column `puzzle` or `input`, else in the prompt, as digits. Raises UserError if it is none."""
    puzzle = record_value(example, "puzzle", "input")
    puzzle = IGNORED.sub("", example.prompt[-1]["content"] if puzzle is None else str(puzzle))
    if len(puzzle) not in (16, 81) or not set(puzzle) <= set("0123456789"[: isqrt(len(puzzle)) + 1]):
        raise UserError(
            f"{example.origin}: the puzzle is {puzzle!r:.100}, wanted 16 digits 0-4 or 81 digits 0-9, row by row with "
            "0 = empty, in a column puzzle"
        )
    return puzzle


def prompt(example: Example) -> str:
    """The record's prompt if it is in words, else a question."""
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


def is_solution(grid: str, puzzle: str) -> bool:
    """Whether a grid, with or without separators between its digits, is a valid completion of a puzzle."""
    cells = IGNORED.sub("", grid)
    if len(cells) != len(puzzle) or any(clue not in ("0", cell) for clue, cell in zip(puzzle, cells, strict=True)):
        return False
    side = isqrt(len(puzzle))
    box = isqrt(side)
    corners = range(0, side, box)
    rows = [cells[start : start + side] for start in range(0, len(cells), side)]
    boxes = ["".join(row[left : left + box] for row in rows[top : top + box]) for top in corners for left in corners]
    return all(sorted(group) == list("123456789"[:side]) for group in (*rows, *zip(*rows, strict=True), *boxes))


TASKS["sudoku"] = Task(extract, is_solution, reference, prompt)
TASKS["sudoku-bare"] = Task(extract, is_solution, reference)  # asked in the words of the record
