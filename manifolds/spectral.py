"""Matrices of fixed rank under control of their singular values, as factored points (U, s, V)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from . import frames
from .embedded import EmbeddedManifold, Factors
from .low_rank import pair_weights, reciprocal, svd_of_product, svd_of_update
from .spectrum import SpectrumLike, as_spectrum
from .triplets import HALF, Triplets, as_dtype_of, check_rank, frame_error, in_dtype_of_computation, rounding

__all__ = ["SVDSpectral"]


class SVDSpectral(EmbeddedManifold):
    r"""Matrices :math:`W = U \operatorname{diag}(s) V^\top` of rank r with s in a given set, and the embedded metric.

    A point is a tuple (U, s, V) of shapes (m, r), (r,), (n, r): orthonormal columns, s >= 0 in any order. It
    stands for the matrix W of shape (m, n), ``embed(point)``, which no other verb forms. Permuting the columns of U
    and V together with s, and flipping the signs of two matching columns, changes the point and not W (`act`).

    A tangent vector is a tuple (dU, ds, dV) of the same shapes, which stands for the velocity
    dW = dU diag(s) Vᵀ + U diag(ds) Vᵀ + U diag(s) dVᵀ. The metric is that of the space of matrices, <dW, dW'>. Of
    all tuples with the same dW, verbs return one *normal form*: with M = Uᵀ dW V,

        (UᵀdU)_ij = M_ij s_j / (s_i² + s_j²),   (VᵀdV)_ji = M_ij s_i / (s_i² + s_j²),   ds_i = M_ii,

    off the diagonal, where the first two have zeros; the parts of dU and dV normal to U and V are those of
    dW V diag(1/s) and dWᵀ U diag(1/s). This is the split of least norm, smooth where singular values coincide (the
    velocities of an SVD are not). The spectrum restricts M: its diagonal to velocities that keep s in its set,
    and for `Identity` M to its skew-symmetric part.

    Half-precision factors are computed in float32 and returned in their own dtype. A NaN in a step is a
    LinAlgError of the retraction. A singular value that is zero has no normal velocity.

    Args:
        rank: r, at least 1; a ValueError where it exceeds min(m, n).
        spectrum: a `Spectrum` or its name: "identity", "free", "lipschitz", "bounded".
        retraction: ``"svd"``, the allowed matrix nearest to W + dW (second order; a 2r x 2r SVD), or ``"qr"``, the
            product of the moved factors U + dU, s + ds, V + dV (first order, faster). The latter adds dU diag(s) dVᵀ to
            W + dW, which is large where s is small: 1/s times the square of a normal velocity.

    Sources: Vandereycken, SIOPT 2013 (geometry of fixed rank); Absil, Oseledets, Comput. Optim. Appl. 2015
    (retractions); Obukhov et al., AISTATS 2021 (spectra).
    """

    name = "SVDSpectral"

    def __init__(self, rank: int, spectrum: SpectrumLike = "free", *, retraction: Literal["svd", "qr"] = "svd") -> None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an int, got {rank!r}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if retraction not in ("svd", "qr"):
            raise ValueError(f"retraction must be 'svd' or 'qr', got {retraction!r}")
        self.rank, self.spectrum, self.retraction = rank, as_spectrum(spectrum), retraction

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as plain values; optimizer state dicts hold them in place of the object."""
        spectrum = {"name": self.spectrum.name, "arguments": self.spectrum.arguments}
        return {"rank": self.rank, "spectrum": spectrum, "retraction": self.retraction}

    def __repr__(self) -> str:
        retraction = "" if self.retraction == "svd" else f", retraction={self.retraction!r}"
        return f"SVDSpectral({self.rank}, {self.spectrum}{retraction})"

    # ------------------------------------------------------------------------------------------ shapes, dtypes

    def dimension(self, shape: Sequence[Any]) -> int:
        """Dimension of the manifold, for ``(m, n)`` or the shapes of the three factors.

        r (m + n - r) for a free spectrum, one less for `Lipschitz`, r (m + n) - r (3 r + 1) / 2 for `Identity`.
        """
        m, n = map(int, (shape[0][0], shape[2][0]) if len(shape) == 3 else shape)
        check_rank(self.rank, m, n)
        r = self.rank
        middle = r * (r - 1) // 2 if self.spectrum.skew_only else r * (r - 1) + self.spectrum.dimension(r)
        return r * (m - r) + r * (n - r) + middle

    def _factors(self, point: Factors, *vectors: Factors) -> tuple[Triplets, ...]:
        return in_dtype_of_computation(self.rank, point, *vectors)

    # ------------------------------------------------------------------------------ metric, tangent vectors

    def inner(self, x: Factors, u: Factors, v: Factors | None = None) -> Tensor:
        """``<dW, dW'>``, a scalar, for any factor velocities, in normal form or not."""
        (left, s, right), *vectors = self._factors(x, u, u if v is None else v)
        (a, b), (c, d) = ((du * s + left * ds, dv * s) for du, ds, dv in vectors)  # dW = a Vᵀ + U bᵀ
        mixed = ((left.mT @ a) * (d.mT @ right)).sum() + ((b.mT @ right) * (left.mT @ c)).sum()
        return (a * c).sum() + (b * d).sum() + mixed

    def proju(self, x: Factors, u: Factors) -> Triplets:
        """Project any factor velocity: the normal form of the tangent vector nearest to its dW."""
        point, (du, ds, dv) = self._factors(x, u)
        left, s, right = point
        inside_u, inside_v = left.mT @ du, right.mT @ dv
        seen = reciprocal(s) != 0  # which columns have a weight in dW
        sides = (du * seen, inside_u * seen), (dv * seen, inside_v * seen)
        return as_dtype_of(x, self._vector(point, _middle(s, ds, inside_u, inside_v), *sides))

    def tangent(self, x: Factors, ambient: Tensor | tuple[Tensor, Tensor]) -> Triplets:
        """The tangent vector nearest to a matrix, given as (m, n) or as a pair (A, B) with ``ambient = A @ B.T``."""
        (point,) = self._factors(x)
        left, s, right = point
        parts = [t.to(s.dtype) for t in ([ambient] if isinstance(ambient, Tensor) else ambient)]
        shape = tuple(parts[0].shape) if len(parts) == 1 else (parts[0].shape[0], parts[1].shape[0])
        if shape != (left.shape[0], right.shape[0]):
            raise ValueError(f"ambient must have shape {(left.shape[0], right.shape[0])}, got {shape}")
        if len(parts) == 1:
            forward, backward = parts[0] @ right, parts[0].mT @ left
        else:
            a, b = parts
            forward, backward = a @ (b.mT @ right), b @ (a.mT @ left)
        middle, inverse = left.mT @ forward, reciprocal(s)
        sides = (forward * inverse, middle * inverse), (backward * inverse, middle.mT * inverse)
        return as_dtype_of(x, self._vector(point, middle, *sides))

    def egrad2rgrad(self, x: Factors, egrad: Factors) -> Triplets:
        """Riemannian gradient from the gradients of the factors, those of a function of W.

        With G the gradient with respect to W they are G V diag(s), diag(Uᵀ G V) and Gᵀ U diag(s). The first and the
        last both tell Uᵀ G V; it is their mean weighted by s_j² and s_i².
        """
        point, (gu, gs, gv) = self._factors(x, egrad)
        left, s, right = point
        inside_u, inside_v = left.mT @ gu, right.mT @ gv
        weights, inverse = pair_weights(s), reciprocal(s)
        middle = (inside_u * weights + inside_v.mT * weights.mT).diagonal_scatter(gs)
        sides = (
            ((gu * inverse).mul_(inverse), inside_u * inverse * inverse),  # 1 / s² itself may overflow
            ((gv * inverse).mul_(inverse), inside_v * inverse * inverse),
        )
        return as_dtype_of(x, self._vector(point, middle, *sides))

    def _vector(
        self, point: Triplets, middle: Tensor, forward: tuple[Tensor, Tensor], backward: tuple[Tensor, Tensor]
    ) -> Triplets:
        """The normal form of the tangent vector nearest to a matrix Z.

        It comes as ``middle`` = Uᵀ Z V, ``forward`` = (Z V diag(1/s), Uᵀ times that) and ``backward`` =
        (Zᵀ U diag(1/s), Vᵀ times that). The two large matrices are overwritten.
        """
        left, s, right = point
        if self.spectrum.skew_only:
            middle = (middle - middle.mT) / 2
        weights = pair_weights(s)
        du = forward[0].addmm_(left, middle * weights - forward[1])
        dv = backward[0].addmm_(right, middle.mT * weights - backward[1])
        return du, self.spectrum.constrain(s, middle.diagonal()), dv

    # ---------------------------------------------------------------------------------------------- motion

    def retr(self, x: Factors, u: Factors) -> Triplets:
        """Retract along any factor velocity; columns keep their signs, ``s`` comes out descending."""
        return as_dtype_of(x, self._retract(*self._factors(x, u)))

    def _retract(self, point: Triplets, u: Triplets) -> Triplets:
        (left, s, right), (du, ds, dv) = point, u
        if self.retraction == "qr":
            return self._allowed(svd_of_product(left + du, s + ds, right + dv, near_orthonormal=True), point)
        inside_u, inside_v = left.mT @ du, right.mT @ dv
        normal_u = torch.addmm(du, left, inside_u, alpha=-1).mul_(s)
        normal_v = torch.addmm(dv, right, inside_v, alpha=-1).mul_(s)
        middle = torch.diag(s) + _middle(s, ds, inside_u, inside_v)
        return self._allowed(svd_of_update(left, middle, right, normal_u, normal_v), point)

    def _allowed(self, triplets: Triplets, old: Triplets) -> Triplets:
        """Singular values put into the set; columns turned, where W does not see it, towards the old ones."""
        left, s, right = triplets
        if self.spectrum.skew_only:
            turn = frames.polar_factor(left.mT @ old[0], False)
            left, right = left @ turn, right @ turn
        else:
            sign = torch.where((left * old[0]).sum(0) < 0, -1.0, 1.0).to(s.dtype)
            left, right = left * sign, right * sign
        return left, self.spectrum.project(s), right

    def transp(self, x: Factors, y: Factors, v: Factors) -> Triplets:
        """Projection transport: the tangent vector at ``y`` nearest to the dW of ``v``. Linear, not an isometry."""
        (old, vector), (new,) = self._factors(x, v), self._factors(y)
        return as_dtype_of(y, self._transport(old, new, vector))

    def _transport(self, old: Triplets, new: Triplets, v: Triplets) -> Triplets:
        (left, s, right), (du, ds, dv), inverse = old, v, reciprocal(new[1])
        seen_left, seen_right, seen_du, seen_dv = left.mT @ new[0], right.mT @ new[2], du.mT @ new[0], dv.mT @ new[2]
        s, ds = s.unsqueeze(-1), ds.unsqueeze(-1)
        turned_left, turned_right = ds * seen_left + s * seen_du, ds * seen_right + s * seen_dv
        middle = seen_left.mT @ turned_right + seen_du.mT @ (s * seen_right)
        forward = (du @ (s * seen_right * inverse)).addmm_(left, turned_right * inverse)
        backward = (dv @ (s * seen_left * inverse)).addmm_(right, turned_left * inverse)
        return self._vector(new, middle, (forward, middle * inverse), (backward, middle.mT * inverse))

    def retr_transp(self, x: Factors, u: Factors, v: Factors) -> tuple[Triplets, Triplets]:
        """Retract along ``u`` and carry ``v`` along by projection."""
        point, step, vector = self._factors(x, u, v)
        new = self._retract(point, step)
        return as_dtype_of(x, new), as_dtype_of(x, self._transport(point, new, vector))

    # ---------------------------------------------------------------------------------------- points, checks

    def embed(self, x: Factors) -> Tensor:
        """The matrix ``U diag(s) Vᵀ``, differentiable."""
        u, s, v = x
        return (u * s) @ v.mT

    def projx(self, x: Factors) -> Triplets:
        """The point nearest to ``U diag(s) Vᵀ`` for any finite factors; signs of ``s`` go into U."""
        (factors,) = self._factors(x)
        if not all(bool(torch.isfinite(t).all()) for t in factors):
            raise ValueError(f"{self}: factors with NaN or infinite entries have no projection")
        return as_dtype_of(x, self._allowed(svd_of_product(*factors), factors))

    def project(self, matrix: Tensor) -> Triplets:
        """The point nearest to a matrix: truncated SVD, with its singular values put into the set.

        A weight of shape ``(out, ...)`` is the matrix (out, fan_in).
        """
        if matrix.ndim < 2:
            raise ValueError(f"matrix must have two or more dimensions, got shape {tuple(matrix.shape)}")
        dense = matrix.reshape(matrix.shape[0], -1)
        check_rank(self.rank, *dense.shape)
        if not bool(torch.isfinite(dense).all()):
            raise ValueError(f"{self}: a matrix with NaN or infinite entries has no projection")
        u, s, vt = torch.linalg.svd(dense.float() if dense.dtype in HALF else dense, full_matrices=False)
        r = self.rank
        point = u[:, :r].contiguous(), self.spectrum.project(s[:r]), vt[:r].mT.contiguous()
        return cast(Triplets, tuple(t.to(matrix.dtype) for t in point))

    def random(
        self,
        m: int,
        n: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Triplets:
        """Frames uniform on their Stiefel manifolds, and the spectrum's own spread of values."""
        check_rank(self.rank, m, n)
        dtype = dtype or torch.get_default_dtype()
        wide = torch.float32 if dtype in HALF else dtype
        draws = [torch.randn(d, self.rank, dtype=wide, device=device, generator=generator) for d in (m, n)]
        left, right = (frames.householder_q(draw, False).to(dtype) for draw in draws)
        return left, self.spectrum.spread(self.rank, dtype=dtype, device=device), right

    def origin(
        self, m: int, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Triplets:
        """The first columns of the identity matrices, and the spectrum's own spread of values."""
        check_rank(self.rank, m, n)
        left, right = (torch.eye(d, self.rank, dtype=dtype, device=device) for d in (m, n))
        return left, self.spectrum.spread(self.rank, dtype=dtype, device=device), right

    def act(self, x: Factors, q: Tensor) -> Triplets:
        """Another factorization of the same matrix: ``(U Q, diag(Qᵀ diag(s) Q), V Q)``.

        Points: ``q`` is a signed permutation of shape (r, r), or any orthogonal matrix that commutes with diag(s).
        Vectors in the same way, by signed permutations, and by every orthogonal matrix for `Identity`.
        """
        ((u, s, v),) = self._factors(x)
        q = q.to(s.dtype)
        return as_dtype_of(x, (u @ q, (q.square() * s.unsqueeze(-1)).sum(0), v @ q))

    def _off_manifold(self, x: Factors, atol: float, rtol: float) -> str | None:
        ((u, s, v),) = self._factors(x)
        allowed = atol + rounding(x)
        for name, frame in (("U", u), ("V", v)):
            worst = frame_error(frame)
            if not worst <= allowed:
                return f"{name}ᵀ{name} - I reaches {worst:.3g}, allowed {allowed:.3g}"
        return self.spectrum.contains(s, atol + (rtol + rounding(x)) * float(s.detach().abs().amax()))[1]

    def _off_tangent(self, x: Factors, u: Factors, atol: float, rtol: float) -> str | None:
        point, vector = self._factors(x, u)
        allowed = atol + (rtol + rounding(x)) * float(self.norm(point, vector).detach())
        weights = point[1], torch.ones_like(point[1]), point[1]  # of a column in dW
        defects = zip(("dU", "ds", "dV"), vector, self.proju(point, vector), weights, strict=True)
        for name, given, normal, weight in defects:
            worst = float(((given - normal) * weight).detach().abs().amax())
            if not worst <= allowed:
                return f"{name} is {worst:.3g} off the normal form of a tangent vector, allowed {allowed:.3g}"
        return None


def _middle(s: Tensor, ds: Tensor, inside_u: Tensor, inside_v: Tensor) -> Tensor:
    """Uᵀ dW V of a factor velocity with ``inside_u`` = Uᵀ dU and ``inside_v`` = Vᵀ dV."""
    return torch.diag(ds) + inside_u * s + s.unsqueeze(-1) * inside_v.mT
