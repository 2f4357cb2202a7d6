"""One budget of squared error for several layers: the ranks with which the fewest parameters remain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["allocate_ranks"]

Curve = Sequence[float]


def allocate_ranks(curves: Sequence[Curve], costs: Sequence[int], budget: float) -> list[int]:
    """Ranks, one a layer, whose squared errors sum to at most a budget.

    Terms are taken from where a parameter less costs the least squared error: along the lower convex hulls of the
    curves, which is the Lagrangian rule, optimal but for less than one segment of a hull. What is then left of the
    budget goes to the layer in which it frees the most parameters, and so on.

    Args:
        curves: for each layer the squared errors with 0, 1, ..., R terms, never increasing, the last one zero.
        costs: parameters of a term, for each layer.
        budget: what the squared errors may sum to, not negative.

    Returns:
        Ranks, each 1 at least.
    """
    ranks = [len(curve) - 1 for curve in curves]

    def fits(layer: int, rank: int) -> bool:
        changed = [*ranks[:layer], rank, *ranks[layer + 1 :]]
        return math.fsum(curve[r] for curve, r in zip(curves, changed, strict=True)) <= budget

    def least(layer: int) -> int:
        rank = ranks[layer]
        while rank > 1 and fits(layer, rank - 1):
            rank -= 1
        return rank

    segments = [
        (slope / cost, layer, rank)
        for layer, (curve, cost) in enumerate(zip(curves, costs, strict=True))
        for slope, rank in _segments(curve)
    ]
    for _, layer, rank in sorted(segments, key=lambda segment: (segment[0], -segment[2])):
        if fits(layer, rank):
            ranks[layer] = rank
    for _ in curves:
        freed, layer, rank = max((costs[i] * (ranks[i] - least(i)), i, least(i)) for i in range(len(ranks)))
        if not freed:
            break
        ranks[layer] = rank
    return ranks


def _segments(curve: Curve) -> list[tuple[float, int]]:
    """Lower convex hull from all terms down to one: what a term less costs along a segment, and where that ends."""
    hull = [len(curve) - 1]
    for rank in range(len(curve) - 2, 0, -1):
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-1], rank):
            hull.pop()
        hull.append(rank)
    return [(_slope(curve, start, end), end) for start, end in pairwise(hull)]


def _slope(curve: Curve, start: int, end: int) -> float:
    return (curve[end] - curve[start]) / (start - end)
