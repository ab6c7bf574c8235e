"""Filters, draws and confidences."""

import math
from types import SimpleNamespace

import pytest
import torch

from dream_lightning.diffusion.noise import uniform
from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.token_sampling import choose_tokens, constrain, draw, token_probabilities

A = [0.1, 0.5, 0.4]
TIES = torch.tensor([3.0, 1.0, 2.0, 2.0]).softmax(-1).tolist()


@pytest.mark.parametrize(
    ("probs", "options", "kept"),
    [
        (A, {"top_p": 0.6}, [1, 2]),  # the token that crosses is kept
        (A, {"top_p": 0.4}, [1]),
        ([0.5, 0.5], {"top_p": 0.5}, [0, 1]),  # the first reaches it but does not cross
        (TIES, {"top_k": 2}, [0, 2, 3]),  # and ties with the last
        (TIES, {"top_k": 99}, [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.5, "top_k": 3}, [0, 1]),  # top-k counts after top-p
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.95, "top_k": 1}, [0]),
        ([0.6, 0.3, 0.1], {"temperature": 0.2, "top_p": 0.9}, [0]),  # filters see the temperature
        ([0.6, 0.3, 0.1], {"temperature": 5.0, "top_p": 0.9}, [0, 1, 2]),
    ],
)
def test_filters(probs, options, kept):
    filtered = token_probabilities(torch.tensor([probs]).log(), SamplingParams(**options))
    assert filtered[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("alg", "confidence"), [("maskgit_plus", 0.5), ("topk_margin", 0.25), ("entropy", -1.5 * math.log(2))]
)
def test_confidences_by_hand(alg, confidence):
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    assert choose_tokens(logits, None, SamplingParams(alg=alg))[1].item() == pytest.approx(confidence)


def test_argmax_takes_the_lowest_id_of_a_tie():
    tokens, _ = choose_tokens(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), None, SamplingParams())
    assert tokens.tolist() == [1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 4}], ids=str)
def test_drawn_tokens_follow_the_softmax(options, chi_square):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).expand(40_000, -1)
    params = SamplingParams(**{"temperature": 1.0, **options})
    tokens, _ = choose_tokens(logits, uniform(3, torch.arange(40_000)), params)
    counts = torch.bincount(tokens, minlength=12).double()
    probs = token_probabilities(logits[:1], params)[0].double()
    statistic, limit = chi_square(counts, probs)
    assert statistic < limit and counts[probs == 0].sum() == 0


def test_draws_reach_both_ends_of_the_vocabulary_and_no_improbable_token():
    probs = torch.zeros(3, 152_064)
    probs[:, [7, 100_000]] = 0.5
    assert draw(probs, torch.tensor([0.0, 0.5, 1 - 2.0**-24])).tolist() == [7, 100_000, 100_000]
    flat = torch.full((2, 152_064), 1 / 152_064)
    assert draw(flat, torch.tensor([0.0, 1 - 2.0**-24])).tolist() == [0, 152_063]


def test_eos_is_allowed_from_the_position_after_the_minimum_on():
    canvas, columns = SimpleNamespace(prompt_length=4, eos_token_id=1, mask_token_id=2), torch.tensor([4, 5, 6])
    logits = constrain(torch.zeros(3, 3), columns, canvas, SamplingParams(min_new_tokens=2))
    assert logits.isinf().tolist() == [[False, True, False], [False, True, False], [False, False, False]]
