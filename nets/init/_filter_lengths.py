"""How long the filters of a low-rank layer are made, their directions being given.

A filter w and its projection onto the row space have the cosine rho. A rule maps the norms |w|, those of the
projections rho |w|, and the slope of the leaky ReLU to lengths |y|, all of shape (..., filters): the leading dimensions
are those of a stack of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .arc_cosine import kernel

__all__ = [
    "FilterLengths",
    "best_lengths",
    "cosines",
    "equal_frobenius_norm",
    "equal_norms",
    "one_scalar",
    "projected_lengths",
]

FilterLengths: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]


def cosines(norms: Tensor, projected: Tensor) -> Tensor:
    """Of the filters and their projections, in [0, 1]; 1 for zero filters."""
    return torch.where(norms > 0, projected / norms, 1.0).clamp(max=1.0)


def projected_lengths(norms: Tensor, projected: Tensor, slope: float) -> Tensor:
    """Those of the projections: the nearest matrix."""
    return projected


def one_scalar(norms: Tensor, projected: Tensor, slope: float) -> Tensor:
    """Those of the projections times the scalar that is best for the function: sum |w||y| kappa(rho) / sum |y|²."""
    target = (projected * best_lengths(norms, projected, slope)).sum(-1, keepdim=True)
    return projected * _ratio(target, projected.square().sum(-1, keepdim=True))


def equal_frobenius_norm(norms: Tensor, projected: Tensor, slope: float) -> Tensor:
    """Those of the projections times the scalar that gives the matrix its Frobenius norm."""
    whole, part = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (norms, projected))
    return projected * _ratio(whole, part)


def equal_norms(norms: Tensor, projected: Tensor, slope: float) -> Tensor:
    """Those of the filters."""
    return norms


def best_lengths(norms: Tensor, projected: Tensor, slope: float) -> Tensor:
    """|w| kappa(rho): the best for the function, filter by filter."""
    return norms * kernel(cosines(norms, projected), slope)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 1.0)
