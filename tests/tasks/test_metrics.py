import pytest
import torch

from dream_lightning.tasks import AnswerAccuracy, Grade, TokensPerForward

RIGHT, WRONG, UNPARSED = Grade(None, "1", True), Grade(None, "9", False), Grade(None, None, False)
NOT_SCORED = Grade(None, "4", None)
GRADED = [RIGHT, WRONG, UNPARSED, NOT_SCORED, RIGHT, RIGHT]
COUNTED = [True, True, True, True, False, True]


def values(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def test_counts_by_hand():
    metric = AnswerAccuracy()
    metric.update(GRADED, COUNTED)
    assert values(metric) == {"accuracy": 0.5, "unparsed": 0.25, "scored": 4.0}
    assert all(value.dtype == torch.float32 and value.shape == () for value in metric.compute().values())


def test_any_split_into_batches_and_ranks_counts_the_same():
    whole = AnswerAccuracy()
    whole.update(GRADED, torch.tensor(COUNTED))
    ranks = [AnswerAccuracy(), AnswerAccuracy()]
    for row in range(len(GRADED)):
        ranks[row % 4 == 0].update(GRADED[row : row + 1], COUNTED[row : row + 1])
    merged = AnswerAccuracy()
    for name, reduce in merged._reductions.items():  # what torchmetrics does over ranks
        setattr(merged, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    assert values(merged) == values(whole)


@pytest.mark.parametrize("update", [([], []), ([NOT_SCORED], None), ([RIGHT], [False])])
def test_nothing_scored_is_zero_and_not_nan(update):
    metric = AnswerAccuracy()
    metric.update(*update)
    assert values(metric) == {"accuracy": 0.0, "unparsed": 0.0, "scored": 0.0}


def test_counts_are_exact_after_a_cast_to_bfloat16_and_a_reset():
    metric = AnswerAccuracy().bfloat16()
    assert metric.total.dtype == torch.long
    metric.update([WRONG])
    metric.reset()
    metric.update([RIGHT] * 300)
    assert values(metric)["scored"] == 300


@pytest.mark.parametrize("update", [([], [True]), ([RIGHT], [True, True])])
def test_lengths_must_agree(update):
    with pytest.raises(ValueError, match="zip"):
        AnswerAccuracy().update(*update)


def test_tokens_per_forward_by_hand():
    metric = TokensPerForward()
    assert metric.compute().item() == 0
    metric.update([30, 30, 8], [15, 10, 1], [True, True, False])
    metric.update([4], [0], [False])
    assert metric.compute().item() == pytest.approx(60 / 25)
    with pytest.raises(ValueError, match="zip"):
        metric.update([1], [1, 2], [True])
