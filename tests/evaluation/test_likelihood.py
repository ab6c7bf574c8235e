import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import SIZES, tiny_module

from dream_lightning.batch import Document, SampleKey
from dream_lightning.data.packing import collate
from dream_lightning.errors import UserError
from dream_lightning.evaluation.likelihood import most_likely, nll_bound, nll_bounds, total

TEXT = [3, 14, 15, 9, 26, 5, 35, 8, 30, 7, 11, 2, 44, 6]


def masked_nll(model, context, continuation):
    """Every mask of the continuation → Σ_masked −log p, by a plain forward over whole logits."""
    sums = {}
    for mask in itertools.product([False, True], repeat=len(continuation)):
        places = [len(context) + i for i, masked in enumerate(mask) if masked]
        ids = torch.tensor([*context, *continuation])
        x_t = ids.index_fill(0, torch.tensor(places, dtype=torch.long), model.config.mask_token_id)
        log_p = model(x_t[None]).logits[0].double().log_softmax(-1)
        sums[mask] = -sum(log_p[max(i - 1, 0), ids[i]].item() for i in places)
    return sums


def exact_bound(sums, t_min=0.0):
    """The mean over t in (t_min, 1) of E[Σ_masked −log p] / t, by Gauss-Legendre: a polynomial in t."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    t = t_min + (1 - t_min) * (nodes + 1) / 2
    value = sum(
        nll * (t ** (sum(mask) - 1) * (1 - t) ** (len(mask) - sum(mask))) for mask, nll in sums.items() if any(mask)
    )
    return float((weights / 2 * value).sum())


@pytest.mark.parametrize("context", [[], TEXT[6:]], ids=["no context", "context"])
def test_the_bound_is_that_summed_over_all_masks(deep, context):
    exact = exact_bound(masked_nll(deep, context, TEXT[:6]))
    assert nll_bound(deep, context, TEXT[:6], draws=63) == pytest.approx((exact, 0, 6), rel=1e-5)
    estimates = [nll_bound(deep, context, TEXT[:6], draws=62, seed=seed) for seed in range(40)]
    off = [(bound.nll - exact) / bound.standard_error for bound in estimates]
    assert max(map(abs, off)) < 3 and 0.2 < np.std(off) < 1.1
    assert abs(np.mean(off)) < 3 * np.std(off) / 40**0.5  # no bias


def test_many_draws_come_close_and_the_seed_decides(deep):
    exact = exact_bound(masked_nll(deep, TEXT[9:], TEXT[:9]))
    few, many = (nll_bound(deep, TEXT[9:], TEXT[:9], draws=draws) for draws in (16, 500))
    assert many.nll == pytest.approx(exact, rel=0.01) and many.standard_error < few.standard_error / 3
    assert nll_bound(deep, TEXT[9:], TEXT[:9], draws=16) == few != nll_bound(deep, TEXT[9:], TEXT[:9], draws=16, seed=1)


def test_pairs_of_one_batch_have_the_bounds_of_each_alone(deep):
    pairs = [(TEXT[:4], TEXT[4:]), ([], TEXT[:3]), (TEXT[:9], TEXT[9:10]), (TEXT[:2], TEXT[2:12])]
    deep.train()
    alone = [nll_bound(deep, *pair, draws=20, batch_size=7) for pair in pairs]
    assert deep.training and not deep.eval().training
    for together, bound in zip(nll_bounds(deep, pairs, draws=20, batch_size=9), alone, strict=True):
        assert together == pytest.approx(bound, rel=1e-4)
    sums = total(alone)
    assert sums.perplexity == pytest.approx(math.exp(sum(bound.nll for bound in alone) / 24)) and sums.tokens == 24


def test_the_most_likely_choice_has_the_lowest_bound_or_the_lowest_per_token(deep):
    choices = [TEXT[4:8], TEXT[8:9], TEXT[3:9]]
    bounds = [exact_bound(masked_nll(deep, TEXT[:4], choice)) for choice in choices]
    assert most_likely(deep, TEXT[:4], choices) == np.argmin(bounds) == 1
    assert most_likely(deep, TEXT[:4], choices, per_token=True) == np.argmin(np.divide(bounds, [4, 1, 6])) != 1


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (([1], []), {}, "the continuation of pair 0 is empty"),
        (([1] * 100, [1] * 50), {}, "pair 0 has 150 tokens, the model 128 positions"),
        (([1], [2]), {"draws": 1}, "draws is 1, wanted at least 2"),
        (([1], [2]), {"batch_size": 0}, "batch_size is 0, wanted at least 1"),
    ],
)
def test_refusals(deep, pair, options, message):
    with pytest.raises(UserError, match=message):
        nll_bound(deep, *pair, **options)


def test_val_nll_is_the_bound_for_t_above_a_thousandth():
    """Most of the error of 40,000 draws is that of the mean weight, which is 1 and known: a control variate."""
    module = tiny_module(new_model=SIZES | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1})
    module.configure_model()
    module.eval()
    prompt, response = TEXT[:2], TEXT[2:8]
    exact = exact_bound(masked_nll(module.model, prompt, response), t_min=1e-3) / 6
    row = [[(SampleKey(-1, 0, 0), Document("a", prompt, response, [1.0] * 6))]]
    one, draws = collate(row, pad_token_id=0), 40_000
    rows = {name: x.expand(draws, -1) for name, x in one.tensors().items()}
    repeat = torch.arange(draws)[:, None].expand(-1, 8)  # as RowSampler numbers the draws of a document
    batch = replace(one, **rows | {"document_ids": repeat, "epochs": -1 - repeat})
    with torch.no_grad():
        module.validation_step(batch, 0)
    noised = module.noise(batch)
    mean_weight = float((noised.is_masked / noised.t).sum() / (6 * draws))
    assert mean_weight == pytest.approx(1, abs=0.015)
    assert float(module.val_nll.compute()) == pytest.approx(exact * mean_weight, rel=1e-3)
