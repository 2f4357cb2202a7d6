"""Two thin factors that copy a layer's function, not only its matrix.

The usual start of a low-rank layer is the truncated singular value decomposition, the nearest matrix. Before a ReLU it
is not the nearest function: what the row space leaves out of a unit's weight still contributes to its mean. For inputs
x ~ N(0, I), a row space V and ReLU or leaky ReLU the best left factor has a closed form: every unit is its projection
onto V, lengthened by kappa(rho)/rho, with the normalised arc-cosine kernel kappa (`retract.nets.init.arc_cosine`) and
the cosine rho of unit and projection. The error is then (1 + slope²)/2 sum |w_i|² (1 - kappa(rho_i)²), and it remains
to choose V.

The problem: Vodrahalli, Shivanna, Sathiamoorthy, Jain, Chi, "Nonlinear initialization methods for low-rank neural
networks", arXiv 2202.00834. Formulas and algorithms are derived here, not theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from retract.nets._unfolding import Unfolding, UnfoldingKind

from ._filter_lengths import (
    FilterLengths,
    best_lengths,
    equal_frobenius_norm,
    equal_norms,
    one_scalar,
    projected_lengths,
)
from ._row_spaces import Projection, leading_projection, majorized_projection, variable_projection_of
from ._whitening import covariance_roots
from .bias_correction import corrected_units

__all__ = ["BiasedLowRankFactors", "LowRankFactors", "LowRankMethod", "lowrank_factors", "lowrank_factors_with_bias"]

LowRankMethod: TypeAlias = Literal["spectral", "scaled", "norm", "row_norm", "relu", "relu_dc", "relu_varpro"]

_LENGTHS: dict[LowRankMethod, FilterLengths] = {
    "spectral": projected_lengths,
    "scaled": one_scalar,
    "norm": equal_frobenius_norm,
    "row_norm": equal_norms,
    "relu": best_lengths,
    "relu_dc": best_lengths,
    "relu_varpro": best_lengths,
}
#: Methods that leave the leading singular vectors, and how many iterations they take.
_SEARCHES: dict[LowRankMethod, tuple[Callable[..., Projection], int]] = {
    "relu_dc": (majorized_projection, 5),
    "relu_varpro": (variable_projection_of, 10),
}


class LowRankFactors(NamedTuple):
    """U and V, whose product U V is near the matrix of a weight."""

    #: (rows, rank); with several groups (groups, rows, rank).
    left: Tensor
    #: (rank, columns); with several groups (groups, rank, columns).
    right: Tensor


class BiasedLowRankFactors(NamedTuple):
    """U and V, and the bias that goes with them."""

    left: Tensor
    right: Tensor
    #: (out,).
    bias: Tensor


@torch.no_grad()
def lowrank_factors(
    weight: Tensor,
    *,
    rank: int,
    method: LowRankMethod = "relu",
    slope: float = 0.0,
    unfolding: UnfoldingKind = "output",
    groups: int = 1,
    covariance: Tensor | None = None,
    iterations: int | None = None,
) -> LowRankFactors:
    """Factors U and V of a layer of low rank whose function is near that of the layer with a given weight.

    =================  ==============================================================================================
    method             row space, and lengths of the filters in it
    =================  ==============================================================================================
    ``"spectral"``     leading singular vectors, projections: the nearest matrix
    ``"scaled"``       the same times one scalar: the best one for the function
    ``"norm"``         the same times the scalar that keeps the matrix's Frobenius norm
    ``"row_norm"``     leading singular vectors, every filter with its own norm
    ``"relu"``         leading singular vectors, every filter with its best length: closed form
    ``"relu_dc"``      row space improved by majorise-minimise steps, none of which increases the error; best lengths
    ``"relu_varpro"``  row space improved by L-BFGS on the Grassmannian, never worse than its start; best lengths
    =================  ==============================================================================================

    Up to rounding, the function errors of ``"relu_dc"`` and ``"relu_varpro"`` are never above that of ``"relu"``, which
    is never above that of ``"scaled"``, nor that one above ``"spectral"``'s. Batch normalization right after the layer
    removes lengths: then only row spaces matter.

    Column j of U has the norm of row j of V: the root of the singular value for ``"spectral"``. After ``"relu_dc"`` and
    ``"relu_varpro"``, and with a covariance, columns of U are orthogonal, and U V = (U/√s) s (V/√s) is the singular
    value decomposition. Where the weight has a rank below ``rank``, the columns and rows that are left over are zero.
    A filter that is zero stays zero. One that is orthogonal to the row space has no projection; it becomes a multiple
    of the leading singular vector, which is as good as any other direction.

    Args:
        weight: (out, in / groups, *kernel) of a linear layer or a convolution, finite. Weights in half precision are
            computed in float32; results have the weight's dtype and device, and carry no gradients.
        rank: from 1 to the smaller side of the weight's matrix.
        method: one of the above.
        slope: of the leaky ReLU after the layer, finite; 0 is ReLU. At 1, a linear layer, all methods but the two that
            keep norms are ``"spectral"``.
        unfolding: of a convolution: which axes of the kernel belong to the rows of its matrix, ``"output"`` (none),
            ``"input"`` (all) or ``"separable"`` (the first).
        groups: of a convolution; each group has factors of its own.
        covariance: second moments E x xᵀ of the inputs, (columns, columns), or (groups, columns, columns): x ~ N(0, I)
            becomes N(0, C). Where kernel axes belong to rows, inputs of different offsets along them count as
            independent. Computed in float64. Directions without variance are left out.
        iterations: of ``"relu_dc"`` (default 5) and ``"relu_varpro"`` (default 10).

    Raises:
        ValueError: a rank, method, slope, unfolding, groups, covariance or iterations out of range; NaN or infinite
            entries.
        TypeError: a weight or covariance that is not real and floating-point, or a rank or iterations that are no int.
    """
    problem = _Problem(weight, rank, method, slope, unfolding, groups, covariance, iterations)
    projection = problem.projection
    lengths = _LENGTHS[method](projection.norms, projection.projected_norms, float(slope))
    return problem.factors(lengths)


@torch.no_grad()
def lowrank_factors_with_bias(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rank: int,
    method: LowRankMethod = "relu",
    slope: float = 0.0,
    unfolding: UnfoldingKind = "output",
    groups: int = 1,
    covariance: Tensor | None = None,
    iterations: int | None = None,
) -> BiasedLowRankFactors:
    """Factors and a bias, when the layer of low rank may have one: length and bias of every filter best together.

    The row space is that of `lowrank_factors` with the same method, the lengths are not. For Gaussian inputs a bias is
    worth several times what lengths alone are: it restores the mean of what the row space leaves out. The lengths then
    are shorter than the projections, where those alone would be longer: signals have the right mean, and less variance.

    Args:
        weight: as for `lowrank_factors`.
        bias: (out,) of the layer, finite; None for zeros. Row spaces are chosen without it.
        rank: as for `lowrank_factors`, and so are the others.
        method: chooses the row space.
        slope: of the leaky ReLU after the layer. Below 0, where it is not monotone, lengths and biases are a local
            optimum.
        unfolding: of a convolution.
        groups: of a convolution.
        covariance: second moments of the inputs.
        iterations: of the methods that iterate.

    Raises:
        ValueError: as `lowrank_factors`, or a bias of another shape or with NaN or infinite entries.
        TypeError: as `lowrank_factors`.
    """
    problem = _Problem(weight, rank, method, slope, unfolding, groups, covariance, iterations)
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.isfinite().all()):
        raise ValueError(f"bias must be finite, of shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    projection = problem.projection
    norms, projected = projection.norms, projection.projected_norms
    beta = torch.zeros_like(norms) if bias is None else bias.to(norms).reshape(norms.shape) / problem.scale
    alive = norms > 0
    units = corrected_units(
        projection.cosines.double().cpu().numpy(),
        torch.where(alive, beta / norms, 0.0).double().cpu().numpy(),
        length=torch.where(alive, best_lengths(norms, projected, slope) / norms, 0.0).double().cpu().numpy(),
        slope=slope,
    )
    length, new_bias = (torch.from_numpy(x).to(norms) * norms for x in units[:2])
    new_bias = torch.where(alive, new_bias, beta) * problem.scale
    return BiasedLowRankFactors(*problem.factors(length), new_bias.reshape(-1).to(weight.dtype))


class _Problem:
    """A checked problem, its matrix in units of its largest entry and of white inputs, and the row space chosen."""

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        method: LowRankMethod,
        slope: float,
        unfolding: UnfoldingKind,
        groups: int,
        covariance: Tensor | None,
        iterations: int | None,
    ) -> None:
        _check(weight, method, slope, iterations)
        layout = Unfolding(tuple(weight.shape), unfolding, groups)
        layout.check_rank(rank)
        self.dtype, self.inverse_root = weight.dtype, None
        matrix = layout.matrix(weight.detach())
        matrix = matrix.to(torch.promote_types(weight.dtype, torch.float32))
        largest = max(matrix.abs().amax().item(), torch.finfo(matrix.dtype).tiny)
        if not math.isfinite(largest):
            raise ValueError("weight must be finite, got NaN or infinite entries")
        # What is squared neither overflows nor vanishes. A power of two changes no digit, so singular vectors of equal
        # singular values, which are arbitrary, are those of the weight.
        self.scale = math.ldexp(1.0, math.frexp(largest)[1] - 1)
        matrix = matrix / self.scale
        if covariance is not None:
            root, self.inverse_root = covariance_roots(covariance.to(weight.device), matrix.shape[-1])
            matrix = matrix.double() @ root
        self.projection = leading_projection(matrix, rank, math.prod(layout.row_shape[1:]))
        self.singular_basis = method not in _SEARCHES
        if not self.singular_basis:
            search, usual = _SEARCHES[method]
            count = usual if iterations is None else iterations
            self.projection = search(self.projection, slope=float(slope), iterations=count)

    def factors(self, lengths: Tensor) -> LowRankFactors:
        """Those of the filters' projections brought to the given lengths, for the inputs and in the units given."""
        left, right = self.projection.left(lengths), self.projection.basis.mT
        if self.inverse_root is not None:
            right = right @ self.inverse_root
            frame, triangle = torch.linalg.qr(right.mT)
            left, right = _singular_basis(left @ triangle.mT, frame.mT)
        elif not self.singular_basis:
            left, right = _singular_basis(left, right)
        left, right = _balanced(left, right, self.scale)
        return LowRankFactors(left.to(self.dtype).contiguous(), right.to(self.dtype).contiguous())


def _singular_basis(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthogonal columns on the left, largest first; the right's rows are orthonormal."""
    vectors = torch.linalg.eigh(left.mT @ left).eigenvectors.flip(-1)
    return left @ vectors, vectors.mT @ right


def _balanced(left: Tensor, right: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The product times the scale, right having orthonormal rows: columns on the left get the norms of those rows."""
    norms = torch.linalg.vector_norm(left, dim=-2)
    share = (scale * norms).sqrt()
    return left * torch.where(norms > 0, share / norms, 0.0)[..., None, :], share[..., :, None] * right


def _check(weight: Tensor, method: str, slope: float, iterations: int | None) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a tensor of real floating-point numbers, got {got}")
    if method not in get_args(LowRankMethod):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(LowRankMethod)))}, got {method!r}")
    if isinstance(slope, bool) or not isinstance(slope, Real) or not math.isfinite(slope):
        raise ValueError(f"slope must be a finite number, got {slope!r}")
    if iterations is None:
        return
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations must be an int, got {iterations!r}")
    if iterations < 1 or method not in _SEARCHES:
        raise ValueError(f"iterations must be at least 1, for {' or '.join(_SEARCHES)}; got {iterations} for {method}")
