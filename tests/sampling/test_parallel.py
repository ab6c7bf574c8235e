"""Several tokens a step, by how sure the model is of them."""

import pytest
import torch

from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.rows import locate
from dream_lightning.sampling.token_sampling import certainty
from dream_lightning.sampling.unmasking import adaptive_counts, by_factor

MASK, INF = 57, torch.inf
ADAPTIVE = [{"threshold": 0.4}, {"factor": 1.5}, {"tokens_per_step": 3}]


def params(**options):
    return SamplingParams(max_new_tokens=8, steps=8, forbid_mask=True, **options)


def test_threshold_by_hand():
    grid = torch.tensor([[0.95, -INF, 0.9, 0.3], [0.2, 0.1, -INF, -INF], [-INF] * 4])
    left = torch.tensor([3, 2, 0])
    assert adaptive_counts(grid, left, params(alg="maskgit_plus", threshold=0.9)).tolist() == [2, 1, 0]
    assert adaptive_counts(grid, left, params(alg="maskgit_plus", threshold=0.1)).tolist() == [3, 2, 0]


def test_factor_by_hand():
    # (n + 1)(1 − cₙ): 2·0.01, 3·0.1, 4·0.3, 5·0.7
    grid = torch.tensor([[0.9, -INF, 0.99, 0.3, 0.7], [0.2, 0.1, -INF, -INF, -INF]])
    for factor, n in ((0.01, 0), (0.1, 1), (0.31, 2), (1.3, 3), (4.0, 4)):
        assert by_factor(grid, factor, "maskgit_plus").tolist()[0] == n
    assert adaptive_counts(grid, torch.tensor([4, 2]), params(alg="maskgit_plus", factor=0.01)).tolist() == [1, 1]


def test_certainty_is_one_only_for_the_certain():
    entropies = torch.tensor([0.0, -0.5, -3.0])
    assert certainty(entropies, "entropy").tolist() == pytest.approx([1.0, 0.6065, 0.0498], abs=1e-4)
    # Two equally likely tokens: a perplexity of 2.
    assert certainty(torch.tensor([0.5]).log(), "entropy").item() == pytest.approx(0.5)
    assert certainty(torch.tensor([0.7, 1.0000001]), "topk_margin").tolist() == pytest.approx([0.7, 1.0])


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_threshold_fills_what_is_certain_and_at_least_one(deep, prompts, run, alg):
    out = run(deep, prompts(6), alg=alg, threshold=0.4)
    several = 0
    for row in range(6):
        for step in out.filled_at[row].unique()[1:]:
            sure = out.confidence[row][out.filled_at[row] == step]
            assert len(sure) == 1 or (sure >= 0.4).all()
            several += len(sure) > 1
    assert several and (out.sequences != MASK).all()
    assert (out.forwards < 24).any()


@pytest.mark.parametrize("way", ADAPTIVE, ids=str)
@pytest.mark.parametrize("noise", [{}, {"temperature": 1.0}], ids=["greedy", "noisy"])
def test_a_rows_answer_is_its_own(deep, prompts, run, way, noise):
    ids = prompts(5)
    together = run(deep, ids, **way, **noise)
    for b in range(5):
        alone = run(deep, ids[b : b + 1], sample_ids=torch.tensor([b]), **way, **noise)
        assert torch.equal(alone.history[:, 0], together.history[:, b])
        assert alone.forwards[0] == together.forwards[b]


def test_tokens_per_step(deep, prompts, run):
    out = run(deep, prompts(2), tokens_per_step=5, steps=5)
    assert (out.history == MASK).sum(-1).tolist() == [[19, 19], [14, 14], [9, 9], [4, 4], [0, 0]]
    assert out.forwards.tolist() == [5, 5]
    drawn = run(deep, prompts(2), tokens_per_step=5, steps=5, alg_temp=0.5)
    assert not torch.equal(drawn.sequences, out.sequences)


def test_the_last_step_fills_what_is_left(deep, prompts, run):
    out = run(deep, prompts(2), threshold=1.0, steps=4)
    assert (out.history == MASK).sum(-1).tolist() == [[23, 23], [22, 22], [21, 21], [0, 0]]


def test_rows_that_are_ready_leave_the_batch(deep, prompts, run, calls):
    seen = calls(deep)
    out = run(deep, prompts(7), alg="maskgit_plus", threshold=0.4)
    rows = [shape[0] for shape in seen]
    assert rows == sorted(rows, reverse=True) and rows[0] == 7
    assert set(rows) - {7} <= {1, 2, 4} and len(set(rows)) > 1
    assert len(seen) == int(out.forwards.max())


def test_ranks_stay_in_step(deep, prompts, run, calls):
    seen = calls(deep)
    a = run(deep, prompts(7), threshold=0.4, run_every_step=True)
    assert len(seen) == 24
    assert torch.equal(a.history, run(deep, prompts(7), threshold=0.4).history)


@pytest.mark.parametrize(
    ("a", "b"),
    [({"threshold": 0.4}, {"threshold": 0.8}), ({"factor": 0.5}, {"factor": 3.0}), ({}, {"tokens_per_step": 4})],
)
def test_every_option_changes_the_answer(deep, prompts, run, a, b):
    assert not torch.equal(run(deep, prompts(8), **a).sequences, run(deep, prompts(8), **b).sequences)


def test_locating_is_nonzero():
    where = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    number = int(where.sum())
    for at_least in (number, number + 6):
        row, column, place = locate(where, at_least)
        assert torch.equal(torch.stack([row, column], 1)[:number], where.nonzero())
        assert torch.equal(place[where], torch.arange(number)) and place.min() >= -1 and place.max() < number
        assert len(row) == at_least and not row[number:].any() and not column[number:].any()
    assert [len(part) for part in locate(torch.zeros(2, 3).bool(), 0)[:2]] == [0, 0]
