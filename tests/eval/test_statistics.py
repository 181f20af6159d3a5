"""Intervals, paired tests and Holm's correction: hand-computed values, scipy's own, exact and simulated
coverage."""

import itertools
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm, permutation_test

from dylora_moe.eval.analysis.statistics import difference_interval, holm, interval, paired_test


passes = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)


def wilson(successes, count, z=1.959963984540054):
    """The formula of the textbook."""
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (3, 10), (82, 164), (164, 164), (1, 1)])
def test_passes_and_failures_get_wilsons_interval(successes, count):
    values = [1.0] * successes + [0.0] * (count - successes)
    assert interval(values) == pytest.approx(wilson(successes, count), abs=1e-12)


@pytest.mark.parametrize("count", [24, 164])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_wilsons_interval_covers_the_true_share_in_95_of_100_sets(count, share):
    numbers = np.arange(count + 1)
    held = []
    for successes in numbers:
        low, high = interval([1.0] * successes + [0.0] * (count - successes))
        held.append(low <= share <= high)
    assert 0.93 <= (binom.pmf(numbers, count, share) * held).sum() <= 0.98


@given(passes)
def test_the_interval_holds_the_mean_and_stays_within_0_and_1(values):
    low, high = interval(values)
    assert 0.0 <= low <= np.mean(values) + 1e-12 and np.mean(values) - 1e-12 <= high <= 1.0
    assert low < high


def test_a_higher_confidence_is_a_wider_interval():
    values = [1.0, 0.0, 0.0, 0.5, 1.0, 0.25]
    narrow, wide = interval(values, 0.8), interval(values, 0.99)
    assert wide[0] < narrow[0] < np.mean(values) < narrow[1] < wide[1]


def test_shares_get_the_bootstrap_over_tasks_and_always_the_same_one():
    """Against the normal approximation, which is good in the middle with 400 tasks, and a plain
    resampling."""
    values = np.random.default_rng(3).integers(0, 11, size=400) / 10
    low, high = interval(values)
    assert (low, high) == interval(values)
    half = 1.96 * values.std() / sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.002)
    generator = np.random.default_rng(4)
    means = [values[generator.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.003)


def test_samples_of_one_task_do_not_count_as_tasks():
    """100 samples of each of 4 tasks, two always right: still 4 tasks, not 400."""
    low, high = interval([1.0, 1.0, 0.0, 0.01])
    assert high - low > 0.7


def test_equal_shares_do_not_give_an_interval_without_width():
    """No other share in 20 tasks: others are at most 1 - 0.025^(1/20) of all tasks."""
    others = 1 - 0.025 ** (1 / 20)
    assert interval([0.5] * 20) == pytest.approx((0.5 - 0.5 * others, 0.5 + 0.5 * others))
    assert interval([0.5]) == pytest.approx((0.0125, 0.9875))
    assert difference_interval([1.0] * 20, [1.0] * 20) == pytest.approx((-others, others))
    assert difference_interval([1.0] * 20, [0.0] * 20) == pytest.approx((1 - 2 * others, 1.0))


@pytest.mark.parametrize("values", [[], [0.5, 1.2], [-0.1], [float("nan")]])
def test_what_is_no_share_is_refused(values):
    with pytest.raises(ValueError):
        interval(values)
    with pytest.raises(ValueError):
        paired_test(values, values)


def test_unpaired_tasks_are_refused():
    for function in (difference_interval, paired_test):
        with pytest.raises(ValueError, match="2 tasks cannot be paired with 1"):
            function([1.0, 0.0], [1.0])


def paired(both, first_only, second_only, neither):
    first = [1.0] * (both + first_only) + [0.0] * (second_only + neither)
    second = [1.0] * both + [0.0] * first_only + [1.0] * second_only + [0.0] * neither
    return first, second


def test_mcnemar_by_hand():
    """8 tasks differ, 1 to 7: p = 2 (C(8,0) + C(8,1)) / 2^8 = 18/256."""
    found = paired_test(*paired(20, 7, 1, 5))
    assert (found.first_better, found.second_better, found.method) == (7, 1, "mcnemar")
    assert found.p_value == pytest.approx(18 / 256)
    assert paired_test(*paired(20, 0, 5, 5)).p_value == pytest.approx(2 / 32)
    assert paired_test(*paired(20, 3, 3, 5)).p_value == 1.0
    assert paired_test(*paired(20, 0, 0, 5)).p_value == 1.0


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
def test_mcnemar_is_a_sum_of_binomials_and_does_not_see_ties(first_only, second_only, ties):
    count, least = first_only + second_only, min(first_only, second_only)
    expected = min(1.0, 2 * sum(comb(count, k) for k in range(least + 1)) / 2**count)
    assert paired_test(*paired(ties, first_only, second_only, 1)).p_value == pytest.approx(expected)
    turned = paired_test(*reversed(paired(ties, first_only, second_only, 1)))
    assert (turned.first_better, turned.second_better) == (second_only, first_only)
    assert turned.p_value == pytest.approx(expected)


@given(passes, st.data())
def test_with_one_sample_the_sign_flip_test_is_mcnemars(first, data):
    second = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(first), max_size=len(first)))
    once, twice = paired_test(first, second), paired_test(first, second, n_samples=2)
    assert twice.method == "sign_flip"
    assert twice.p_value == pytest.approx(once.p_value)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_sign_flip_test_counts_every_assignment_of_signs(counts):
    first, second = np.array(counts).T / 5
    differences = [int(a) - int(b) for a, b in counts]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product([1, -1], repeat=len(counts))
    ]
    expected = np.mean([abs(total) >= abs(sum(differences)) for total in sums])
    assert paired_test(first, second, n_samples=5).p_value == pytest.approx(expected)


def test_the_sign_flip_test_is_scipys_permutation_test():
    generator = np.random.default_rng(5)
    first, second = generator.integers(0, 11, 12) / 10, generator.integers(0, 9, 12) / 10
    exact = permutation_test(
        (first, second), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_test(first, second, n_samples=10).p_value == pytest.approx(exact.pvalue, abs=1e-9)


def test_many_samples_of_many_tasks():
    """378 tasks of 200 samples: no overflow, and about the normal approximation's p."""
    generator = np.random.default_rng(6)
    first, second = generator.integers(0, 201, 378), generator.integers(0, 201, 378)
    z = abs((first - second).sum()) / sqrt(((first - second) ** 2).sum())
    expected = 2 * (1 - float(norm.cdf(z)))
    assert paired_test(first / 200, second / 200, n_samples=200).p_value == pytest.approx(expected, abs=0.002)


def test_shares_of_another_number_of_samples_are_refused():
    with pytest.raises(ValueError, match="1 samples a task cannot give"):
        paired_test([0.5, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="3 samples a task cannot give"):
        paired_test([0.5, 1.0], [0.0, 1.0], n_samples=3)


def test_mcnemar_rejects_no_more_often_than_it_says():
    """Two equally good strategies, by simulation: at most 5 in 100 below 0.05."""
    generator = np.random.default_rng(7)
    rejected = 0
    for _ in range(1000):
        first, second = (generator.random((2, 100)) < generator.random(100)).astype(float)
        rejected += paired_test(first, second).p_value < 0.05
    assert rejected <= 50


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_keeps_the_order_and_lies_between_nothing_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= min(1.0, len(p_values) * p)
    order = np.argsort(p_values, kind="stable")
    assert list(np.array(adjusted)[order]) == sorted(adjusted)
    for level in (0.01, 0.05, 0.3):
        assert {i for i, p in enumerate(adjusted) if p <= level} == stepping_down(p_values, level)


def stepping_down(p_values, level):
    """Holm's own words: reject the smallest if it is at most level / m, go on with level / (m - 1), and so
    on."""
    rejected, count = set(), len(p_values)
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        if p_values[index] * (count - rank) > level:
            break
        rejected.add(index)
    return rejected


def test_the_interval_of_a_difference_is_paired():
    """Tasks that both solve or both fail say nothing of the difference: 10 and 2 of 164 differ, 8/164 on
    average."""
    first, second = paired(100, 10, 2, 52)
    low, high = difference_interval(first, second)
    assert low < 8 / 164 < high
    half = 1.96 * sqrt((12 - 8**2 / 164) / 164**2)
    assert (low, high) == pytest.approx((8 / 164 - half, 8 / 164 + half), abs=0.007)
    assert high - low < 0.6 * sum(interval(values)[1] - interval(values)[0] for values in (first, second)) / 2
    turned = difference_interval(second, first)
    assert turned == pytest.approx((-high, -low), abs=0.007)


def test_the_interval_of_a_difference_covers_the_true_one():
    """100 tasks, half of the chance of success shared between the two; true difference 0.15; 95 % within 90.5
    and 99."""
    generator = np.random.default_rng(8)
    held = 0
    for _ in range(200):
        hardness, own, shared = generator.random(100), generator.random((2, 100)), generator.random(100) < 0.5
        first, second = np.where(shared, hardness, own) < np.array([[0.6], [0.45]])
        low, high = difference_interval(first.astype(float), second.astype(float))
        held += low <= 0.15 <= high
    assert 181 <= held <= 198
