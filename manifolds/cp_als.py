"""Alternating least squares for rank-one terms, guarded against terms that diverge and cancel."""

from __future__ import annotations

from typing import NamedTuple

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from .cp_fitting import power_method
from .cp_terms import Terms, check_terms, cp_normalize, cp_tensor, degeneracy

__all__ = ["Fit", "alternating_least_squares"]

#: Relative error, in units of rounding, at which nothing is left to be fitted.
_EXACT = 16
#: Ridges on a tensor of norm one, tried one after the other until the terms no longer cancel too far. The first only
#: keeps the systems regular.
_RIDGES = (1e-9, 1e-5, 1e-4, 1e-3, 1e-2)


class Fit(NamedTuple):
    """Terms for a tensor, and how good they are."""

    weights: Tensor
    factors: tuple[Tensor, ...]
    #: Relative Frobenius error.
    error: float
    #: Sum of |lambda_r| over the norm of the tensor that the terms sum to (`degeneracy`).
    degeneracy: float
    #: Ridge that was needed, for a tensor of norm one.
    ridge: float


def alternating_least_squares(
    tensor: Tensor,
    rank: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-8,
    largest_degeneracy: float = 50.0,
    start: Terms | None = None,
    generator: torch.Generator | None = None,
) -> Fit:
    """Terms that all fit a tensor together, by alternating least squares (tensorly's `parafac`, in float64).

    From random factors the iteration is apt to diverge at high ranks: pairs of ever longer terms that all but cancel,
    of which no truncation is near the tensor. So it starts from the power method, whose terms are benign, and it is
    run again with a ridge, ten times larger each time, while the sum of |lambda_r| exceeds ``largest_degeneracy``
    times the norm of the tensor.

    Args:
        tensor: of any number of modes.
        rank: how many terms.
        iterations: sweeps over the modes, at most.
        tolerance: change of the relative error in one sweep below which the iteration ends.
        largest_degeneracy: what is not to be exceeded; a ValueError if no ridge brings it about.
        start: terms to start from, those of `power_method` if left out.
        generator: for the random starts of the power method.

    Raises:
        ValueError: a rank less than one, a tensor that is not finite, or terms that cancel in spite of every ridge.
        TypeError: a tensor that is not real and floating-point.

    Source on diverging components: Phan et al., "Stable low-rank tensor decomposition for compression of
    convolutional neural network", ECCV 2020.
    """
    weights, factors = power_method(tensor, rank=rank, generator=generator) if start is None else start
    check_terms(weights, factors)
    if len(weights) != rank or tuple(factor.shape[1] for factor in factors) != tuple(tensor.shape):
        shapes = [tuple(factor.shape) for factor in factors]
        raise ValueError(f"start must have {rank} terms of a {tuple(tensor.shape)} tensor, got factors {shapes}")
    wide = tensor.detach().double()
    norm = torch.linalg.vector_norm(wide)
    weights, factors = cp_normalize([factor.detach().double() for factor in factors], weights.detach().double())
    fit = _report(wide, weights, factors, 0.0)
    if fit.error <= _EXACT * torch.finfo(tensor.dtype).eps:
        return _narrowed(fit, tensor.dtype)
    for ridge in _RIDGES:
        first = weights.unsqueeze(1) / norm * factors[0]
        fitted = _iterate(wide / norm, (first, *factors[1:]), ridge, iterations, tolerance)
        fit = _report(wide, *_units(norm, fitted, factors), ridge)
        if fit.degeneracy <= largest_degeneracy:
            return _narrowed(fit, tensor.dtype)
    raise ValueError(
        f"{rank} terms of a {tuple(tensor.shape)} tensor cancel: the sum of |weights| is {fit.degeneracy:.3g} times "
        f"its norm in spite of a ridge of {fit.ridge:g}, and largest_degeneracy allows {largest_degeneracy:g}. "
        "Use power_method, whose terms do not cancel, or another number of terms"
    )


def _iterate(
    tensor: Tensor, factors: tuple[Tensor, ...], ridge: float, iterations: int, tolerance: float
) -> list[Tensor]:
    """Factors (R, d_m) after tensorly's iteration; those given hold the weights in the first, which it makes anew."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        start = CPTensor((None, [factor.mT.clone() for factor in factors]))
        found = parafac(tensor, len(factors[0]), n_iter_max=iterations, init=start, tol=tolerance, l2_reg=ridge)
    return [factor.mT for factor in found.factors]


def _units(norm: Tensor, fitted: list[Tensor], before: tuple[Tensor, ...]) -> Terms:
    """Weights and unit rows; a term that has become zero keeps the directions it had."""
    is_zero = torch.stack([(factor == 0).all(dim=1) for factor in fitted]).any(dim=0)
    weights, units = cp_normalize(
        [torch.where(is_zero.unsqueeze(1), old, new) for new, old in zip(fitted, before, strict=True)]
    )
    return torch.where(is_zero, 0.0, weights * norm), units


def _report(tensor: Tensor, weights: Tensor, factors: tuple[Tensor, ...], ridge: float) -> Fit:
    residual, norm = (torch.linalg.vector_norm(t) for t in (tensor - cp_tensor(weights, factors), tensor))
    error = float(residual / norm) if norm > 0 else float(residual)
    return Fit(weights, factors, error, float(degeneracy(weights, factors)), ridge)


def _narrowed(fit: Fit, dtype: torch.dtype) -> Fit:
    return fit._replace(weights=fit.weights.to(dtype), factors=tuple(factor.to(dtype) for factor in fit.factors))
