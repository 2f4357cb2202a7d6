"""Line searches along a curve, as functions of one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["SearchResult", "armijo", "check_armijo_options"]


class SearchResult(NamedTuple):
    """What a line search found.

    Attributes:
        step: accepted step; 0 if none was.
        value: the function there; at 0 if no step was accepted.
        evaluations: how often the function was evaluated.
        success: whether a step was accepted.
    """

    step: float
    value: float
    evaluations: int
    success: bool


def armijo(
    phi: Callable[[float], float],
    value: float,
    slope: float,
    first_step: float = 1.0,
    *,
    sufficient_decrease: float = 1e-4,
    contraction: float = 0.5,
    max_evaluations: int = 25,
) -> SearchResult:
    """Backtrack from ``first_step`` to a ``t`` with ``phi(t) <= phi(0) + sufficient_decrease * t * slope``.

    The value must also fall, strictly: where rounding hides the decrease the search fails rather than wander.
    A value that is NaN or infinite, of either sign, is no decrease. Without a descent direction (``slope``
    not negative) or a finite ``phi(0)`` the search fails before it evaluates anything. When it succeeds,
    ``phi`` was last evaluated at the accepted step.

    Args:
        phi: the function along the curve.
        value: ``phi(0)``.
        slope: the derivative of ``phi`` at 0.
        first_step: first trial.
        sufficient_decrease: c1, in (0, 1): which part of the decrease that ``slope`` promises must be found.
        contraction: factor from one trial to the next, in (0, 1).
        max_evaluations: number of trials before the search gives up.

    Raises:
        ValueError: an option out of range.

    Source: Nocedal, Wright, Numerical Optimization, 2006, Algorithm 3.1; on manifolds, Absil, Mahony,
    Sepulchre, 2008, Definition 4.2.2.
    """
    check_armijo_options(sufficient_decrease, contraction, max_evaluations)
    if not (slope < 0 and math.isfinite(value)):
        return SearchResult(0.0, value, 0, False)
    step = first_step
    for evaluations in range(1, max_evaluations + 1):
        trial = phi(step)
        if -math.inf < trial < value and trial <= value + sufficient_decrease * step * slope:
            return SearchResult(step, trial, evaluations, True)
        step *= contraction
    return SearchResult(0.0, value, max_evaluations, False)


def check_armijo_options(sufficient_decrease: float, contraction: float, max_evaluations: int) -> None:
    """Refuse options out of range."""
    for name, value in (("sufficient_decrease", sufficient_decrease), ("contraction", contraction)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}")
    if not max_evaluations >= 1:
        raise ValueError(f"max_evaluations must be at least 1, got {max_evaluations}")
