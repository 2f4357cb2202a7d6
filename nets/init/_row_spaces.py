"""The row space of a low-rank layer: singular vectors, or those that majorise-minimise steps lead to.

A matrix M, (..., filters * taps, columns), holds the rows of a filter side by side; for a linear layer taps is 1. A row
space is an orthonormal basis V, (..., columns, rank). For a given V the best approximation of filter o for ReLU is its
projection M_o V Vᵀ, lengthened (`retract.nets.init._filter_lengths`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ._filter_lengths import best_lengths, cosines
from ._variable_projection import variable_projection
from .arc_cosine import kernel_derivative

__all__ = ["Projection", "leading_projection", "majorized_projection", "variable_projection_of"]


@dataclass(frozen=True)
class Projection:
    """A matrix M and its coordinates Z = M V in a row space.

    Attributes:
        matrix: M, (..., filters * taps, columns).
        basis: V, (..., columns, rank), orthonormal columns.
        coordinates: Z, (..., filters * taps, rank).
        taps: rows of a filter.
        norms: Frobenius norms of the filters, (..., filters).
    """

    matrix: Tensor
    basis: Tensor
    coordinates: Tensor
    taps: int
    norms: Tensor

    @cached_property
    def projected_norms(self) -> Tensor:
        """Norms of the filters' projections: (..., filters)."""
        return _filter_norms(self.coordinates, self.taps)

    @cached_property
    def cosines(self) -> Tensor:
        """Of the filters and their projections, in [0, 1]: (..., filters); 1 for zero filters."""
        return cosines(self.norms, self.projected_norms)

    def moved(self, basis: Tensor) -> Projection:
        """The projection onto another row space."""
        return Projection(self.matrix, basis, self.matrix @ basis, self.taps, self.norms)

    def left(self, lengths: Tensor) -> Tensor:
        """U, so that U Vᵀ has filters in the directions of the projections and of the given lengths.

        A filter that is orthogonal to the row space, to rounding, has no such direction: all in the row space are
        equally good, and its first row takes the first basis vector's.
        """
        projected = self.projected_norms
        lost = projected <= torch.finfo(projected.dtype).eps * self.norms
        left = self.coordinates * self.by_filter(torch.where(lost, 0.0, lengths / projected))
        left[..., :: self.taps, 0] += torch.where(lost, lengths, 0.0)
        return left

    def by_filter(self, values: Tensor) -> Tensor:
        """One value a filter (..., filters) as a column (..., filters * taps, 1)."""
        return values.repeat_interleave(self.taps, -1)[..., None]


def _filter_norms(rows: Tensor, taps: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(*rows.shape[:-2], -1, taps * rows.shape[-1]), dim=-1)
    return norms


def leading_projection(matrix: Tensor, rank: int, taps: int = 1) -> Projection:
    """Onto the leading right singular vectors."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    basis, coordinates = right[..., :rank, :].mT, left[..., :rank] * values[..., None, :rank]
    return Projection(matrix, basis, coordinates, taps, _filter_norms(matrix, taps))


def majorized_projection(start: Projection, *, slope: float, iterations: int) -> Projection:
    """A row space whose best approximation has at most the error of that of the start, after every iteration.

    The error is (1 + slope²)/2 |Y|² minus a convex function of Y with gradient (1 + slope²) T(Y), so up to a constant
    (1 + slope²)/2 |Y' - T(Y)|² bounds it from above, with equality at Y. At a best approximation for a row space

        T = U Vᵀ + diag(k') (M - Z Vᵀ),   U the best left factor, k' the kernel's derivatives at the filters' cosines.

    T V Vᵀ = U Vᵀ. So any V' with |T V'| >= |T V| lowers the bound, hence the error, and the best left factor for V'
    lowers it again. A block power step V' = orth(TᵀT V) does so: it maximises the linear lower bound of the convex
    |T V'|². Two of them are worth nearly as much as the bound's minimum, the singular vectors of T, at a fraction of
    their cost, and never form T.
    """
    projection = start
    for _ in range(iterations):
        left = projection.left(best_lengths(projection.norms, projection.projected_norms, slope))
        projection = projection.moved(_two_power_steps(projection, left, slope))
    return projection


def _two_power_steps(at: Projection, left: Tensor, slope: float) -> Tensor:
    """An orthonormal basis of (TᵀT)² V, T being diag(k') M + inside Vᵀ."""
    derivative = at.by_filter(kernel_derivative(torch.acos(at.cosines), slope))
    inside = left - derivative * at.coordinates
    # Columns of left and image are as small as their singular values, and QR does not mix their rounding errors:
    # small singular values keep their vectors. Without the first QR large ones would swamp them.
    once = torch.linalg.qr(at.matrix.mT @ (derivative * left) + at.basis @ (inside.mT @ left)).Q  # T V is U
    image = derivative * (at.matrix @ once) + inside @ (at.basis.mT @ once)
    basis: Tensor = torch.linalg.qr(at.matrix.mT @ (derivative * image) + at.basis @ (inside.mT @ image)).Q
    return basis


def variable_projection_of(start: Projection, *, slope: float, iterations: int) -> Projection:
    """A row space found by descent on the Grassmannian, matrix by matrix of a stack."""
    stack = start.matrix.flatten(0, -3) if start.matrix.ndim > 2 else start.matrix[None]
    bases = start.basis.reshape(len(stack), *start.basis.shape[-2:])
    found = [
        variable_projection(matrix, basis.shape[1], slope=slope, start=basis, iterations=iterations, taps=start.taps)
        for matrix, basis in zip(stack, bases, strict=True)
    ]
    return start.moved(torch.stack(found).reshape(start.basis.shape))
