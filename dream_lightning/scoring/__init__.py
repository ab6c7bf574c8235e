"""Scoring of generated answers: strings in, verdicts and counts out."""

from dream_lightning.scoring.answers import extract_answer, is_equivalent, reference_answer, split_thinking
from dream_lightning.scoring.graders import countdown_correct, sudoku_correct
from dream_lightning.scoring.metrics import AnswerAccuracy, Grade, MeanLoss, TokensPerForward, grade

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
