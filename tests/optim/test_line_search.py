import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retract.optim.line_search import SearchResult, armijo

positive = st.floats(1e-3, 1e3)


def obeys(phi: Callable[[float], float], slope: float, result: SearchResult, c1: float = 1e-4) -> bool:
    return result.value == phi(result.step) <= phi(0.0) + c1 * result.step * slope


@given(curvature=positive, steepness=positive, first_step=st.floats(1e-6, 1e6), contraction=st.floats(0.1, 0.9))
def test_quadratic_steps_obey_armijo_and_no_earlier_trial_does(curvature, steepness, first_step, contraction):
    def phi(t: float) -> float:
        return curvature * t * t / 2 - steepness * t

    c1 = 0.3
    result = armijo(
        phi, 0.0, -steepness, first_step, sufficient_decrease=c1, contraction=contraction, max_evaluations=500
    )
    assert result.success
    assert obeys(phi, -steepness, result, c1)
    trials = [first_step]
    for _ in range(result.evaluations - 1):
        trials.append(trials[-1] * contraction)
    assert trials[-1] == result.step
    assert all(phi(t) > -c1 * t * steepness for t in trials[:-1])
    # On a quadratic the condition is t <= 2 (1 - c1) steepness / curvature.
    assert result.step <= 2 * (1 - c1) * steepness / curvature * (1 + 1e-9)


def test_a_step_that_decreases_too_little_is_not_enough():
    # phi(1.9) = -0.095 is below phi(0), but not by half of what the slope promises there; phi(0.95) is.
    result = armijo(lambda t: t * t / 2 - t, 0.0, -1.0, 1.9, sufficient_decrease=0.5)
    assert (result.step, result.evaluations) == (0.95, 2)


def test_first_step_is_taken_if_it_serves():
    assert armijo(lambda t: -t, 0.0, -1.0, 0.125) == (0.125, -0.125, 1, True)


def test_nonconvex_function_may_be_accepted_beyond_a_hill():
    def phi(t: float) -> float:
        return math.cos(3 * t) - 0.1 * t

    result = armijo(phi, 1.0, -0.1, 8.0)
    assert result.success
    assert obeys(phi, -0.1, result)


def test_last_evaluation_is_at_the_accepted_step():
    seen = []

    def phi(t: float) -> float:
        seen.append(t)
        return t * t - t

    result = armijo(phi, 0.0, -1.0, 100.0)
    assert result.success
    assert (seen[-1], len(seen)) == (result.step, result.evaluations)


@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_no_decrease(outside):
    result = armijo(lambda t: outside if t > 0.3 else -t, 0.0, -1.0)
    assert result == (0.25, -0.25, 3, True)


@pytest.mark.parametrize("phi", [lambda t: 1.0, lambda t: 1.0 + t, lambda t: math.nan], ids=["flat", "up", "nan"])
def test_without_decrease_it_gives_up(phi):
    assert armijo(phi, 1.0, -1e-20, max_evaluations=7) == (0.0, 1.0, 7, False)


@pytest.mark.parametrize(
    ("value", "slope"), [(0.0, 0.0), (0.0, 1.0), (0.0, math.nan), (math.nan, -1.0), (math.inf, -1.0)]
)
def test_no_descent_direction_evaluates_nothing(value, slope):
    def phi(t: float) -> float:
        raise AssertionError("evaluated")

    result = armijo(phi, value, slope)
    assert (result.step, result.evaluations, result.success) == (0.0, 0, False)


@pytest.mark.parametrize(
    "option",
    [
        {"sufficient_decrease": 0.0},
        {"sufficient_decrease": math.nan},
        {"contraction": 1.0},
        {"contraction": -0.5},
        {"max_evaluations": 0},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        armijo(lambda t: -t, 0.0, -1.0, **option)
