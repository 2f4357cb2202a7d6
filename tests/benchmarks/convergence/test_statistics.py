"""Medians with intervals, paired tests with effect sizes, and sentences that do not claim what was not seen."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import ttest_rel, wilcoxon

from retract.benchmarks.convergence.statistics import PairedTest, compare_pairs, median_interval, wilcoxon_floor


def by_seed(values):
    return dict(enumerate(values))


def exact_median_interval(values):
    """Ends of the bootstrap distribution of the median, of all n^n resamples."""
    medians = np.sort([np.median(resample) for resample in product(values, repeat=len(values))])
    return np.quantile(medians, [0.025, 0.975], method="inverted_cdf")


# --------------------------------------------------------------------------------------------------------- medians


def test_the_interval_of_a_median_is_that_of_all_resamples():
    values = [3.0, 1.0, 4.5, 1.5, 9.0]
    found = median_interval(values)
    low, high = exact_median_interval(values)
    assert (found.median, found.low, found.high, found.count) == (3.0, low, high, 5)
    assert (low, high) == (1.0, 9.0)


def test_an_end_between_two_values_is_the_outer_one():
    """Of six values, the ends lie between the first two and between the last two."""
    low, high = exact_median_interval(range(6))
    assert (low, high) == (0.5, 4.5)
    found = median_interval([10.0, 11.0, 12.0, 13.0, 14.0, math.inf])
    assert (found.median, found.low, found.high) == (12.5, 10.0, math.inf)


def test_the_interval_covers_the_median_as_often_as_it_says():
    """15 values of a skewed distribution: the interval of order statistics covers 94 to 99 %."""
    rng = np.random.default_rng(3)
    samples = rng.exponential(size=(100, 15))
    found = [median_interval(list(sample)) for sample in samples]
    covered = np.mean([one.low <= math.log(2) <= one.high for one in found])
    assert 0.91 <= covered <= 0.995
    assert np.mean([one.high - one.low for one in found]) < 1.5


def test_runs_that_did_not_get_there_count_as_infinite():
    found = median_interval([2.0, math.inf, 1.0, 3.0, math.inf])
    assert (found.median, found.low, found.high) == (3.0, 1.0, math.inf)
    assert median_interval([1.0, math.inf, math.inf]).median == math.inf


def test_a_median_is_the_same_at_every_call_and_in_every_order():
    values = list(np.random.default_rng(0).normal(size=20))
    assert median_interval(values) == median_interval(values[::-1])


def test_a_single_value_has_no_interval():
    found = median_interval([2.0])
    assert (found.median, found.count) == (2.0, 1) and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_no_median_of_nothing(values):
    with pytest.raises(ValueError, match="values must be one or more numbers"):
        median_interval(values)


# ----------------------------------------------------------------------------------------------------------- tests


def test_a_paired_test_is_scipys():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.5, 1, 9), rng.normal(0, 1, 9)
    found = compare_pairs({"pair": (by_seed(ours), by_seed(theirs))})["pair"]
    student, ranks = ttest_rel(ours, theirs), wilcoxon(ours, theirs)
    interval = student.confidence_interval(0.95)
    assert (found.p, found.wilcoxon_p) == pytest.approx((student.pvalue, ranks.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.seeds, found.left_out) == (9, 0)


def test_effect_sizes():
    """Differences -1, 2, 3, 4: mean 2, variance 14/3; ranks 1 against 2 + 3 + 4."""
    found = compare_pairs({0: (by_seed([0.0, 3.0, 4.0, 6.0]), by_seed([1.0, 1.0, 1.0, 2.0]))})[0]
    assert found.difference == pytest.approx(2)
    assert found.cohens_d == pytest.approx(2 / math.sqrt(14 / 3))
    assert found.rank_biserial == pytest.approx((9 - 1) / 10)


def test_each_test_is_corrected_for_all_pairs():
    rng = np.random.default_rng(2)
    theirs = by_seed(rng.normal(size=8))
    family = {name: (by_seed(rng.normal(shift, 0.3, 8)), theirs) for name, shift in (("a", 2.0), ("b", 0.1), ("c", 1))}
    alone = {name: compare_pairs({name: pair})[name] for name, pair in family.items()}
    together = compare_pairs(family)
    for kind in ("p", "wilcoxon_p"):
        single = {name: getattr(found, kind) for name, found in alone.items()}
        smallest = min(single, key=single.__getitem__)
        assert getattr(together[smallest], kind) == pytest.approx(3 * single[smallest])
        assert all(getattr(together[name], kind) >= p for name, p in single.items())
        assert max(getattr(found, kind) for found in together.values()) <= 1


def test_infinite_results_count_for_ranks_alone():
    ours, theirs = by_seed([1.0, 2.0, 3.0, 5.0, math.inf]), by_seed([2.0, 4.0, 6.0, math.inf, math.inf])
    found = compare_pairs({0: (ours, theirs)})[0]
    assert (found.difference, found.seeds, found.left_out) == (pytest.approx(-2), 3, 2)
    assert found.rank_biserial == -1
    assert found.wilcoxon_p == pytest.approx(wilcoxon_floor(4))
    assert "2 more left out" in found.worded("a", "b", higher_is_better=False)


def test_pairs_with_fewer_than_two_finite_differences_are_left_out():
    family = {"one": ({0: 1.0, 1: 2.0}, {0: 1.0, 2: 3.0}), "none": ({0: 1.0, 1: 1.0}, {0: math.inf, 1: 2.0})}
    assert compare_pairs(family) == {}


def test_equal_results_are_no_evidence():
    found = compare_pairs({0: (by_seed([1.0, 2.0, 3.0]), by_seed([1.0, 2.0, 3.0]))})[0]
    assert (found.p, found.wilcoxon_p, found.cohens_d, found.rank_biserial) == (1.0, 1.0, 0.0, 0.0)
    shifted = compare_pairs({0: (by_seed([1.5, 2.5, 3.5]), by_seed([1.0, 2.0, 3.0]))})[0]
    assert shifted.cohens_d == math.inf and not shifted.seen


def test_a_result_that_is_no_number():
    with pytest.raises(ValueError, match=r"must not be NaN, got nan and 1\.0 for seed 3"):
        compare_pairs({0: ({3: math.nan, 4: 1.0}, {3: 1.0, 4: 2.0})})


def test_what_ranks_can_say_at_most():
    for seeds in (2, 5, 8):
        assert wilcoxon_floor(seeds) == pytest.approx(wilcoxon(np.arange(1.0, seeds + 1)).pvalue)
    assert wilcoxon_floor(5) > 0.05


# ----------------------------------------------------------------------------------------------------------- words


def test_words():
    found = PairedTest(-0.31, -0.5, -0.12, 0.004, 0.06, -2.0, -1.0, 5)
    words = found.worded("PSIAngular", "SGD", higher_is_better=False)
    assert words == "PSIAngular ahead of SGD by 0.31 ([-0.50, -0.12], p = 0.004, 5 seeds)"
    assert found.worded("PSISGD", "SGD", higher_is_better=True, digits=1, unit=" points") == (
        "PSISGD behind SGD by 0.3 points ([-0.5, -0.1] points, p = 0.004, 5 seeds)"
    )
    unsure = PairedTest(-0.31, -0.5, -0.12, 0.05, 0.06, -2.0, -1.0, 5)
    same = compare_pairs({"": ({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 3.0})})[""]
    assert (
        same.worded("a", "b", higher_is_better=True, digits=0) == "a and b differ by +1 at each of 3 seeds: not tested"
    )
    assert unsure.worded("PSISGD", "SGD", higher_is_better=True) == (
        "PSISGD and SGD: no difference seen (-0.31 [-0.50, -0.12], p = 0.05, 5 seeds)"
    )
