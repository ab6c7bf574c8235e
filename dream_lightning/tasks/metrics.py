"""Graded responses, one by one and counted over an epoch and its ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from dream_lightning.batch import LossTerms, Prediction
from dream_lightning.errors import UserError
from dream_lightning.tasks.math import extract_answer, is_equivalent, reference_answer, split_thinking


@dataclass(frozen=True)
class Grade:
    """One graded response, as it stands in the predictions file."""

    thinking: str | None  # None = no thinking tags
    answer: str | None  # None = no answer found
    correct: bool | None  # None = not scored: the record has nothing to compare with


def grade(prediction: str, reference: str | None) -> Grade:
    """Grades a whole response against a record's reference or solution field (`reference_answer` reads either).

    `correct` is None where `reference` is None or a worked solution that states no answer, and False where the
    response states none.
    """
    thinking, _ = split_thinking(prediction)
    answer = extract_answer(prediction)
    target = None if reference is None else reference_answer(reference)
    if target is None:
        return Grade(thinking, answer, None)
    return Grade(thinking, answer, answer is not None and is_equivalent(answer, target))


class AnswerAccuracy(Metric):
    """Share of right answers. States are counts summed over ranks, so uneven ranks and batches weigh rightly.

    An answer that could not be parsed counts as not right in `accuracy`; `unparsed` shows how many there are.
    """

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

        Rows that are not scored (`correct` None) and rows with `counted` False, the copies that keep ranks in step
        ([B] bool), are left out of every count.

        Raises:
            UserError: the two have different lengths.
        """
        flags = [True] * len(graded) if counted is None else [bool(flag) for flag in torch.as_tensor(counted).tolist()]
        if len(graded) != len(flags):
            raise UserError(
                f"got {len(graded)} graded responses and {len(flags)} counted flags: pass one of each per row"
            )
        for result, flag in zip(graded, flags, strict=True):
            if not flag or result.correct is None:
                continue
            self.total += 1
            self.correct += int(result.correct)
            self.unparsed += int(result.answer is None)

    def compute(self) -> dict[str, Tensor]:
        """{"accuracy", "unparsed": shares in [0, 1]; "scored": number of rows}, each [] float32.

        With nothing scored all three are 0. NaN would make a checkpoint monitor's comparisons meaningless and an error
        would end a training run over a validation set of proofs; 0 never wins a monitor, and `scored` 0 says why.
        """
        rows = self.total.clamp(min=1)
        return {
            "accuracy": self.correct.float() / rows,
            "unparsed": self.unparsed.float() / rows,
            "scored": self.total.float(),
        }


class MeanLoss(Metric):
    """Sums and counts of losses over an epoch and its ranks, divided once.

    A loss that is not finite stays so: torchmetrics' MeanMetric leaves NaN out, and half a diverged validation would
    look well.
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
        """[] float32, 0 where nothing counted."""
        return LossTerms(self.sum, self.count).mean


class TokensPerForward(Metric):
    """Positions filled in a forward of the model, the speed of parallel decoding; summed over ranks before dividing."""

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
        """Adds B responses: positions filled in each, and in how many forwards; rows with `counted` False are left out.

        Raises:
            UserError: the three have different lengths.
        """
        for positions, passes, flag in zip(filled, forwards, counted, strict=True):
            if flag:
                self.filled += positions
                self.forwards += passes

    def compute(self) -> Tensor:
        """[] float32, 0 without a forward."""
        return self.filled.float() / self.forwards.clamp(min=1)
