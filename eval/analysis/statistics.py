"""Confidence intervals of pass@k and of differences, tests of pairs, corrections for several comparisons.

Every function takes one number for each task: the share of its samples that pass, or its estimate of pass@k,
0.0 to 1.0. The tasks are treated as drawn from all tasks that could have been asked, independently of each
other; nothing here can make up for tasks that a model has seen in training. All of it is deterministic: what
resamples has a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RESAMPLES = 10_000
SEED = 0


def interval(successes_per_task: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Compute a confidence interval of the mean over tasks: (low, high), within 0.0 and 1.0.

    Where every task either passes or fails (greedy decoding, one sample a task), Wilson's score interval: its
    coverage is close to `confidence` on average for small sets and for figures near 0 and 1, where the
    textbook interval (mean plus or minus two standard errors) covers too little and Clopper and Pearson's,
    which never covers less than `confidence`, is wider than need be (Brown, Cai and DasGupta, Statistical
    Science 16, 2001).

    With shares in between (several samples a task), the percentile bootstrap over tasks: samples of one task
    are not independent of each other, so tasks are what is resampled. Where all tasks have the same share in
    between, there is nothing to resample; then, see `_interval_of_equals`.

    Raises:
        ValueError: no task, or a number that is not within 0.0 and 1.0.
    """
    values = _values(successes_per_task)
    if np.isin(values, (0.0, 1.0)).all():
        from scipy.stats import binomtest

        wilson = binomtest(int(values.sum()), len(values)).proportion_ci(confidence, method="wilson")
        return float(wilson.low), float(wilson.high)
    return _bootstrap(values, confidence, lowest=0.0, highest=1.0)


def difference_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
    """Compute an interval of mean(first) - mean(second) over the same tasks: (low, high), within -1 and 1.

    The percentile bootstrap over tasks: a task is drawn with both its results, so that what makes a task easy
    or hard for both cancels out. Where all tasks show the same difference (often none at all), see
    `_interval_of_equals`.

    Raises:
        ValueError: as `interval`, or not as many of one as of the other.
    """
    return _bootstrap(_differences(first, second), confidence, lowest=-1.0, highest=1.0)


@dataclass(frozen=True)
class PairedTest:
    """Two strategies on the same tasks.

    Attributes:
        first_better: tasks on which the first does better; with one sample a task, that it alone solves.
        second_better: the same for the second.
        p_value: two-sided; the probability of a difference of sums at least as large if, on every task,
            either had been as likely to be the better one. 1.0 where they differ on no task.
        method: "mcnemar" or "sign_flip".
    """

    first_better: int
    second_better: int
    p_value: float
    method: str


def paired_test(first: Sequence[float], second: Sequence[float], n_samples: int = 1) -> PairedTest:
    """Test whether two strategies differ on the same tasks, each with `n_samples` samples a task.

    With one sample, McNemar's test in its exact form: of the tasks that only one of the two solves, as many
    are expected on either side (a binomial test with probability 1/2). With several, its generalisation: a
    sign-flip permutation test of the differences, in which every task's difference keeps its size and is as
    likely to be positive as negative. All 2^tasks signs are counted, not drawn, so that this one is exact,
    too, and equals McNemar's for one sample.

    Raises:
        ValueError: as `difference_interval`, or a share that `n_samples` samples cannot give.
    """
    differences = _differences(first, second) * n_samples
    counts = np.rint(differences).astype(int)
    if not np.allclose(differences, counts, rtol=0, atol=1e-6):
        raise ValueError(f"shares that {n_samples} samples a task cannot give")
    better, worse = int((counts > 0).sum()), int((counts < 0).sum())
    if n_samples > 1:
        return PairedTest(better, worse, _sign_flip_p_value(counts), "sign_flip")
    if better + worse == 0:
        return PairedTest(0, 0, 1.0, "mcnemar")
    from scipy.stats import binomtest

    return PairedTest(better, worse, float(binomtest(better, better + worse).pvalue), "mcnemar")


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down method, so that each may be compared with one level.

    The chance of one or more false findings among all of them is then at most that level, however the tests
    depend on each other (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _values(shares: Sequence[float]) -> np.ndarray:
    values = np.asarray(shares, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError("no task, so nothing to take a mean of")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError("a share of passing samples is not within 0 and 1")
    return values


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} tasks cannot be paired with {len(second)}")
    return _values(first) - _values(second)


def _bootstrap(
    values: np.ndarray, confidence: float, *, lowest: float, highest: float
) -> tuple[float, float]:
    """Compute the percentile bootstrap's interval of the mean."""
    if (values == values[0]).all():
        return _interval_of_equals(float(values[0]), len(values), confidence, lowest=lowest, highest=highest)
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=1000,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _interval_of_equals(
    value: float, count: int, confidence: float, *, lowest: float, highest: float
) -> tuple[float, float]:
    """Compute an interval where all tasks have one `value`, so that the bootstrap's would have no width.

    Tasks that are otherwise may still exist, but `count` in a row were not: their share is at most what
    Clopper and Pearson's interval says of 0 in `count` (2.2 % for 164 tasks). At worst those all have the
    `lowest` or `highest` possible value.
    """
    from scipy.stats import binomtest

    others = float(binomtest(0, count).proportion_ci(confidence, method="exact").high)
    return value + others * (lowest - value), value + others * (highest - value)


def _sign_flip_p_value(counts: np.ndarray) -> float:
    """Compute the probability, over all signs, of a sum at least as far from 0 as that of `counts`."""
    # distribution[i]: probability that the signed sum of the tasks so far is i - (sum of their sizes)
    distribution = np.ones(1)
    for size in np.abs(counts[counts != 0]):
        longer = np.zeros(len(distribution) + 2 * size)
        longer[: len(distribution)] += distribution / 2
        longer[2 * size :] += distribution / 2
        distribution = longer
    tail = distribution[len(distribution) // 2 + abs(int(counts.sum())) :].sum()
    return min(1.0, 2.0 * float(tail))
