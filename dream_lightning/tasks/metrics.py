"""Metrics over an epoch and its ranks. States are sums, divided once, so that uneven batches weigh correctly."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from dream_lightning.batch import LossTerms, Prediction
from dream_lightning.tasks.registry import Grade


class AnswerAccuracy(Metric):
    """Share of right answers. A response without an answer counts as wrong in `accuracy`, and also in `unparsed`."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    correct: Tensor  # [] int64
    unparsed: Tensor  # [] int64
    total: Tensor  # [] int64

    def __init__(self) -> None:
        super().__init__()
        for name in ("correct", "unparsed", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, graded: Sequence[Grade | Prediction], counted: Sequence[bool] | Tensor | None = None) -> None:
        """Adds B graded responses.

        Rows that are not scored (`correct` None), and rows with `counted` ([B] bool) False, the copies that give every
        rank the same number of forwards, are left out of every count.
        """
        flags = [True] * len(graded) if counted is None else torch.as_tensor(counted).tolist()
        for result, flag in zip(graded, flags, strict=True):
            if not flag or result.correct is None:
                continue
            self.total += 1
            self.correct += int(result.correct)
            self.unparsed += int(result.answer is None)

    def compute(self) -> dict[str, Tensor]:
        """{"accuracy", "unparsed": shares in [0, 1]; "scored": number of rows}, each [] float32.

        All three are 0 if nothing was scored: a NaN breaks the comparisons of a checkpoint monitor, and an error would
        end a training run whose validation set holds only proofs.
        """
        rows = self.total.clamp(min=1)
        return {
            "accuracy": self.correct.float() / rows,
            "unparsed": self.unparsed.float() / rows,
            "scored": self.total.float(),
        }


class MeanLoss(Metric):
    """Mean of the losses over an epoch and its ranks.

    A loss that is not finite makes the mean not finite. torchmetrics' MeanMetric drops NaN, which hides a divergence.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    sum: Tensor  # [] float32
    count: Tensor  # [] float32

    def __init__(self) -> None:
        super().__init__()
        for name in ("sum", "count"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, terms: LossTerms) -> None:
        """Adds a batch."""
        self.sum += terms.sum
        self.count += terms.count

    def compute(self) -> Tensor:
        """[] float32, 0 if nothing counted."""
        return LossTerms(self.sum, self.count).mean


class TokensPerForward(Metric):
    """Positions filled per forward of the model: the speed of parallel decoding."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    filled: Tensor  # [] int64
    forwards: Tensor  # [] int64

    def __init__(self) -> None:
        super().__init__()
        for name in ("filled", "forwards"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, filled: Sequence[int], forwards: Sequence[int], counted: Sequence[bool]) -> None:
        """Adds B responses: positions filled and number of forwards of each. Rows with `counted` False are left out."""
        for positions, passes, flag in zip(filled, forwards, counted, strict=True):
            if flag:
                self.filled += positions
                self.forwards += passes

    def compute(self) -> Tensor:
        """[] float32, 0 without a forward."""
        return self.filled.float() / self.forwards.clamp(min=1)
