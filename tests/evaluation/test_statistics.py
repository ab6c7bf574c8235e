import itertools

import pytest
from scipy import stats

from dream_lightning.errors import UserError
from dream_lightning.evaluation.statistics import (
    aup,
    majority_correct,
    mcnemar,
    mean_interval,
    pass_at_k,
)
from dream_lightning.tasks import proportion_interval


def test_intervals_are_the_published_ones_and_hold_the_estimate():
    assert proportion_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe, 1998, table I
    assert proportion_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    values = [0.0] * 30 + [1.0] * 70
    low, high = mean_interval(values)
    assert mean_interval(values) == (low, high)
    wilson = proportion_interval(70, 100)
    assert low < 0.7 < high and (low, high) == pytest.approx(wilson, abs=0.02)
    assert mean_interval([0.5, 0.5]) == mean_interval([0.5]) == (0.5, 0.5)


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(2 * stats.binom.cdf(2, 10, 0.5))


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    correct = [True, False, True, False, False]
    for k in range(1, 6):
        chosen = list(itertools.combinations(correct, k))
        assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    with pytest.raises(UserError, match="k is 6, wanted 1 to 5"):
        pass_at_k(5, 2, 6)


def test_the_majority_decides_and_the_first_wins_a_tie():
    assert majority_correct(["4", None, "5", "4"], [True, False, False, True])
    assert not majority_correct(["5", "4", None], [False, True, False])
    assert not majority_correct([None, None], [False, False])


def test_aup_is_that_of_d3llm():
    assert aup([(1.0, 0.8)]) == pytest.approx(80)
    # 2.75 × 91.56 + trapezoids, each accuracy weighted by exp(−3 (1 − y / 91.56))
    assert aup([(3.04, 0.9057), (2.75, 0.9156)]) == pytest.approx(2.75 * 91.56 + 0.29 * (91.56 + 90.57 * 0.968083) / 2)
    assert aup([(1, 0.8), (9, 0.7)]) == pytest.approx(80)  # 10 points worse: left out
    assert aup([(1, 0.0)]) == 0


def test_aup_leaves_out_points_below_the_slowest_and_not_the_best():
    everything = aup([(1, 0.5), (2, 0.6), (3, 0.52)])
    assert everything > aup([(2, 0.6)]) and everything > aup([(1, 0.5), (2, 0.6)])
    assert aup([(1, 0.5), (2, 0.6), (3, 0.44)]) == aup([(1, 0.5), (2, 0.6)])
