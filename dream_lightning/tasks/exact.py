"""Exact match: the answer is the text of the reference, except for white space. Case counts."""

from dream_lightning.tasks.math import stated_answer
from dream_lightning.tasks.registry import TASKS, Task


def extract(response: str) -> str | None:
    """The stated answer (a box, "the answer is …"), else the whole response."""
    return stated_answer(response) or response.strip() or None


TASKS["exact"] = Task(extract, lambda answer, reference: answer.split() == reference.split())
