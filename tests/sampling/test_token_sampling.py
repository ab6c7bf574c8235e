"""The pure functions: filters, draws, confidences, positions."""

import itertools

import pytest
import torch

from dream_lightning.diffusion.noise import uniform
from dream_lightning.sampling.token_sampling import candidates, draw, keep_top_k, keep_top_p, token_probabilities
from dream_lightning.sampling.unmasking import choose_positions, fill_shares, perturb


def kept(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def chi_square(counts, probs):
    """The statistic, and the value that a right sampler exceeds once in about 30,000 runs (normal approximation)."""
    expected = probs * counts.sum()
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    return statistic, freedom + 4 * (2 * freedom) ** 0.5


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.1, 0.5, 0.4], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]]).log()
    assert kept(keep_top_p(logits, 0.6)) == [[1, 2], [1], [0, 2]]


def test_top_k_keeps_ties_with_the_last():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert kept(keep_top_k(logits, 2)) == [[0, 2, 3], [0, 1]]
    assert kept(keep_top_k(logits, 99)) == [[0, 1, 2, 3]] * 2


def test_top_k_counts_after_top_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert token_probabilities(logits, top_p=0.5, top_k=3).gt(0).tolist() == [[True, True, False, False]]
    assert token_probabilities(logits, top_p=0.95, top_k=1).gt(0).tolist() == [[True, False, False, False]]


def test_filters_see_the_temperature():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert token_probabilities(logits, temperature=0.2, top_p=0.9).gt(0).sum() == 1
    assert token_probabilities(logits, temperature=5.0, top_p=0.9).gt(0).sum() == 3


def test_argmax_takes_the_lowest_id_of_a_tie():
    tokens, _ = candidates(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), None, alg="maskgit_plus")
    assert tokens.tolist() == [1]


def test_confidences_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    by_alg = {a: candidates(logits, None, alg=a)[1].item() for a in ("maskgit_plus", "topk_margin", "entropy")}
    assert by_alg["maskgit_plus"] == pytest.approx(0.5)
    assert by_alg["topk_margin"] == pytest.approx(0.25)
    assert by_alg["entropy"] == pytest.approx(-1.5 * torch.log(torch.tensor(2.0)).item())


def test_forbidden_token_is_never_chosen():
    logits = torch.tensor([[0.0, 9.0, 1.0]]).repeat(1000, 1)
    uniforms = uniform(0, torch.arange(1000))
    assert candidates(logits, None, alg="entropy", forbidden=1)[0].eq(2).all()
    assert candidates(logits, uniforms, alg="entropy", temperature=3.0, forbidden=1)[0].ne(1).all()


def test_more_positions_than_a_part_holds():
    logits = torch.randn(600, 11, generator=torch.Generator().manual_seed(0))
    tokens, confidence = candidates(logits, None, alg="maskgit_plus")
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 4}])
def test_drawn_tokens_follow_the_softmax(options):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).expand(40_000, -1)
    options = {"temperature": 1.0, **options}
    uniforms = uniform(3, torch.arange(40_000))
    tokens, _ = candidates(logits, uniforms, alg="maskgit_plus", **options)
    counts = torch.bincount(tokens, minlength=12).double()
    probs = token_probabilities(logits[:1], **options)[0].double()
    statistic, limit = chi_square(counts, probs)
    assert statistic < limit
    assert counts[probs == 0].sum() == 0


def test_improbable_tokens_are_not_drawn_at_the_ends_of_the_distribution():
    probs = torch.zeros(3, 152_064)
    probs[:, [7, 100_000]] = 0.5
    uniforms = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    assert draw(probs, uniforms).tolist() == [7, 100_000, 100_000]


def test_draw_reaches_the_last_token_of_a_flat_vocabulary():
    probs = torch.full((2, 152_064), 1 / 152_064)
    assert draw(probs, torch.tensor([0.0, 1 - 2.0**-24])).tolist() == [0, 152_063]


def test_most_confident_positions_leftmost_of_ties():
    inf = torch.inf
    grid = torch.tensor([[-inf, 1.0, 1.0, 0.5, -inf, 1.0], [-0.2, -0.1, -inf, -inf, -0.1, -inf]])
    chosen = choose_positions(grid, torch.tensor([2, 1]))
    assert [row.nonzero().flatten().tolist() for row in chosen] == [[1, 2], [1]]
    assert not choose_positions(grid, torch.tensor([0, 0])).any()
    assert torch.equal(choose_positions(grid, torch.tensor([4, 3])), grid > -inf)
    for counts in ([1, 1], [0, 1]):
        counts = torch.tensor(counts)
        assert torch.equal(choose_positions(grid, counts, most=1), choose_positions(grid, counts))


def test_perturbed_order_draws_without_replacement_from_the_softmax():
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


def test_perturbing_survives_every_uniform():
    assert perturb(torch.zeros(2), 1e-3, torch.tensor([0.0, 1 - 2.0**-24])).isfinite().all()


def test_shares_fill_everything():
    shares = fill_shares(4, 1e-3)
    t = [1, 0.75025, 0.5005, 0.25075]
    assert shares.tolist() == pytest.approx([1 - t[1] / t[0], 1 - t[2] / t[1], 1 - t[3] / t[2], 1])
    assert fill_shares(1, 1e-3).tolist() == [1]
