"""The order-1 arc-cosine kernel, of ReLU and leaky ReLU: E s(w·x) s(y·x) for Gaussian x.

With s(z) = max(z, slope z), x ~ N(0, I) and the angle t between w and y,

    E s(w·x) s(y·x) = (1 + slope²)/2 |w||y| kernel,
    kernel = [(1 - slope)² (sin t + (π - t) cos t)/π + 2 slope cos t] / (1 + slope²)
           = cos t + c/π (sin t - t cos t),   c = (1 - slope)² / (1 + slope²),

which is 1 at t = 0. Functions that must stay exact where two vectors nearly agree take the angle, which `angle_between`
gives to full relative precision; those that need not take the cosine. They serve float32 as well as float64.

Source: Cho, Saul, "Kernel methods for deep learning", NeurIPS 2009, equation 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["angle_between", "curvature", "kernel", "kernel_deficit", "kernel_derivative"]

#: Below this angle sin t - t cos t is summed as a series: the difference would lose the digits of 1/t².
_SERIES = 0.5
#: Of t³, t⁵, ...: 2k (-1)^(k+1) / (2k+1)!, to float64's precision at the angle above.
_COEFFICIENTS = tuple((-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 8))


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angles in [0, π] between the rows of two tensors (..., n): shape (...).

    2 atan2(|â - b̂|, |â + b̂|) of the unit rows (Kahan, "How futile are mindless assessments of roundoff", 2006,
    section 12). The difference of rows of about the same length comes from a - b and from
    |a| - |b| = (a - b)·(a + b) / (|a| + |b|), so that small angles have the relative precision of the entries of a - b.
    A zero row is at π/2 to every other, and at 0 to a zero row.
    """
    a_norm, b_norm = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (a, b))
    unit_a, unit_b = (torch.where(norm > 0, x / norm, 0.0) for x, norm in ((a, a_norm), (b, b_norm)))
    change = (a - b) / a_norm
    excess = torch.linalg.vecdot(change, a + b)[..., None] / (a_norm + b_norm)
    alike = (a_norm <= 2 * b_norm) & (b_norm <= 2 * a_norm) & (a_norm > 0)
    difference = torch.where(alike, change - excess * unit_b, unit_a - unit_b)
    lengths = [torch.linalg.vector_norm(x, dim=-1) for x in (difference, unit_a + unit_b)]
    return 2 * torch.atan2(*lengths)


def curvature(slope: float) -> float:
    """(1 - slope)² / (1 + slope²): how far the kernel is from the cosine, which it is for slope 1; 1 for ReLU."""
    return (1 - slope) ** 2 / (1 + slope**2)


def kernel(cosine: Tensor, slope: float = 0.0) -> Tensor:
    """The normalised kernel of cosines in [-1, 1]."""
    angle = torch.acos(cosine)
    return cosine + curvature(slope) / math.pi * (angle.sin() - angle * cosine)


def kernel_deficit(angle: Tensor, slope: float = 0.0) -> Tensor:
    """1 - kernel to full relative precision, however small the angle is.

    For ReLU it is 2 sin²(t/2) - (sin t - t cos t)/π = t²/2 - t³/(3π) - t⁴/24 + ...
    """
    versine = 2 * (angle / 2).sin().square()
    return versine - curvature(slope) / math.pi * _sine_remainder(angle)


def kernel_derivative(angle: Tensor, slope: float = 0.0) -> Tensor:
    """Derivative of the kernel with respect to the cosine; for ReLU 1 - t/π. Finite at every angle."""
    return 1 - curvature(slope) / math.pi * angle


def _sine_remainder(angle: Tensor) -> Tensor:
    """Sin t - t cos t."""
    small = angle.clamp(max=_SERIES)
    square, series = small.square(), torch.zeros_like(small)
    for coefficient in reversed(_COEFFICIENTS):
        series = series * square + coefficient
    return torch.where(angle < _SERIES, series * square * small, angle.sin() - angle * angle.cos())
