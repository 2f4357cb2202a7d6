"""Comparisons seed by seed: Student's test and interval, Holm's correction, and words."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as students_t
from scipy.stats import ttest_rel

from retract.benchmarks.paired_statistics import Comparison, compare, holm, mean_and_error, paired_difference


def test_adjusted_p_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_adjusted_p_values_reject_what_the_step_down_procedure_rejects(values, level):
    """Smallest first, each compared with level / (how many are left), until one is not rejected."""
    rejected = set()
    for left, index in zip(range(len(values), 0, -1), np.argsort(values, kind="stable"), strict=True):
        if values[index] * left >= level:
            break
        rejected.add(int(index))
    assert {index for index, p in enumerate(holm(values)) if p < level} == rejected


def test_a_comparison_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.4, 1, 7), rng.normal(0, 1, 7)
    found = compare({"one": (dict(enumerate(ours)), dict(enumerate(theirs)))})["one"]
    expected = ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference - found.half_width == pytest.approx(interval.low)
    assert found.difference + found.half_width == pytest.approx(interval.high)


def test_comparisons_are_of_common_seeds_and_corrected_together():
    a, b = {0: 1.0, 1: 1.2, 2: 0.9, 7: 50.0}, {0: 2.0, 1: 2.3, 2: 1.8, 8: -50.0}
    alone = compare({"a": (a, b)})["a"]
    assert alone.difference == pytest.approx(-1)
    both = compare({"a": (a, b), "b": ({0: 1.0, 1: 3.0}, {0: 2.0, 1: 1.0}), "c": ({0: 1.0}, {0: 2.0})})
    assert list(both) == ["a", "b"]
    assert both["a"].p == pytest.approx(2 * alone.p)


def test_differences_without_spread_are_no_evidence():
    found = compare({"equal": ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}), "shifted": ({0: 0.1, 1: 0.4}, {0: 0.3, 1: 0.6})})
    assert [one.p for one in found.values()] == [1.0, 1.0]
    assert [one.worded(higher_is_better=True) for one in found.values()] == ["ties", "ties"]


def test_words():
    down, up, unsure = Comparison(-1, 0.5, 0.01), Comparison(1, 0.5, 0.04), Comparison(-1, 2, 0.05)
    assert [one.worded(higher_is_better=False) for one in (down, up, unsure)] == ["helps", "hurts", "ties"]
    assert [one.worded(higher_is_better=True) for one in (down, up, unsure)] == ["hurts", "helps", "ties"]


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == pytest.approx((3.0, np.std([1, 2, 3, 6], ddof=1) / 2))
    assert math.isnan(mean_and_error([1.0])[1])


def test_paired_difference():
    """Student's interval of the differences, by its formula."""
    a, b = {0: 99.1, 1: 99.3, 2: 99.0, 7: 5.0}, {2: 99.1, 0: 98.9, 1: 99.2}
    differences = [a[seed] - b[seed] for seed in range(3)]
    half = students_t.ppf(0.975, 2) * statistics.stdev(differences) / math.sqrt(3)
    mean = statistics.mean(differences)
    assert paired_difference(a, b) == pytest.approx((mean, mean - half, mean + half), rel=1e-12)
    assert paired_difference({0: 1.0}, {0: 2.0}) is None
