"""The order of an error: the slope of log(error) over log(t), fitted where it is cleanest, and its plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["fit_slope", "plot_slope", "slope_of"]

STEPS: tuple[float, ...] = tuple(float(t) for t in np.logspace(-6, 0, 31))
_WINDOW = 8  # points: 1.4 decades


def slope_of(error: Callable[[float], float], *, noise: float, plot: Any = None, expected: float = 1.0) -> float:
    """Slope of ``error(t)`` for ``t`` from 1e-6 to 1; infinite where every error is below ``noise``.

    Args:
        error: the error of a step of length ``t``.
        noise: rounding level of the errors; what is below 100 times it is left out.
        plot: axes of matplotlib, or True for new ones.
        expected: the slope of the line drawn for comparison.
    """
    errors = [error(t) for t in STEPS]
    if plot is not None and plot is not False:
        plot_slope(errors, expected, plot)
    return fit_slope(STEPS, errors, noise=noise)


def fit_slope(steps: tuple[float, ...], errors: list[float], *, noise: float) -> float:
    """Slope on the run of points above the noise that lies closest to a line; NaN if one is not finite."""
    if not all(math.isfinite(e) for e in errors):
        return math.nan
    above = [(math.log(t), math.log(e)) for t, e in zip(steps, errors, strict=True) if e > 100 * noise]
    if len(above) < 3:
        return math.inf
    window = min(_WINDOW, len(above))
    fits = [_line(above[i : i + window]) for i in range(len(above) - window + 1)]
    return min(fits)[1]


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(residual, slope) of the least-squares line."""
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.linalg.norm(y - slope * x - intercept)), float(slope)


def plot_slope(errors: list[float], expected: float, axes: Any) -> None:
    """Draw the errors and a line of the expected slope on ``axes``, or on new ones (True)."""
    if axes is True:
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1]
    axes.loglog(STEPS, errors, marker=".", label="error")
    axes.loglog(STEPS, [errors[-1] * t**expected for t in STEPS], linestyle="--", label=f"slope {expected:g}")
    axes.set_xlabel("step t")
    axes.legend()
