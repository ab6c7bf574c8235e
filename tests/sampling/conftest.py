"""Statistics for draws."""

import pytest


@pytest.fixture(scope="session")
def chi_square():
    """`chi_square(counts, probs)` → the statistic, and a value that correct samplers exceed once in 30,000 runs."""

    def compare(counts, probs):
        expected = probs * counts.sum()
        possible = expected > 0
        statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        freedom = int(possible.sum()) - 1
        return statistic, freedom + 4 * (2 * freedom) ** 0.5

    return compare
