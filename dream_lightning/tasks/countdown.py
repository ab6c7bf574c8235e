"""Countdown: combine all numbers with + - * / to make the target. Many expressions are right."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.tasks.math import stated_answer, tagged_answer
from dream_lightning.tasks.registry import Task, record_value, register

MAX_EXPRESSION_CHARS = 200
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SYNONYMS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "$": ""}
EXPRESSION = re.compile(r"[\d(+\-][\d+\-*/() ]*[+\-*/][\d+\-*/() ]*\d[) ]*(?:=[ \d\-]*\d)?")
NUMBERS = re.compile(r"[\[(\s]*\d+(?:[,\s]+\d+)*[\])\s]*")


def extract(response: str) -> str | None:
    """The expression in `<answer>` tags, in a box or after "the answer is", else the last one in the text."""
    if stated := tagged_answer(response) or stated_answer(response):
        return stated
    expressions = EXPRESSION.findall(_plain(response))
    return expressions[-1].strip() if expressions else None


def reference(example: Example) -> tuple[list[int], int]:
    """The numbers and the target of a record.

    They are in the columns `numbers`, `nums` or `input`, as a list or as text such as "30,100,93", and `target` or
    `output`, else the reference column.

    Raises:
        UserError: one is missing or not made of integers.
    """
    numbers, target = record_value(example, "numbers", "nums", "input"), record_value(example, "target", "output")
    written = str(example.reference if target is None else target).strip()
    if not NUMBERS.fullmatch(str(numbers)) or not re.fullmatch(r"-?\d+", written):
        raise UserError(
            f"{example.origin} has the numbers {numbers!r:.80} and the target {written!r:.80}; wanted integers, "
            "such as [30, 100, 93] in a column numbers (or nums, input) and 23 in a column target (or output)"
        )
    return [int(number) for number in re.findall(r"\d+", str(numbers))], int(written)


def prompt(example: Example) -> str:
    """The record's prompt if it is in words; a problem is put for a record that has only numbers."""
    text = example.prompt[-1]["content"]
    if re.search("[A-Za-z]{2}", text):
        return text
    numbers, target = reference(example)
    return (
        f"Use each of the numbers {', '.join(map(str, numbers))} exactly once, with + - * / and brackets, to make "
        rf"{target}. Put the expression in \boxed{{}}."
    )


def countdown_correct(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `expression` uses each of `numbers` exactly once and equals `target` exactly (fractions, no rounding).

    Integers, + - * / (also × · ÷ and their LaTeX names), brackets and signs; a trailing "= target" is allowed.
    Anything else, a division by zero or more than 200 characters is wrong. No eval(): the parsed tree is walked.
    """
    formula, _, claimed = _plain(expression).partition("=")
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


def _plain(text: str) -> str:
    for written, meant in SYNONYMS.items():
        text = text.replace(written, meant)
    return text


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
    raise ValueError(f"{type(node).__name__} is not arithmetic")


register(Task("countdown", extract, lambda answer, problem: countdown_correct(answer, *problem), reference, prompt))
