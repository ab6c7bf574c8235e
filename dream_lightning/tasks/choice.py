"""Multiple choice: one letter, A to J."""

import operator
import re

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.tasks.registry import TASKS, Task
from dream_lightning.tasks.statement import fold, stated_answer

TEXT_MACRO = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
LETTER = re.compile(r"\W*([A-J])(?:\W*$|[).:,*]|\s(?=because|since))")  # "C", "(C)", "**C**", "C. Paris"
IN_TEXT = re.compile(r"\(([A-J])\)|^\W*([A-J])(?:[).:*]|\W*$)", re.MULTILINE)


def extract(response: str) -> str | None:
    """The letter of the stated answer (a box, "the answer is …"), else the last "(C)" or line that begins with "C."."""
    if stated := LETTER.match(TEXT_MACRO.sub(r"\1", stated_answer(response) or "")):
        return stated[1]
    letters = IN_TEXT.findall(fold(response))
    return "".join(letters[-1]) if letters else None


def reference(example: Example) -> str | None:
    """The letter in the reference column. Raises UserError if it holds none."""
    letter = LETTER.match((example.reference or "").strip())
    if example.reference is not None and letter is None:
        raise UserError(
            f"{example.origin}: the reference {example.reference!r:.80} is not a letter from A to J: set "
            "reference_column to the column with the letter, or the task to exact"
        )
    return letter and letter[1]


TASKS["choice"] = Task(extract, operator.eq, reference)
