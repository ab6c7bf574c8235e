"""Exact match: the stated answer, else the whole response, equals the reference except for white space."""

from dream_lightning.tasks.math import stated_answer
from dream_lightning.tasks.registry import TASKS, Task


def extract(response: str) -> str | None:
    return stated_answer(response) or response.strip() or None


TASKS["exact"] = Task(extract, lambda answer, reference: answer.split() == reference.split())
