import pytest
import torch

from dream_lightning.batch import Answers, LossTerms, Prediction
from dream_lightning.tasks import AnswerScores, MeanLoss


def predicted(answer, correct, filled=30, forwards=10):
    return Prediction("q", "?", "", None, answer, "1", correct, 3, 0.1, forwards, filled)


RIGHT, WRONG, UNPARSED = predicted("1", True), predicted("9", False), predicted(None, False)
NOT_SCORED = predicted("4", None)
PREDICTIONS = [RIGHT, WRONG, UNPARSED, NOT_SCORED, RIGHT, predicted("1", True, filled=40)]
COUNTED = [True, True, True, True, False, True]


def scores(predictions, counted):
    metric = AnswerScores()
    metric.update(Answers(predictions, counted))
    return metric


def values(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def test_counts_by_hand():
    metric = scores(PREDICTIONS, COUNTED)
    expected = {"scored": 4.0, "accuracy": 0.5, "unparsed": 0.25, "tokens_per_forward": 160 / 50}
    assert values(metric) == pytest.approx(expected)
    assert all(value.dtype == torch.float32 and value.shape == () for value in metric.compute().values())


def test_any_split_into_batches_and_ranks_counts_the_same():
    ranks, merged = [AnswerScores(), AnswerScores()], AnswerScores()
    for row in range(len(PREDICTIONS)):
        ranks[row % 4 == 0].update(Answers(PREDICTIONS[row : row + 1], COUNTED[row : row + 1]))
    for name, reduce in merged._reductions.items():  # what torchmetrics does over ranks
        setattr(merged, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    assert values(merged) == values(scores(PREDICTIONS, COUNTED))


@pytest.mark.parametrize("update", [([], []), ([predicted("4", None, 0, 0)], [True]), ([RIGHT], [False])])
def test_nothing_scored_is_zero_and_not_nan(update):
    assert set(values(scores(*update)).values()) == {0.0}


def test_counts_are_exact_after_a_cast_to_bfloat16_and_a_reset():
    metric = scores([WRONG], [True]).bfloat16()
    metric.reset()
    metric.update(Answers([RIGHT] * 300, [True] * 300))
    assert metric.scored.dtype == torch.long and metric.scored == 300


@pytest.mark.parametrize(("sums", "mean"), [([], 0.0), ([3.0, 5.0], 2.0), ([float("nan"), 5.0], float("nan"))])
def test_the_mean_loss_divides_once_and_keeps_nan(sums, mean):
    metric = MeanLoss()
    for count, loss in enumerate(sums, start=1):
        metric.update(LossTerms(torch.tensor(loss), torch.tensor(count + 0.5)))
    assert metric.compute().item() == pytest.approx(mean, nan_ok=True)
