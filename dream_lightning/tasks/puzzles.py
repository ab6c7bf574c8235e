"""Graders of puzzles with many right answers. A malformed answer is wrong, a malformed puzzle is an error."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import isqrt

from dream_lightning.errors import UserError

MAX_EXPRESSION_CHARS = 200
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SYNONYMS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "$": ""}


def countdown_correct(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `expression` uses each of `numbers` exactly once and equals `target` exactly (fractions, no rounding).

    Integers, + - * / (also × · ÷ and their LaTeX names), brackets and signs; a trailing "= target" is allowed.
    Anything else, a division by zero or more than 200 characters is wrong. No eval(): the parsed tree is walked.
    """
    for written, meant in SYNONYMS.items():
        expression = expression.replace(written, meant)
    formula, _, claimed = expression.partition("=")
    if claimed.strip() not in ("", str(target)) or len(formula) > MAX_EXPRESSION_CHARS:
        return False
    if not re.fullmatch(r"[\d+\-*/() ]+", formula):
        return False
    try:
        tree = ast.parse(formula.strip(), mode="eval")
        used: list[int] = []
        value = _value(tree.body, used)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return Counter(used) == Counter(numbers) and value == target


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The exact value of a tree; collects its integers. Raises ValueError at any node that is not arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, used)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise UserError(f"{type(node).__name__} is not arithmetic")


def sudoku_correct(grid: str, puzzle: str) -> bool:
    """Whether `grid` is a valid completion of `puzzle`.

    Args:
        grid: an answer, row by row; white space, commas, bars and square brackets between the digits are ignored.
        puzzle: 16 digits row by row (4 × 4 with 2 × 2 boxes), or 81; 0 = empty.

    Raises:
        UserError: `puzzle` is not 16 or 81 digits between 0 and its side.
    """
    side = isqrt(len(puzzle))
    digits = "123456789"[:side]
    if len(puzzle) not in (16, 81) or not set(puzzle) <= {"0", *digits}:
        raise UserError(f"a puzzle is 16 digits 0-4 or 81 digits 0-9, row by row with 0 = empty, got {puzzle!r}")
    cells = re.sub(r"[\s,|\[\]]", "", grid)
    if len(cells) != len(puzzle) or any(clue not in ("0", cell) for clue, cell in zip(puzzle, cells, strict=True)):
        return False
    box = isqrt(side)
    groups: dict[tuple[str, int], list[str]] = {}
    for place, cell in enumerate(cells):
        row, column = divmod(place, side)
        for group in (("row", row), ("column", column), ("box", row // box * side + column // box)):
            groups.setdefault(group, []).append(cell)
    return all(sorted(group) == list(digits) for group in groups.values())
