"""Grading of generated answers. An import registers the tasks choice, countdown, exact, math and sudoku."""

from dream_lightning.tasks import choice, countdown, exact, math, sudoku
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

__all__ = [
    "AnswerAccuracy",
    "Grade",
    "MeanLoss",
    "Task",
    "TokensPerForward",
    "choice",
    "countdown",
    "exact",
    "get_task",
    "grade_response",
    "import_task",
    "math",
    "register",
    "split_thinking",
    "sudoku",
    "with_task_prompt",
]
