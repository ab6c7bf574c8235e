"""Grading of generated answers. Importing this package registers math, countdown, sudoku, choice and exact."""

from dream_lightning.tasks.choice import CHOICE
from dream_lightning.tasks.countdown import COUNTDOWN
from dream_lightning.tasks.exact import EXACT
from dream_lightning.tasks.math import MATH
from dream_lightning.tasks.metrics import AnswerAccuracy, MeanLoss, TokensPerForward
from dream_lightning.tasks.registry import (
    Grade,
    Task,
    get_task,
    grade_response,
    import_task,
    register,
    split_thinking,
    with_task_prompt,
)
from dream_lightning.tasks.sudoku import SUDOKU

__all__ = [
    "CHOICE",
    "COUNTDOWN",
    "EXACT",
    "MATH",
    "SUDOKU",
    "AnswerAccuracy",
    "Grade",
    "MeanLoss",
    "Task",
    "TokensPerForward",
    "get_task",
    "grade_response",
    "import_task",
    "register",
    "split_thinking",
    "with_task_prompt",
]
