"""Fitted exponents: exact on power laws, and intervals that cover as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress
from scipy.stats import t as students_t

from retract.benchmarks.convergence.rates import RateFit, fit_line, fit_rate

STEPS = np.unique(np.geomspace(1, 3000, 70).round())


def power_law(exponent, factor=1.0, noise=(), steps=STEPS):
    values = factor * steps**exponent
    return list(zip(steps, values * np.exp(noise) if len(noise) else values, strict=True))


def autoregressive(rng, points, memory):
    noise = [rng.normal()]
    for _ in range(points - 1):
        noise.append(memory * noise[-1] + math.sqrt(1 - memory**2) * rng.normal())
    return np.array(noise)


@given(st.floats(-3, 1), st.floats(1e-6, 1e6))
def test_a_power_law_is_found(exponent, factor):
    found = fit_rate({0: power_law(exponent, factor), 1: power_law(exponent, factor)}, theory=-1)
    assert found.exponent == pytest.approx(exponent, abs=1e-10)
    assert found.factor == pytest.approx(factor)
    assert found.value(100) == pytest.approx(factor * 100**exponent)
    assert found.high - found.low < 1e-8


def test_a_line_is_the_least_squares_line():
    points = power_law(-1.2, 3.0, np.random.default_rng(0).normal(size=len(STEPS)))
    found = fit_line(points)
    expected = linregress(*np.log(np.array(points)).T)
    assert (found.exponent, found.intercept) == pytest.approx((expected.slope, expected.intercept))


def test_the_error_of_a_line_by_the_definition():
    """Double sum over pairs of points, weighted by their distance, of the influence of each on the slope."""
    points = power_law(-1.0, 1.0, np.random.default_rng(1).normal(size=len(STEPS)))
    x, y = np.log(np.array(points)).T
    line, n = linregress(x, y), len(points)
    influence = (x - x.mean()) / ((x - x.mean()) ** 2).sum() * (y - line.intercept - line.slope * x)
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    weights = np.clip(1 - distance / math.ceil(1.3 * math.sqrt(n)), 0, None)
    variance = influence @ weights @ influence * n / (n - 2)
    assert fit_line(points).error == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_the_error_allows_for_noise_that_has_a_memory():
    """The interval of least squares covers half of the time, Newey and West's four times of five."""
    rng, usual, robust = np.random.default_rng(2), [], []
    steps = np.geomspace(10, 3000, 100)
    quantile = students_t.ppf(0.975, len(steps) - 2)
    for _ in range(400):
        points = power_law(-1.0, 1.0, 0.1 * autoregressive(rng, len(steps), 0.8), steps)
        line, ordinary = fit_line(points), linregress(*np.log(np.array(points)).T)
        usual.append(abs(ordinary.slope + 1) < quantile * ordinary.stderr)
        robust.append(abs(line.exponent + 1) < line.critical * line.error)
    assert np.mean(usual) < 0.55
    assert np.mean(robust) > 0.78


def test_intervals_over_seeds_cover_as_often_as_they_say():
    rng, covered = np.random.default_rng(3), []
    for _ in range(200):
        slopes = rng.normal(-0.5, 0.1, 5)
        found = fit_rate({seed: power_law(slope) for seed, slope in enumerate(slopes)}, theory=-0.5)
        covered.append(found.low <= -0.5 <= found.high)
    assert 0.9 <= np.mean(covered) <= 0.99


def test_the_interval_over_seeds_is_students():
    slopes = [-0.9, -1.1, -1.3]
    found = fit_rate({seed: power_law(slope) for seed, slope in enumerate(slopes)}, theory=-1)
    half = students_t.ppf(0.975, 2) * np.std(slopes, ddof=1) / math.sqrt(3)
    assert (found.exponent, found.low, found.high) == pytest.approx((-1.1, -1.1 - half, -1.1 + half))
    assert found.seeds == 3


def test_the_interval_of_a_single_seed_is_that_of_its_line():
    points = power_law(-1.0, 1.0, 0.1 * autoregressive(np.random.default_rng(4), len(STEPS), 0.5))
    found, line = fit_rate({7: points}, theory=-1, window=None), fit_line(points)
    half = line.critical * line.error
    assert (found.exponent, found.high) == pytest.approx((line.exponent, line.exponent + half))
    assert found.low == pytest.approx(line.exponent - half)


def test_only_the_end_of_a_curve_is_fitted():
    """Flat until 100, then 1/T^2."""
    curve = [(steps, min(1.0, (100 / steps) ** 2), 0.5) for steps in STEPS]
    late = fit_rate({0: curve}, theory=-1, window=20)
    assert late.exponent == pytest.approx(-2)
    assert late.window == (min(steps for steps in STEPS if steps >= 150), 3000)
    whole = fit_rate({0: curve}, theory=-1, window=None)
    assert -1.5 < whole.exponent < -0.5 and whole.window == (1, 3000)


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {0: []},
        {0: [(1, 1.0), (10, 0.1)]},
        {0: power_law(-1.0), 1: [*power_law(-1.0)[:-1], (3000, 0.0)]},
        {0: power_law(-1.0), 1: [*power_law(-1.0)[:-1], (3000, None)]},
        {0: [*power_law(-1.0)[:-1], (3000, math.inf)]},
    ],
)
def test_no_fit_of_what_is_no_power_law(curves):
    assert fit_rate(curves, theory=-1) is None


def test_critical_values():
    """Kiefer and Vogelsang's: the normal's when there are no lags, larger the more there are."""
    criticals = [fit_line(power_law(-1.0, steps=np.arange(1.0, count))).critical for count in (100_000, 200, 20)]
    assert criticals[0] == pytest.approx(1.96, abs=0.02)
    assert criticals[0] < criticals[1] < criticals[2] < 5


@pytest.mark.parametrize("points", [[(1, 1.0), (2, 1.0)], [(1, 1.0), (2, 0.0), (3, 1.0)], [(0, 1), (1, 1), (2, 1)]])
def test_a_line_needs_three_positive_points(points):
    with pytest.raises(ValueError, match="points must be three or more pairs of positive numbers"):
        fit_line(points)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-2.0, -1.1, "faster than T^-1"),
        (-2.0, -1.0, "no difference from T^-1 seen"),
        (-1.0, -0.5, "no difference from T^-1 seen"),
        (-0.9, -0.5, "slower than T^-1, so far"),
    ],
)
def test_words(low, high, words):
    assert RateFit((low + high) / 2, low, high, 1.0, -1.0, 5, (100, 3000)).worded() == words
