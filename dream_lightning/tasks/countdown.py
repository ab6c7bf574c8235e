"""Countdown: combine all numbers with + - * / to make the target. Many expressions are right."""

import ast
import operator
import re
from collections import Counter
from fractions import Fraction

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.tasks.registry import TASKS, Task, record_value
from dream_lightning.tasks.statement import stated_answer

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
SYNONYMS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "$": ""}
STEP = r"\d+ *[+\-*/] *\d+ *= *\d+"
EXPRESSION = re.compile(
    rf"{STEP}(?:[,;\n ]+{STEP})+|" r"[\d(+\-][\d+\-*/() ]*[+\-*/][\d+\-*/() ]*\d[) ]*(?:=[ \d\-]*\d)?"
)
NUMBERS = re.compile(r"[\[(\s]*\d+(?:[,\s]+\d+)*[\])\s]*")


def extract(response: str) -> str | None:
    """The expression or steps in tags, in a box or after "the answer is", else the last in the text."""
    stated = stated_answer(response)
    for text in (stated or "", response):
        if expressions := EXPRESSION.findall(re.sub(r"(?i)\bstep \d+[:.)]", "", _plain(text))):
            return expressions[-1].strip()
    return stated


def reference(example: Example) -> tuple[list[int], int]:
    """The numbers, a list or a text such as "30,100,93", and the target. Raises UserError if they are not integers."""
    numbers, target = record_value(example, "numbers", "nums", "input"), record_value(example, "target", "output")
    written = str(example.reference if target is None else target).strip()
    if not NUMBERS.fullmatch(str(numbers)) or not re.fullmatch(r"-?\d+", written):
        raise UserError(
            f"{example.origin} has the numbers {numbers!r:.80} and the target {written!r:.80}, wanted integers in the "
            "columns numbers (or nums, input) and target (or output)"
        )
    return [int(number) for number in re.findall(r"\d+", str(numbers))], int(written)


def prompt(example: Example) -> str:
    """The record's prompt if it is in words, else a question."""
    text = example.prompt[-1]["content"]
    if re.search("[A-Za-z]{2}", text):
        return text
    numbers, target = reference(example)
    return (
        f"Use each of the numbers {', '.join(map(str, numbers))} exactly once, with + - * / and brackets, to make "
        rf"{target}. Put the expression in \boxed{{}}."
    )


def is_solution(expression: str, problem: tuple[list[int], int]) -> bool:
    """Whether an expression uses each number exactly once and equals the target exactly (fractions, no rounding).

    Integers, + - * / (also × · ÷ and their LaTeX names), brackets and signs, and a trailing "= target"; at most 200
    characters. Or steps such as "86+28=114,31-13=18", each of which may use earlier results. Anything else is wrong.
    No eval(): the parsed tree is walked.
    """
    numbers, target = problem
    if len(expression) <= 200 and len(steps := re.split(r"[,;\n]\s*", _plain(expression).strip(" ,;\n"))) > 1:
        return _steps_lead_to(steps, numbers, target)
    formula, _, claimed = _plain(expression).partition("=")
    if claimed.strip() not in ("", str(target)) or not re.fullmatch(r"[\d+\-*/() ]{1,200}", formula):
        return False
    used: list[int] = []
    try:
        value = _value(ast.parse(formula.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return Counter(used) == Counter(numbers) and value == target


def _steps_lead_to(steps: list[str], numbers: list[int], target: int) -> bool:
    """Whether each step "a+b=c" is right and takes a and b from what is left, and the last leaves only the target."""
    left = Counter(numbers)
    for step in steps:
        formula, _, claimed = step.partition("=")
        operands, result = Counter(map(int, re.findall(r"\d+", formula))), re.fullmatch(r" *(\d+) *", claimed)
        if not result or not operands <= left or not is_solution(formula, (list(operands.elements()), int(result[1]))):
            return False
        left = left - operands + Counter([int(result[1])])
    return left == Counter([target])


def _plain(text: str) -> str:
    for written, meant in SYNONYMS.items():
        text = text.replace(written, meant)
    return text


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The exact value of a tree; collects its integers. Raises ValueError at any node that is not arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](_value(node.operand, used))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


TASKS["countdown"] = Task(extract, is_solution, reference, prompt)
TASKS["countdown-bare"] = Task(extract, is_solution, reference)  # asked in the words of the record
