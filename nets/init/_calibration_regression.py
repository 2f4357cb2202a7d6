"""Reduced-rank regression: the map of low rank nearest to some targets on given inputs.

The rows of the layer's matrix may run over kernel axes. Its input is then one vector x_t for each tap t of those axes,
and its answer the sum of U_t V x_t: the taps share V. With C = E x xᵀ and M = E y xᵀ over the joined vectors x, the
error of a map A is tr(A C Aᵀ) - 2 tr(A Mᵀ) plus a constant.

With one tap the solution is that of Izenman, "Reduced-rank regression for the multivariate linear model", J.
Multivariate Anal. 1975: for inputs made white by C = L Lᵀ the truncated singular value decomposition of M L⁻ᵀ. With
more there is no closed form; alternating least squares never increases the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Factors", "Regression"]

_STEPS = 8  # of conjugate gradients, for V in each sweep of alternating least squares
_FIRST_SWEEPS = 10


class Factors(NamedTuple):
    """A map x -> sum over taps of U_t V x_t."""

    #: U, (groups, out, taps * rank).
    left: Tensor
    #: V, (groups, rank, columns).
    right: Tensor

    @property
    def taps(self) -> int:
        """In the rows of the matrix, for each output."""
        return self.left.shape[-1] // self.right.shape[-2]

    def __call__(self, inputs: Tensor) -> Tensor:
        """(groups, rows, taps * columns) -> (groups, rows, out)."""
        return _features(inputs, self.right) @ self.left.mT

    @property
    def product(self) -> Tensor:
        """The map as one matrix (groups, out, taps * columns)."""
        groups, out, _ = self.left.shape
        return (self.left.reshape(groups, -1, self.right.shape[1]) @ self.right).reshape(groups, out, -1)


def _features(inputs: Tensor, right: Tensor) -> Tensor:
    """V x_t of all taps: (groups, rows, taps * columns) -> (groups, rows, taps * rank)."""
    groups, rows, _ = inputs.shape
    return (inputs.reshape(groups, -1, right.shape[-1]) @ right.mT).reshape(groups, rows, -1)


class Regression:
    """Reduced-rank regressions on the same inputs.

    Args:
        moments: C, (groups, taps * columns, taps * columns), positive definite.
        rank: of the map's matrix (out * taps, columns).
        taps: how many vectors the input joins.
    """

    def __init__(self, moments: Tensor, rank: int, taps: int) -> None:
        self.moments, self.rank, self.taps = moments, rank, taps
        blocks = moments.unflatten(-1, (taps, -1)).unflatten(-3, (taps, -1))
        #: Moments of the vector of one tap, mean over the taps.
        self.mean_block = blocks.diagonal(dim1=-4, dim2=-2).mean(-1)
        values, vectors = torch.linalg.eigh(self.mean_block)
        self.whitening = vectors / values.sqrt()[..., None, :]
        self.triangle = torch.linalg.cholesky(moments) if taps > 1 else None

    def best(self, cross: Tensor) -> Factors:
        """The best map for cross moments M (groups, out, taps * columns); for several taps a local optimum, nearly."""
        groups, out, _ = cross.shape
        if self.triangle is None:
            return self._truncated(cross @ self.whitening)
        full = torch.cholesky_solve(cross.mT, self.triangle).mT
        values = full.reshape(groups, out * self.taps, -1) @ torch.linalg.inv(self.whitening).mT
        factors = self._truncated(values)
        factors = Factors(factors.left.reshape(groups, out, -1), factors.right)
        for _ in range(_FIRST_SWEEPS):
            factors = self.improved(cross, factors)
        return factors

    def improved(self, cross: Tensor, start: Factors) -> Factors:
        """A map at least as good for the cross moments as another one; with one tap the best."""
        if self.triangle is None:
            return self._truncated(cross @ self.whitening)
        return self._with_best_left(cross, self._with_better_right(cross, start).right)

    def _truncated(self, matrix: Tensor) -> Factors:
        """The nearest matrix of the rank, of maps that act on white inputs, as one that acts on the inputs."""
        rows, columns = matrix.shape[-2:]
        if rows <= columns:
            left = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[..., -self.rank :]
            right = left.mT @ matrix
        else:
            right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[..., -self.rank :].mT
            left = matrix @ right.mT
        return Factors(left, right @ self.whitening.mT)

    def _with_best_left(self, cross: Tensor, right: Tensor) -> Factors:
        """Linear regression on the features V x_t."""
        right = torch.linalg.qr(right.mT).Q.mT
        half = _features(self.moments, right)  # C (I ⊗ Vᵀ)
        gram = _features(half.mT, right)
        triangle = torch.linalg.cholesky((gram + gram.mT) / 2)
        return Factors(torch.cholesky_solve(_features(cross, right).mT, triangle).mT, right)

    def _with_better_right(self, cross: Tensor, factors: Factors) -> Factors:
        """Some steps of conjugate gradients for V, as if the taps were alike and uncorrelated for preconditioning."""
        left, right = factors
        groups, _, _ = left.shape
        stacked = left.reshape(groups, -1, self.rank)
        gram = stacked.mT @ stacked
        top = torch.linalg.eigvalsh(gram)[..., -1:, None]
        gram = gram + 1e-12 * top * torch.eye(self.rank).to(gram)
        inverse = self.whitening @ self.whitening.mT

        def folded(matrix: Tensor) -> Tensor:
            """Gradient by A, (groups, out, taps * columns), as one by V."""
            return stacked.mT @ matrix.reshape(groups, stacked.shape[1], -1)

        residual = folded(cross - factors.product @ self.moments)
        solved = torch.linalg.solve(gram, residual) @ inverse
        direction, norm = solved, _inner(residual, solved)
        for _ in range(_STEPS):
            image = folded(Factors(left, direction).product @ self.moments)
            curvature = _inner(direction, image)
            step = torch.where(curvature > 0, norm / curvature, 0.0)
            right, residual = right + step * direction, residual - step * image
            solved = torch.linalg.solve(gram, residual) @ inverse
            before, norm = norm, _inner(residual, solved)
            direction = solved + torch.where(before > 0, norm / before, 0.0) * direction
        return Factors(left, right)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)
