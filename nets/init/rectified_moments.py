"""Moments of pairs of Gaussian variables, one or both rectified: closed forms for layers with biases.

u and v are standard normal with correlation rho; the functions work elementwise on float64 arrays.

Sources: Owen, "Tables for computing bivariate normal probabilities", Annals of Mathematical Statistics 1956,
equation 2.1; the truncated moments follow by integration by parts (Rosenbaum, J. R. Statist. Soc. B 1961).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, owens_t

__all__ = ["Array", "JointTail", "joint_tail", "leaky_product", "normal_density"]

Array = NDArray[np.float64]

#: For thresholds of 0 and correlations of 1, where quotients below have limits but no values.
_TINY, _LEAST_SINE = 1e-300, 1e-150
#: A mean is taken to be at most this many standard deviations from 0: a normal variable is positive or not, by then.
_MOST_DEVIATIONS = 1e8


def normal_density(x: Array) -> Array:
    """Density of the standard normal distribution."""
    density: Array = np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
    return density


@dataclass(frozen=True)
class JointTail:
    """Moments of u and v where u > -h and v > -k: E 1, E u, E v and E u v over that quadrant."""

    one: Array
    u: Array
    v: Array
    uv: Array


def joint_tail(h: Array, k: Array, rho: Array) -> JointTail:
    """The moments of a quadrant for finite thresholds and correlations in [-1, 1]."""
    sine = np.maximum(np.sqrt((1 - rho) * (1 + rho)), _LEAST_SINE)
    h, k = (np.where(np.abs(x) < _TINY, _TINY, x) for x in (h, k))
    past_h, past_k = (k - rho * h) / sine, (h - rho * k) / sine
    with np.errstate(over="ignore"):
        owen = owens_t(h, past_h / h) + owens_t(k, past_k / k)
    one = (ndtr(h) + ndtr(k)) / 2 - owen - np.where(h * k < 0, 0.5, 0.0)
    at_h, at_k = normal_density(h) * ndtr(past_h), normal_density(k) * ndtr(past_k)
    corner = sine * normal_density(h) * normal_density(np.minimum(np.abs(past_h), _MOST_DEVIATIONS))
    return JointTail(one, at_h + rho * at_k, at_k + rho * at_h, rho * (one - h * at_h - k * at_k) + corner)


def leaky_product(means: tuple[Array, Array], scales: tuple[Array, Array], rho: Array, slope: float) -> Array:
    """E s(a) s(b) of jointly normal a and b with s(z) = max(z, slope z) and the given means and standard deviations."""
    scale_a, scale_b = (np.maximum(s, np.abs(m) / _MOST_DEVIATIONS + _TINY) for m, s in zip(means, scales, strict=True))
    h, k = means[0] / scale_a, means[1] / scale_b
    tail = joint_tail(h, k, rho)
    both = tail.uv + h * tail.v + k * tail.u + h * k * tail.one
    a_rectified = rho * ndtr(h) + k * (h * ndtr(h) + normal_density(h))  # E of b times a's positive part
    b_rectified = rho * ndtr(k) + h * (k * ndtr(k) + normal_density(k))
    product = (1 - slope) ** 2 * both + slope * (1 - slope) * (a_rectified + b_rectified) + slope**2 * (rho + h * k)
    result: Array = scale_a * scale_b * product
    return result
