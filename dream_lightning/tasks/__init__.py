"""Tasks, which grade generated answers, and the metrics of the verdicts."""

from dream_lightning.tasks import choice, countdown, exact, math, sudoku  # noqa: F401 (they add themselves to TASKS)
from dream_lightning.tasks.metrics import AnswerScores, MeanLoss, proportion_interval
from dream_lightning.tasks.registry import TASKS, Task, apply_task, grade_response, load_task, split_thinking, task_of
from dream_lightning.tasks.symbolic import checker as grading_clock

__all__ = ["TASKS", "AnswerScores", "MeanLoss", "Task"]
__all__ += [
    "apply_task",
    "grade_response",
    "grading_clock",
    "load_task",
    "proportion_interval",
    "split_thinking",
    "task_of",
]
