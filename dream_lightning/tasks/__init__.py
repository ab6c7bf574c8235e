"""Scoring of generated answers: strings in, verdicts and counts out."""

from dream_lightning.tasks.math import extract_answer, is_equivalent, reference_answer, split_thinking
from dream_lightning.tasks.metrics import AnswerAccuracy, Grade, MeanLoss, TokensPerForward, grade
from dream_lightning.tasks.puzzles import countdown_correct, sudoku_correct

__all__ = [
    "AnswerAccuracy",
    "Grade",
    "MeanLoss",
    "TokensPerForward",
    "countdown_correct",
    "extract_answer",
    "grade",
    "is_equivalent",
    "reference_answer",
    "split_thinking",
    "sudoku_correct",
]
