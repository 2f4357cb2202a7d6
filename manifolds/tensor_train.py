"""Matrices of given tensor-train ranks under control of their singular values: STTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tensor_chain as chains
from .embedded import EmbeddedManifold, Factors
from .spectral import SVDSpectral
from .spectrum import SpectrumLike
from .tensor_chain import Cores, Train, frame
from .tensor_checks import why_no_point, why_not_tangent
from .tensor_gradients import bond_factors, contract, outer_gradients, riemannian
from .tensor_ranks import capped_ranks, check_ranks, core_shapes, prime_modes
from .triplets import HALF, Triplets, rounding

__all__ = ["STTP", "capped_ranks", "check_ranks", "core_shapes", "frame", "prime_modes"]


class STTP(EmbeddedManifold):
    r"""Matrices :math:`W = U \operatorname{diag}(s) V^\top` of fixed tensor-train ranks, with s in a given set.

    The rows of W are counted by a multi-index over ``out_modes``, its columns by one over ``in_modes``, row-major;
    U and V are chains of orthonormal cores (see `frame`) that meet at the singular values. A point is the tuple
    (U_1, ..., U_D, s, V_1, ..., V_E) of matricized cores, outermost first. Rotations at the bonds change the point
    and not W (`act`).

    A tangent vector is a tuple of the same shapes, which stands for the velocity dW of W. Verbs return a normal form:
    U_kᵀ dU_k = 0 at the outer cores, and that of `SVDSpectral` at (U_D, s, V_E): ``center``, a manifold of that
    class, does all that concerns the middle. The metric is that of the space of matrices, <dW, dW'>. No verb forms
    a matrix of W's size but `embed`, `project` and `tangent`, which return one or may take one.

    Half-precision factors are computed in float32 and returned in their own dtype. A NaN in a step is a
    LinAlgError of the retraction. A bond whose rank has dropped has no velocity in the directions it lacks.

    Args:
        shape: ``(out_modes, in_modes)``, with products m and n; `prime_modes` gives the finest.
        ranks: R_1, R_2, ... along the train: the out bonds from the left, the rank of W, the in bonds from the
            middle outward. An int caps all of them (`capped_ranks`).
        spectrum: a `Spectrum` or its name: "identity", "free", "lipschitz", "bounded".

    Raises:
        ValueError: a mode or a rank less than one, or ranks that no matrix attains (`check_ranks`).

    Sources: Obukhov et al., AISTATS 2021 (cores and spectrum); Holtz, Rohwedder, Schneider, Numer. Math. 2012 (the
    manifold, its tangent space and dimension); Steinlechner, SISC 2016 (gradient and transport by cores).
    """

    name = "STTP"

    def __init__(
        self, shape: tuple[Sequence[int], Sequence[int]], ranks: int | Sequence[int], spectrum: SpectrumLike = "free"
    ) -> None:
        self.out_modes, self.in_modes = (tuple(modes) for modes in shape)
        self.ranks = check_ranks(self.out_modes, self.in_modes, ranks)
        self.center = SVDSpectral(self.ranks[len(self.out_modes) - 1], spectrum)
        self._left, self._right = core_shapes(self.out_modes, self.in_modes, self.ranks)

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as plain values; optimizer state dicts hold them in place of the object."""
        spectrum = self.center.arguments["spectrum"]
        return {"shape": (self.out_modes, self.in_modes), "ranks": self.ranks, "spectrum": spectrum}

    def __repr__(self) -> str:
        return f"STTP({(self.out_modes, self.in_modes)}, {self.ranks}, {self.center.spectrum})"

    # ------------------------------------------------------------------------------------------ shapes, dtypes

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrix."""
        return math.prod(self.out_modes), math.prod(self.in_modes)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of a point's factors, in order."""
        return (*self._left, (self.center.rank,), *self._right)

    def dimension(self, shapes: Sequence[Sequence[int]] | None = None) -> int:
        """Dimension of the manifold; ``shapes``, if given, must be those of a point's factors.

        For a free spectrum ``sum R_{k-1} n_k R_k - sum R_k²``, over all cores and all bonds (Holtz, Rohwedder,
        Schneider); one less for `Lipschitz`, r (r + 1) / 2 less for `Identity`.
        """
        if shapes is not None and tuple(map(tuple, shapes)) != self.shapes:
            raise ValueError(f"{self} has points of shapes {self.shapes}, got {tuple(map(tuple, shapes))}")
        outer = sum(rank * (rows - rank) for side in (self._left, self._right) for rows, rank in side[:-1])
        return outer + self.center.dimension((self._left[-1][0], self._right[-1][0]))

    def _read(self, *points: Factors) -> list[Train]:
        """Points and vectors in the dtype of the computation; shapes that do not fit are errors."""
        trains, middle = [], len(self._left)
        for factors in points:
            shapes = tuple(tuple(t.shape) for t in factors)
            if shapes != self.shapes:
                raise ValueError(f"{self} has points and vectors of shapes {self.shapes}, got {shapes}")
            dtype = points[0][0].dtype
            if not dtype.is_floating_point:
                raise TypeError(f"{self} needs real floating-point factors, got dtype {dtype}")
            wide = tuple(t.to(_wide(dtype)) for t in factors)
            trains.append(Train(wide[:middle], wide[middle], wide[middle + 1 :]))
        return trains

    # ------------------------------------------------------------------------------ metric, tangent vectors

    def inner(self, x: Factors, u: Factors, v: Factors | None = None) -> Tensor:
        """``<dW, dW'>``, a scalar, for any velocities of the factors, in normal form or not."""
        point, a, b = self._read(x, u, u if v is None else v)
        a, b = _horizontal(point, a), _horizontal(point, b)
        total = self.center.inner(point.center, a.center, b.center)
        for cores, da, db in zip(point.sides, a.sides, b.sides, strict=True):
            for p, q, factor in zip(da[:-1], db[:-1], bond_factors(cores, point.values), strict=True):
                if factor is not None:
                    total = total + ((p @ factor) * (q @ factor)).sum()
        return total

    def proju(self, x: Factors, u: Factors) -> Cores:
        """Project any velocities of the factors: the normal form of the tangent vector nearest to their dW."""
        point, vector = self._read(x, u)
        vector = _horizontal(point, vector)
        return vector.with_center(self.center.proju(point.center, vector.center)).factors(x[0].dtype)

    def egrad2rgrad(self, x: Factors, egrad: Factors) -> Cores:
        """Riemannian gradient from the gradients of the factors, those of a function of W."""
        point, gradient = self._read(x, egrad)
        left, right = (riemannian(c, point.values, g[:-1]) for c, g in zip(point.sides, gradient.sides, strict=True))
        return Train.of(left, self.center.egrad2rgrad(point.center, gradient.center), right).factors(x[0].dtype)

    def tangent(self, x: Factors, ambient: Tensor | tuple[Tensor, Tensor]) -> Cores:
        """The tangent vector nearest to a matrix, given as (m, n) or as a pair (A, B) with ``ambient = A @ B.T``."""
        (point,) = self._read(x)
        a, b = (ambient, None) if isinstance(ambient, Tensor) else ambient
        shape = tuple(a.shape) if b is None else (len(a), len(b))
        if shape != self.matrix_shape:
            raise ValueError(f"ambient must have shape {self.matrix_shape}, got {shape}")

        def product(factors: Cores) -> Tensor:
            u, s, v = self.frames(factors)
            seen = a.to(u.dtype).mT @ (u * s)
            return (seen * (v if b is None else b.to(u.dtype).mT @ v)).sum()

        dtype = point.values.dtype
        return self.egrad2rgrad(x, torch.func.grad(product)(point.factors(dtype)))

    # ---------------------------------------------------------------------------------------------- motion

    def retr(self, x: Factors, u: Factors) -> Cores:
        """Retract, to first order: outer cores to the polar factor of ``U_k + dU_k``, the center as it does."""
        return self._retract(*self._read(x, u)).factors(x[0].dtype)

    def _retract(self, x: Train, u: Train) -> Train:
        left, right = (chains.moved(cores, velocities) for cores, velocities in zip(x.sides, u.sides, strict=True))
        return Train.of(left, self.center.retr(x.center, u.center), right)

    def transp(self, x: Factors, y: Factors, v: Factors) -> Cores:
        """Projection transport: the tangent vector at ``y`` nearest to the dW of ``v``. Linear, not an isometry."""
        return self._transport(*self._read(x, y, v)).factors(x[0].dtype)

    def _transport(self, x: Train, y: Train, v: Train) -> Train:
        s, ds = x.values, v.values
        opened, ends = zip(*(contract(*sides) for sides in zip(y.sides, x.sides, v.sides, strict=True)), strict=True)
        (a, da), (b, db) = (seen[-1] for seen in opened)
        # Between the outer frames of y, dW is (a ds + da s) bᵀ + (a s) dbᵀ.
        center = self.center.tangent(y.center, (torch.cat((a * ds + da * s, a * s), 1), torch.cat((b, db), 1)))
        sides = []
        for side, (overlap, change) in enumerate(reversed(ends)):
            beyond = (overlap * ds + change * s).mT * y.values, (overlap * s).mT * y.values
            derivatives = outer_gradients(y.sides[side], x.sides[side], v.sides[side], opened[side], beyond)
            sides.append(riemannian(y.sides[side], y.values, derivatives))
        return Train.of(sides[0], center, sides[1])

    def retr_transp(self, x: Factors, u: Factors, v: Factors) -> tuple[Cores, Cores]:
        """Retract along ``u`` and carry ``v`` along by projection."""
        point, step, vector = self._read(x, u, v)
        target = self._retract(point, step)
        return target.factors(x[0].dtype), self._transport(point, target, vector).factors(x[0].dtype)

    # ------------------------------------------------------------------------------------- points and matrices

    def frames(self, x: Factors) -> Triplets:
        """The point as ``(U, s, V)``, shapes (m, r), (r,), (n, r): a point of `SVDSpectral`."""
        (point,) = self._read(x)
        return frame(point.left, self.out_modes), point.values, frame(point.right, self.in_modes)

    def embed(self, x: Factors) -> Tensor:
        """The matrix ``U diag(s) Vᵀ``, differentiable."""
        return self.center.embed(self.frames(x)).to(x[0].dtype)

    def project(self, matrix: Tensor) -> Cores:
        """A point near a matrix: TT-SVD from both ends to the middle, then the spectrum. Exact for points.

        For a free spectrum the error is at most sqrt(D + E - 1) times the least possible (Oseledets, SISC 2011,
        corollary 2.4). A weight of shape ``(out, ...)`` is the matrix (out, fan_in).
        """
        if matrix.ndim < 2 or (matrix.shape[0], math.prod(matrix.shape[1:])) != self.matrix_shape:
            raise ValueError(f"matrix must have shape {self.matrix_shape}, got {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{self}: a matrix with NaN or infinite entries has no projection")
        left, rest = chains.fit(matrix.to(_wide(matrix.dtype)).flatten(1), self._left)
        right, rest = chains.fit(rest.mT, self._right)
        return Train.of(left, self.center.project(rest.mT), right).factors(matrix.dtype)

    def projx(self, x: Factors) -> Cores:
        """A point near the matrix of any finite factors: that matrix itself, if its spectrum is allowed."""
        (point,) = self._read(x)
        if not all(bool(torch.isfinite(t).all()) for t in x):
            raise ValueError(f"{self}: factors with NaN or infinite entries have no projection")
        left, right = (chains.orthonormal(cores) for cores in point.sides)
        point = Train(left, point.values, right)
        return point.with_center(self.center.projx(point.center)).factors(x[0].dtype)

    def random(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Cores:
        """Frames from cores uniform on their Stiefel manifolds, and the spectrum's own spread of values."""
        dtype = dtype or torch.get_default_dtype()
        options: dict[str, Any] = {"dtype": _wide(dtype), "device": device, "generator": generator}
        left, right = (chains.random_outer(shapes, **options) for shapes in (self._left, self._right))
        center = self.center.random(self._left[-1][0], self._right[-1][0], **options)
        return Train.of(left, center, right).factors(dtype)

    def origin(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Cores:
        """A sparse point, of full ranks (`evenly_spread`), and the spectrum's own spread of values."""
        dtype = dtype or torch.get_default_dtype()
        options: dict[str, Any] = {"dtype": _wide(dtype), "device": device}
        left, right = (chains.evenly_spread(shapes, **options) for shapes in (self._left, self._right))
        return Train(left, self.center.spectrum.spread(self.center.rank, **options), right).factors(dtype)

    # --------------------------------------------------------------------------------------- gauge, checks

    def act(self, x: Factors, rotations: Sequence[Tensor]) -> Cores:
        """Another chain of cores for the same matrix; points and vectors alike.

        Args:
            x: a point or a tangent vector.
            rotations: an orthogonal (R_k, R_k) matrix for each bond, in the order of ``ranks``; the middle one is
                a group element of `SVDSpectral`.
        """
        (train,) = self._read(x)
        middle = len(self._left) - 1
        left = chains.rotate(train.left, rotations[:middle])
        right = chains.rotate(train.right, rotations[:middle:-1])
        train = Train(left, train.values, right)
        return train.with_center(self.center.act(train.center, rotations[middle])).factors(x[0].dtype)

    def canonical(self, x: Factors) -> Cores:
        """The same matrix from cores that do not depend on the gauge, so that two points can be compared.

        The leading R_k x R_k block of every outer core is upper triangular with a diagonal >= 0; s descends; and in
        each column of the last U core the entry of largest magnitude is positive. For `Identity` the last U core has
        a triangular block too, in place of the last two rules. Unique where leading blocks have full rank and,
        but for `Identity`, singular values are distinct.
        """
        (point,) = self._read(x)
        left, right = (chains.canonical(cores) for cores in point.sides)
        point = Train(left, point.values, right)
        center = chains.canonical_center(point.center, triangular=self.center.spectrum.skew_only)
        return point.with_center(center).factors(x[0].dtype)

    def _off_manifold(self, x: Factors, atol: float, rtol: float) -> str | None:
        slack = rounding(x)
        return why_no_point(self.center, *self._read(x), atol=atol + slack, rtol=rtol + slack)

    def _off_tangent(self, x: Factors, u: Factors, atol: float, rtol: float) -> str | None:
        return why_not_tangent(self.center, *self._read(x, u), atol=atol, rtol=rtol + rounding(x))


def _horizontal(x: Train, u: Train) -> Train:
    """The same velocity with none along the outer cores."""
    left, right = (chains.horizontal(cores, velocities) for cores, velocities in zip(x.sides, u.sides, strict=True))
    return Train(left, u.values, right)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the computation."""
    return torch.float32 if dtype in HALF else dtype
