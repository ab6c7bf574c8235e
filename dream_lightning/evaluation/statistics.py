"""Statistics of scores: intervals, pass@k, maj@k, McNemar's test, and accuracy under parallelism."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats

from dream_lightning.errors import UserError

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """95 % interval of a mean by the percentile bootstrap (Efron, 1979), the same for the same values and seed."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:  # nothing to resample
        return float(values.mean()), float(values.mean())
    options = {"confidence_level": 0.95, "n_resamples": resamples, "method": "percentile", "batch": 100}
    interval = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(seed), **options).confidence_interval
    return float(interval.low), float(interval.high)


def student_interval(values: Sequence[float]) -> Interval:
    """95 % interval of a mean of few values, such as one for each seed, by Student's t."""
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test: `only_a` questions are right in A only, `only_b` in B only."""
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def pass_at_k(count: int, correct: int, k: int) -> float:
    """Unbiased probability that one of k answers is right, from `correct` of `count` (Chen et al., arXiv:2107.03374).

    Raises:
        UserError: k is above `count`.
    """
    if not 1 <= k <= count:
        raise UserError(f"k is {k}, wanted 1 to {count}, the number of answers to each question")
    return 1 - math.comb(count - correct, k) / math.comb(count, k)


def majority_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right; among equally frequent ones the first counts (maj@k)."""
    stated = [answer for answer in answers if answer is not None]
    if not stated:
        return False
    winner, _ = Counter(stated).most_common(1)[0]  # keeps the order of first occurrence
    return correct[list(answers).index(winner)]


def aup(points: Sequence[tuple[float, float]], *, best: float | None = None, alpha: float = 3.0) -> float:
    """Accuracy under parallelism of d3LLM (arXiv:2601.07568): a weighted area under accuracy × tokens per forward.

    Points more than 5 percent points below the accuracy of the slowest are left out. An accuracy y is weighted with
    min(exp(−alpha (1 − y / best)), 1).

    Args:
        points: pairs of tokens per forward and accuracy in [0, 1].
        best: the highest accuracy of all methods that are compared. Default: that of the points.
    """
    curve = sorted(points)
    best = max(accuracy for _, accuracy in curve) if best is None else best
    kept = [(speed, 100 * accuracy) for speed, accuracy in curve if accuracy >= curve[0][1] - 0.05]
    if best == 0:
        return 0.0
    weighted = [(speed, y * min(math.exp(-alpha * (1 - y / (100 * best))), 1)) for speed, y in kept]
    area = kept[0][0] * kept[0][1]  # the first rectangle is not weighted
    return area + sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(weighted))
