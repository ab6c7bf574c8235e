"""Metrics over an epoch and its ranks. States are sums, divided once, so that uneven batches weigh correctly."""

from itertools import compress

import torch
from torch import Tensor
from torchmetrics import Metric

from dream_lightning.batch import Answers, LossTerms


def proportion_interval(correct: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    from scipy import stats  # takes a second, and most commands need no interval

    interval = stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


class _Sums(Metric):
    full_state_update = False

    def __init__(self, *names: str, dtype: torch.dtype) -> None:
        super().__init__()
        for name in names:
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")


class AnswerScores(_Sums):
    """Scores of answers. A response without an answer counts as wrong in `accuracy`, and also in `unparsed`."""

    def __init__(self) -> None:
        super().__init__("scored", "correct", "unparsed", "filled", "forwards", dtype=torch.long)

    def update(self, answers: Answers) -> None:
        """Adds answers. Copies (`counted` False) are left out, unscored ones (`correct` None) count for the speed."""
        for prediction in compress(answers.predictions, answers.counted):
            self.filled += prediction.filled
            self.forwards += prediction.forwards
            if prediction.correct is not None:
                self.scored += 1
                self.correct += prediction.correct
                self.unparsed += prediction.answer is None

    def compute(self) -> dict[str, Tensor]:
        """Each [] float32, and 0 without answers: NaN breaks the comparisons of a checkpoint monitor."""
        scored = self.scored.clamp(min=1)
        return {
            "scored": self.scored.float(),
            "accuracy": self.correct / scored,
            "unparsed": self.unparsed / scored,
            "tokens_per_forward": self.filled / self.forwards.clamp(min=1),
        }


class MeanLoss(_Sums):
    """Mean loss, NaN if one is NaN: torchmetrics' MeanMetric drops NaN, which hides a divergence."""

    def __init__(self) -> None:
        super().__init__("sum", "count", dtype=torch.float32)

    def update(self, terms: LossTerms) -> None:
        self.sum += terms.sum
        self.count += terms.count

    def compute(self) -> Tensor:
        """[] float32, 0 if nothing counted."""
        return LossTerms(self.sum, self.count).mean
