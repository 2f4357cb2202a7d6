"""The length of a low-rank unit, and its bias, that are best together for the function of the unit that it replaces.

A unit s(w·x + beta) is replaced by s(y·x + b) with y = c |w| z, where the unit vector z has cosine rho with w. For
x ~ N(0, I) the error is a function of c and b alone, in closed form. The best bias makes up for the mean of what the
row space leaves out: of a unit orthogonal to it, the constant E s(w·x + beta) remains.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from .rectified_moments import Array, joint_tail, leaky_product, normal_density

__all__ = ["CorrectedUnits", "corrected_units"]

_MOST_STEPS, _TOLERANCE = 200, 1e-10
_DAMPING, _LEAST_DAMPING, _LONGEST_STEP = 1e-9, 1e-60, 0.25
#: Of c: a unit that does not see its input is positive or not all the same.
_LEAST_LENGTH = 1e-8


class CorrectedUnits(NamedTuple):
    """For units of weights of norm 1: lengths c, biases b, and errors E (s(y·x + b) - s(w·x + beta))²."""

    length: Array
    bias: Array
    error: Array


def corrected_units(cosine: Array, offset: Array, *, length: Array, slope: float = 0.0) -> CorrectedUnits:
    """Minimise the errors over lengths c >= 0 and biases b, from two starts, all units at once.

    The first start is a given length with the offset as b; from there, a unit that is mostly off may end as one that is
    always off. The second is the regression of the unit on its input, which is optimal if that is always on.

    Args:
        cosine: rho in [0, 1], float64 of any shape.
        offset: beta / |w| of the same shape.
        length: c of the first start: the results are no worse.
        slope: of the leaky ReLU; 0 is ReLU. Below 0 the results are local optima.
    """
    passed = ndtr(offset)
    mean = slope * offset + (1 - slope) * (offset * passed + normal_density(offset))
    starts = ((length, offset), (cosine * (slope + (1 - slope) * passed), mean))
    first, second = (_descend(np.maximum(c, _LEAST_LENGTH), b, cosine, offset, slope) for c, b in starts)
    better = first.error <= second.error
    c, b, error = (np.where(better, one, other) for one, other in zip(first, second, strict=True))
    return CorrectedUnits(np.where(c > _LEAST_LENGTH, c, 0.0), b, error)


def _descend(c: Array, b: Array, rho: Array, beta: Array, slope: float) -> CorrectedUnits:
    """Gauss-Newton steps, none of which increases an error.

    A step is a regression of what is missing on the input and 1, where the unit passes them.
    """
    error = _errors(c, b, rho, beta, slope)
    for _ in range(_MOST_STEPS):
        step_c, step_b = _gauss_newton(c, b, rho, beta, slope)
        moved = np.zeros_like(error)
        for share in (1.0, 0.5, 0.1):
            next_c, next_b = np.maximum(c + share * step_c, _LEAST_LENGTH), b + share * step_b
            next_error = _errors(next_c, next_b, rho, beta, slope)
            better = (next_error < error) & (moved == 0)
            moved = np.where(better, np.abs(next_c - c) + np.abs(next_b - b), moved)
            c, b, error = (np.where(better, new, old) for new, old in ((next_c, c), (next_b, b), (next_error, error)))
        if not (moved > _TOLERANCE).any():
            break
    return CorrectedUnits(c, b, error)


def _errors(c: Array, b: Array, rho: Array, beta: Array, slope: float) -> Array:
    one = np.ones_like(c)
    squares = leaky_product((beta, beta), (one, one), one, slope) + leaky_product((b, b), (c, c), one, slope)
    result: Array = squares - 2 * leaky_product((beta, b), (one, c), rho, slope)
    return result


def _gauss_newton(c: Array, b: Array, rho: Array, beta: Array, slope: float) -> tuple[Array, Array]:
    """The step for c and b. The unit is s(c v + b), the one it replaces s(u + beta)."""
    k, passed = b / c, 1 - slope**2
    one, first, second = ndtr(k), normal_density(k), ndtr(k) - k * normal_density(k)  # of v^0, v, v² over v > -k
    # The matrix E s'² (v, 1)(v, 1)ᵀ and the products with the unit itself, then with the one it replaces.
    vv, v1, v0 = slope**2 + passed * second, passed * first, slope**2 + passed * one
    target_v, target_1 = _products_with_target(k, rho, beta, slope)
    miss_v, miss_1 = target_v - c * vv - b * v1, target_1 - c * v1 - b * v0
    # Where the unit hardly ever passes anything the matrix is singular, and there is little to gain.
    damping = _DAMPING * (vv + v0) + _LEAST_DAMPING
    vv, v0 = vv + damping, v0 + damping
    determinant = vv * v0 - v1**2
    steps = (v0 * miss_v - v1 * miss_1) / determinant, (vv * miss_1 - v1 * miss_v) / determinant
    return np.clip(steps[0], -_LONGEST_STEP, _LONGEST_STEP), np.clip(steps[1], -_LONGEST_STEP, _LONGEST_STEP)


def _products_with_target(k: Array, rho: Array, beta: Array, slope: float) -> tuple[Array, Array]:
    """E s(u + beta) s'(v + k) v, and the same without v."""
    tail, density = joint_tail(beta, k, rho), normal_density(k)
    positive_v, positive_1 = tail.uv + beta * tail.v, tail.u + beta * tail.one  # both parts positive
    linear_v, linear_1 = rho * (ndtr(k) - k * density) + beta * density, rho * density + beta * ndtr(k)
    rectified_v, rectified_1 = rho * ndtr(beta), beta * ndtr(beta) + normal_density(beta)
    weights = ((1 - slope) ** 2, slope * (1 - slope), slope * (1 - slope), slope**2)
    return (
        sum(x * y for x, y in zip(weights, (positive_v, linear_v, rectified_v, rho), strict=True)),
        sum(x * y for x, y in zip(weights, (positive_1, linear_1, rectified_1, beta), strict=True)),
    )
