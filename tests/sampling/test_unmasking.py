"""How many positions are filled, and which."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from dream_lightning.diffusion.noise import uniform
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.token_sampling import certainty
from dream_lightning.sampling.unmasking import (
    Factor,
    FastDllm,
    Threshold,
    TokensPerStep,
    choose_positions,
    fill_shares,
    perturb,
)

MASK, INF = 57, torch.inf


def test_counts_by_hand():
    confidence = torch.tensor([[0.95, 0, 0.9, 0.3], [0.2, 0.1, 0, 0], [0] * 4])
    for threshold, expected in ((0.9, [2, 0, 0]), (0.1, [3, 2, 0])):
        assert Threshold(threshold).counts(confidence, None, 0).tolist() == expected
    confidence = torch.tensor([[0.9, 0, 0.99, 0.3, 0.7]])  # (n + 1)(1 − cₙ): 2·0.01, 3·0.1, 4·0.3, 5·0.7
    for factor, n in ((0.01, 0), (0.1, 1), (0.31, 2), (1.3, 3), (4.0, 4)):
        assert Factor(factor).counts(confidence, None, 0).tolist() == [n]
    rule, remaining = TokensPerStep(3, steps=4), torch.tensor([7, 2, 0])
    assert [rule.counts(None, remaining, step).tolist() for step in (0, 3)] == [[3, 2, 0], [7, 2, 0]]


@pytest.mark.parametrize(("steps", "step_of_block", "allowed"), [(4, 0, [2]), (4, 1, [2, 3, 4]), (1, 0, [2, 3, 4])])
def test_fast_dllm_fills_the_first_token_of_a_block_alone_if_the_block_has_more_steps(steps, step_of_block, allowed):
    canvas = SimpleNamespace(x=torch.zeros(2, 6))
    positions = FastDllm(0.9, steps).positions(canvas, torch.tensor([0, 0, 1, 1, 1, 0]).bool(), 0, step_of_block)
    assert [row.nonzero().flatten().tolist() for row in positions] == [allowed] * 2


def test_a_mask_token_in_the_padding_is_not_masked():
    x, real = torch.tensor([[MASK, 1, MASK]]), torch.tensor([[False, True, True]])
    rest = dict.fromkeys(
        ("positions", "sample_ids", "copies", "earlier_steps", "filled_at", "confidence", "forwards", "prompt_length")
    )
    assert Canvas(x, real, **rest, padded=True, mask_token_id=MASK, eos_token_id=None).masked.tolist() == [
        [False, False, True]
    ]


def test_shares_fill_everything():
    t = [1, 0.75025, 0.5005, 0.25075]
    assert fill_shares(4, 1e-3) == pytest.approx([1 - t[1] / t[0], 1 - t[2] / t[1], 1 - t[3] / t[2], 1])
    assert fill_shares(1, 1e-3) == [1]


def test_certainty_is_one_only_for_the_certain():
    # Of two equally likely tokens, a perplexity of 2, it is a half.
    assert certainty(torch.tensor([0.0, -0.5, -3.0, -0.6931472]), "entropy").tolist() == pytest.approx(
        [1.0, 0.6065, 0.0498, 0.5], abs=1e-4
    )
    assert certainty(torch.tensor([0.7, 1.0000001]), "topk_margin").tolist() == pytest.approx([0.7, 1.0])


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_threshold_fills_what_is_certain_and_at_least_one(deep, prompts, run, alg):
    out = run(deep, prompts(6), alg=alg, threshold=0.4)
    for filled_at, confidence in zip(out.filled_at, out.confidence, strict=True):
        for step in filled_at.unique()[1:]:
            sure = confidence[filled_at == step]
            assert len(sure) == 1 or (sure >= 0.4).all()
    assert (out.forwards < 24).any()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"tokens_per_step": 5, "steps": 5}, [19, 14, 9, 4, 0]),
        ({"threshold": 1.0, "steps": 4}, [23, 22, 21, 0]),
        ({"tokens_per_step": 5, "steps": 2, "infill": True, "max_new_tokens": 0}, [19, 0]),
    ],
    ids=str,
)
def test_the_last_step_fills_what_is_left(deep, prompts, run, options, left):
    ids = torch.full((2, 24), MASK) if options.get("infill") else prompts(2)
    assert (run(deep, ids, **options).history == MASK).sum(-1).tolist() == [[n, n] for n in left]


class MoreAndMore:
    """Fill one position at the first step, two at the second, …, but never one that is less than half certain."""

    def counts(self, confidence, remaining, step):
        certain = (confidence >= 0.5).sum(dim=1)
        return certain.clamp(max=step + 1)


@pytest.mark.parametrize("blocks", [{}, {"block_length": 8, "cache": "dual"}], ids=str)
def test_a_rule_of_your_own(deep, prompts, run, blocks):
    """As docs/sampling.md shows it."""
    options = {"alg": "maskgit_plus", **blocks}
    out = run(deep, prompts(4), unmasking=MoreAndMore(), **options)
    assert (out.sequences != MASK).all()
    steps = 8 if blocks else 24
    for filled_at, confidence in zip(out.filled_at, out.confidence, strict=True):
        for step in filled_at.unique()[1:].tolist():
            sure, i = confidence[filled_at == step], step % steps
            assert i == steps - 1 or len(sure) == 1 or (len(sure) <= i + 1 and (sure >= 0.5).all())
    assert not torch.equal(out.sequences, run(deep, prompts(4), **options).sequences)
    alone = run(deep, prompts(4)[1:2], sample_ids=torch.tensor([1]), unmasking=MoreAndMore(), **options)
    assert torch.equal(alone.sequences[0], out.sequences[1])


class OnHost:
    counts_known_on_host = True

    def counts(self, confidence, remaining, step):
        return remaining.clamp(max=4 * (step % 2))


def test_a_rule_that_needs_no_confidence_costs_no_forward_where_it_fills_nothing(deep, prompts, run, calls):
    seen = calls(deep)
    out = run(deep, prompts(2), unmasking=OnHost())
    assert len(seen) == 6 and out.filled_at[:, 7:].unique().tolist() == [1, 3, 5, 7, 9, 11]


class Scalar:
    def counts(self, confidence, remaining, step):
        return remaining.sum()


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (Scalar(), {}, r"returned counts \[\], wanted \[2\]"),
        (OnHost(), {"threshold": 0.5}, "unmasking and threshold both decide"),
        (OnHost(), {"alg": "origin"}, "unmasking and alg: origin both decide"),
        (OnHost(), {"forbid_mask": False}, "set forbid_mask"),
    ],
)
def test_a_wrong_rule_is_refused(deep, prompts, run, rule, options, message):
    with pytest.raises(ValueError, match=message):
        run(deep, prompts(2), unmasking=rule, **options)


def test_most_confident_positions_leftmost_of_ties():
    grid = torch.tensor([[-INF, 1.0, 1.0, 0.5, -INF, 1.0], [-0.2, -0.1, -INF, -INF, -0.1, -INF]])
    chosen = choose_positions(grid, torch.tensor([2, 1]))
    assert [row.nonzero().flatten().tolist() for row in chosen] == [[1, 2], [1]]
    assert not choose_positions(grid, torch.tensor([0, 0])).any()
    assert torch.equal(choose_positions(grid, torch.tensor([4, 3])), grid > -INF)


def test_perturbed_order_draws_without_replacement_from_the_softmax(chi_square):
    confidence, alg_temp, trials = torch.tensor([-1.0, -0.5, -2.0, -0.9]), 0.7, 30_000
    noise = uniform(5, torch.arange(trials)[:, None], torch.arange(4))
    first, second = perturb(confidence.expand(trials, 4), alg_temp, noise).topk(2, dim=-1).indices.unbind(-1)
    counts = torch.bincount(first * 4 + second, minlength=16).double()
    p = (confidence / alg_temp).softmax(-1).double()
    expected = torch.zeros(16, dtype=torch.float64)
    for a, b in itertools.permutations(range(4), 2):
        expected[a * 4 + b] = p[a] * p[b] / (1 - p[a])
    statistic, limit = chi_square(counts, expected)
    assert statistic < limit
    assert perturb(torch.zeros(2), 1e-3, torch.tensor([0.0, 1 - 2.0**-24])).isfinite().all()
