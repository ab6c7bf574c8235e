import pytest
import torch

from dream_lightning.tasks import AnswerAccuracy, Grade, TokensPerForward, grade


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("<think>\n1+1\n</think>\n\\boxed{2}", "2", Grade("1+1", "2", True)),
        ("\\boxed{3}", "2", Grade(None, "3", False)),
        ("no idea", "2", Grade(None, None, False)),
        ("<think>\\boxed{2}", "2", Grade("\\boxed{2}", None, False)),
        ("\\boxed{3}", None, Grade(None, "3", None)),
        ("\\boxed{3}", "A proof\nof 3 lines\n\\(\\blacksquare\\)", Grade(None, "3", None)),
        ("it is 72", "48/2 = 24\n#### 72", Grade(None, "72", True)),
    ],
)
def test_grade(prediction, reference, expected):
    assert grade(prediction, reference) == expected


PREDICTIONS = ["\\boxed{1}", "\\boxed{9}", "no idea", "\\boxed{4}", "\\boxed{5}", "\\boxed{6}"]
REFERENCES = ["1", "2", "3", None, "5", "6"]
GRADED = [grade(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)]
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
    for row in range(len(PREDICTIONS)):
        ranks[row % 4 == 0].update(GRADED[row : row + 1], COUNTED[row : row + 1])
    merged = AnswerAccuracy()
    for name, reduce in merged._reductions.items():  # what torchmetrics does over ranks
        setattr(merged, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    assert values(merged) == values(whole)


@pytest.mark.parametrize("update", [([], []), ([grade("\\boxed{1}", None)], None), ([grade("1", "1")], [False])])
def test_nothing_scored_is_zero_and_not_nan(update):
    metric = AnswerAccuracy()
    metric.update(*update)
    assert values(metric) == {"accuracy": 0.0, "unparsed": 0.0, "scored": 0.0}


def test_reset():
    metric = AnswerAccuracy()
    metric.update([grade("1", "1")])
    metric.reset()
    metric.update([grade("1", "2")])
    assert values(metric) == {"accuracy": 0.0, "unparsed": 0.0, "scored": 1.0}


def test_counts_survive_a_cast_to_bfloat16():
    metric = AnswerAccuracy().bfloat16()
    assert metric.total.dtype == torch.long
    metric.update([grade("1", "1")] * 300)
    assert values(metric)["scored"] == 300


@pytest.mark.parametrize("update", [([], [True]), ([grade("1", "1")], [True, True])])
def test_lengths_must_agree(update):
    with pytest.raises(ValueError, match="one of each per row"):
        AnswerAccuracy().update(*update)


def test_tokens_per_forward_by_hand():
    metric = TokensPerForward()
    assert metric.compute().item() == 0
    metric.update([30, 30, 8], [15, 10, 1], [True, True, False])
    metric.update([4], [0], [False])
    assert metric.compute().item() == pytest.approx(60 / 25)
    with pytest.raises(ValueError):
        metric.update([1], [1, 2], [True])
