"""Roots of second moments: an input x = L z has z white, and a weight W acts on z as W L."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["covariance_roots"]


def covariance_roots(covariance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """L and its pseudo-inverse, float64, symmetric, with L² the covariance E x xᵀ.

    Directions whose variance is zero to rounding in the covariance's type are left out of both: W L L⁺ is zero there.

    Args:
        covariance: (size, size), or a stack of such matrices.
        size: of the inputs.

    Raises:
        ValueError: another shape, NaN or infinite entries, or a matrix that is not symmetric and positive semidefinite.
        TypeError: no floating-point tensor.
    """
    if not covariance.is_floating_point():
        raise TypeError(f"covariance must be a tensor of real floating-point numbers, got {covariance.dtype}")
    if covariance.shape[-2:] != (size, size):
        raise ValueError(f"covariance must be of shape (..., {size}, {size}), got {tuple(covariance.shape)}")
    if not covariance.isfinite().all():
        raise ValueError("covariance must be finite, got NaN or infinite entries")
    matrix = covariance.detach().double()
    # Rounding of the type that the moments were summed in.
    rounding = size * torch.finfo(covariance.dtype).eps
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    if bool(((matrix - matrix.mT).abs() > 10 * rounding * largest).any()):
        raise ValueError("covariance must be symmetric")
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    top = values[..., -1:].clamp(min=0)
    if bool((values[..., 0] < -10 * rounding * largest[..., 0, 0]).any()):
        raise ValueError(f"covariance must be positive semidefinite, got an eigenvalue {float(values.min()):.3g}")
    seen = values > rounding * top
    roots = torch.where(seen, values, 0.0).sqrt()
    inverses = torch.where(seen, 1 / roots, 0.0)
    return (vectors * roots[..., None, :]) @ vectors.mT, (vectors * inverses[..., None, :]) @ vectors.mT
