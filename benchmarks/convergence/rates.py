"""At which power of T something falls: straight lines through logarithms, with intervals, beside a theorem's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Line", "RateFit", "fit_line", "fit_rate"]

LEVEL = 0.95
WINDOW = 30.0  # the last part of a curve that is fitted: from its end over this to its end

Array = NDArray[np.float64]
Curve = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Line:
    """log value = intercept + exponent log T by least squares, the standard error of the exponent, and by how many of
    it the ends of the 95 % interval are away.
    """

    exponent: float
    intercept: float
    error: float
    critical: float


@dataclass(frozen=True)
class RateFit:
    """An exponent, the ends of its 95 % interval, and where it comes from.

    Attributes:
        exponent: mean over seeds.
        low, high: by Student's t over seeds; of a single seed, by its own regression, which is less sure (`fit_line`).
        factor: of the fitted power, the geometric mean over seeds.
        theory: the theorem's exponent.
        seeds: how many.
        window: least and largest T that were fitted.
    """

    exponent: float
    low: float
    high: float
    factor: float
    theory: float
    seeds: int
    window: tuple[float, float]

    def value(self, steps: float) -> float:
        """The fitted power at T."""
        return self.factor * math.pow(steps, self.exponent)

    def worded(self) -> str:
        """How the exponent stands to the theorem's, an upper bound with constants: it may be slower for a while."""
        if self.high < self.theory:
            return f"faster than T^{self.theory:g}"
        if self.low > self.theory:
            return f"slower than T^{self.theory:g}, so far"
        return f"no difference from T^{self.theory:g} seen"


def fit_rate(curves: Mapping[int, Curve], *, theory: float, window: float | None = WINDOW) -> RateFit | None:
    """Fit a power of T to positive values, for each seed on its own.

    Args:
        curves: by seed, points [T, value, ...]; what comes after these two is not looked at. Of a full-batch run, the
            least squared gradient norm of T iterations; of stochastic ones, a point for the run of each T.
        theory: the exponent to compare with: -1 for O(1/T), -0.5 for O(1/sqrt(T)).
        window: fit T from the largest over this; None for all. Early T tell of the start, not of a rate.

    Returns:
        None unless every curve has three points in its window, all positive: a zero or a missing value is no
        point of a power law.
    """
    lines, least, largest = [], math.inf, 0.0
    for curve in curves.values():
        points = [(float(point[0]), point[1]) for point in curve]
        end = max((steps for steps, _ in points), default=0.0)
        points = [(steps, value) for steps, value in points if window is None or steps * window >= end]
        if len(points) < 3 or not all(value is not None and 0 < value < math.inf for _, value in points):
            return None
        lines.append(fit_line(points))
        least, largest = min(least, *(steps for steps, _ in points)), max(largest, end)
    if not lines:
        return None
    exponents = [line.exponent for line in lines]
    mean = math.fsum(exponents) / len(lines)
    half = _half_width(lines)
    factor = math.exp(math.fsum(line.intercept for line in lines) / len(lines))
    return RateFit(mean, mean - half, mean + half, factor, theory, len(lines), (least, largest))


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Regress log value on log T.

    Values of a run depend on those before, so the error is Newey and West's (Econometrica 55, 1987), with as many lags
    as Lazarus et al. recommend (Journal of Business & Economic Statistics 36, 2018) and n / (n - 2) for the two fitted
    numbers; so many lags make it uncertain itself, which Kiefer and Vogelsang's critical values allow for
    (Econometric Theory 21, 2005, Table 1, Bartlett's kernel). Errors with a long memory are still underestimated: of 70
    points with correlation 0.8 from one to the next, the interval covers 80 %.

    Args:
        points: pairs of T and value, three or more, both positive, by T.

    Raises:
        ValueError: fewer points, or one that is not positive.
    """
    if len(points) < 3 or not all(0 < steps < math.inf and 0 < value < math.inf for steps, value in points):
        raise ValueError(f"points must be three or more pairs of positive numbers, got {list(points)}")
    x, y = np.log(np.array(points, dtype=np.float64)).T
    design = np.stack([np.ones_like(x), x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    intercept, exponent = inverse @ design.T @ y
    scores = design * (y - design @ np.array([intercept, exponent]))[:, None]
    count, bandwidth = len(points), math.ceil(1.3 * math.sqrt(len(points)))
    variance = inverse @ _long_run_variance(scores, bandwidth) @ inverse * count / (count - 2)
    b = bandwidth / count
    critical = 1.96 + 2.9694 * b + 0.416 * b**2 - 0.5324 * b**3
    return Line(float(exponent), float(intercept), math.sqrt(max(0.0, float(variance[1, 1]))), critical)


def _long_run_variance(scores: Array, bandwidth: int) -> Array:
    """Of the sum of scores (n, k): covariances at all lags, weighed down to none at ``bandwidth``."""
    total: Array = scores.T @ scores
    for lag in range(1, min(bandwidth, len(scores))):
        covariance = scores[lag:].T @ scores[:-lag]
        total = total + (1 - lag / bandwidth) * (covariance + covariance.T)
    return total


def _half_width(lines: Sequence[Line]) -> float:
    from scipy.stats import t as students_t

    if len(lines) == 1:
        return lines[0].critical * lines[0].error
    error = np.std([line.exponent for line in lines], ddof=1) / math.sqrt(len(lines))
    return float(students_t.ppf((1 + LEVEL) / 2, len(lines) - 1) * error)
