"""The fewest parameters within an error budget, against exhaustive search."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.nets._rank_allocation import allocate_ranks


def random_curve(source, terms, convex):
    steps = [source.random() for _ in range(terms)]
    steps = sorted(steps, reverse=True) if convex else steps
    total = sum(steps)
    return [sum(steps[k:]) / total if k < terms else 0.0 for k in range(terms + 1)]


def exhaustive(curves, costs, budget):
    """Parameters of the best choice."""
    choices = itertools.product(*(range(1, len(curve)) for curve in curves))
    fits = (c for c in choices if math.fsum(curve[r] for curve, r in zip(curves, c, strict=True)) <= budget)
    return min(sum(cost * rank for cost, rank in zip(costs, choice, strict=True)) for choice in fits)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.floats(0, 2), st.booleans())
def test_the_budget_holds_and_hardly_a_parameter_is_wasted(seed, budget, convex):
    source = random.Random(seed)
    curves = [random_curve(source, source.randint(1, 7), convex) for _ in range(3)]
    costs = [source.randint(1, 9) for _ in range(3)]
    ranks = allocate_ranks(curves, costs, budget)
    assert all(1 <= rank < len(curve) for rank, curve in zip(ranks, curves, strict=True))
    assert math.fsum(curve[rank] for curve, rank in zip(curves, ranks, strict=True)) <= budget
    best = exhaustive(curves, costs, budget)
    used = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    # The rule loses less than one segment of a hull. Along convex curves that is a term, else at most all but one.
    segments = [cost * (1 if convex else len(curve) - 2) for cost, curve in zip(costs, curves, strict=True)]
    assert best <= used <= best + max(0, *(segment - 1 for segment in segments))


def test_terms_go_where_a_parameter_less_costs_the_least():
    steep, flat = [1.0, 0.5, 0.1, 0.0], [1.0, 0.02, 0.01, 0.0]
    assert allocate_ranks([steep, flat], [1, 1], 0.05) == [3, 1]
    assert allocate_ranks([steep, flat], [100, 1], 0.1) == [2, 3]


def test_what_costs_nothing_goes_first_and_something_is_always_left():
    assert allocate_ranks([[1.0, 0.2, 0.0, 0.0, 0.0], [1.0, 0.0]], [3, 2], 0.0) == [2, 1]
    assert allocate_ranks([[1.0, 0.9, 0.0]], [3], 5.0) == [1]


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.99, 3.0])
def test_a_budget_is_used_up_as_far_as_whole_terms_go(budget):
    curves = [random_curve(random.Random(seed), 12, convex=False) for seed in range(4)]
    ranks = allocate_ranks(curves, [5, 1, 2, 3], budget)
    spent = math.fsum(curve[rank] for curve, rank in zip(curves, ranks, strict=True))
    for curve, rank in zip(curves, ranks, strict=True):
        assert rank == 1 or spent - curve[rank] + curve[rank - 1] > budget
