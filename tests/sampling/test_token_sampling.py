"""Filters, draws and confidences."""

import pytest
import torch

from dream_lightning.diffusion.noise import uniform
from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.token_sampling import choose_tokens, draw, keep_top_k, keep_top_p, token_probabilities


def kept(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


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
    tokens, _ = choose_tokens(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), None, SamplingParams())
    assert tokens.tolist() == [1]


def test_confidences_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    by_alg = {
        a: choose_tokens(logits, None, SamplingParams(alg=a))[1].item()
        for a in ("maskgit_plus", "topk_margin", "entropy")
    }
    assert by_alg["maskgit_plus"] == pytest.approx(0.5)
    assert by_alg["topk_margin"] == pytest.approx(0.25)
    assert by_alg["entropy"] == pytest.approx(-1.5 * torch.log(torch.tensor(2.0)).item())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 4}])
def test_drawn_tokens_follow_the_softmax(options, chi_square):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).expand(40_000, -1)
    options = {"temperature": 1.0, **options}
    uniforms = uniform(3, torch.arange(40_000))
    tokens, _ = choose_tokens(logits, uniforms, SamplingParams(**options))
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
