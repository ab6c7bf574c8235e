"""Exact match: the stated answer, else the whole response, equals the reference except for white space."""

from dream_lightning.tasks.registry import TASKS, Task
from dream_lightning.tasks.statement import stated_answer


def extract(response: str) -> str | None:
    return stated_answer(response) or response.strip() or None


TASKS["exact"] = Task(extract, lambda answer, reference: answer.split() == reference.split())
