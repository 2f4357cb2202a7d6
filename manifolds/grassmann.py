"""Subspaces, each given by an orthonormal basis of it: the rows or the columns of a matrix, as network weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import frames
from .stiefel import Stiefel, _at_most, _rounding

__all__ = ["Grassmann"]

_RETRACTIONS = ("polar", "qr")


class Grassmann(Stiefel):
    r"""Grassmann manifold: matrices :math:`X^\top X = I_p` of shape (n, p) modulo :math:`X \sim XQ, Q \in O(p)`.

    A point is a point of `Stiefel`, from which shapes, batches, dtypes, moves and membership come: a weight ``(out,
    ...)`` is one matrix ``(out, fan_in)``, whose rows span the subspace when ``out <= fan_in``, its columns
    otherwise (a square one spans everything: dimension 0). Bases of one subspace are one point. A tangent vector is a
    tensor of the weight's shape with ``XᵀU = 0`` (horizontal), and turns with the basis. The metric is the sum of
    the products of entries; a geodesic of Stiefel with a horizontal velocity is a geodesic here.

    Every verb is equivariant under `act`; ``retraction="qr"`` up to the choice of a basis.

    Args:
        retraction: both move to the span of ``x + u``, a second-order retraction. ``"polar"`` gives its basis that is
            nearest to ``x``, in which transport is one projection; it synchronises a GPU. ``"qr"`` gives another one
            in half the time, for optimizers that transport nothing (`retract.optim.RiemannianGD`).
        batched: whether leading dimensions are a batch.

    Sources: Edelman, Arias, Smith, SIMAX 1998, section 2.5; Bendokat, Zimmermann, Absil, "A Grassmann manifold
    handbook", Adv. Comput. Math. 2024 (logarithm: Algorithm 5.3).
    """

    name = "Grassmann"

    def __init__(self, retraction: Literal["polar", "qr"] = "polar", *, batched: bool = False) -> None:
        if retraction not in _RETRACTIONS:
            raise ValueError(f"retraction must be one of {', '.join(_RETRACTIONS)}, got {retraction!r}")
        super().__init__(retraction, batched=batched)
        # A QR basis is turned against the old one, and so must transported vectors be: that is no projection.
        self.projects_linearly = retraction == "polar"

    def __repr__(self) -> str:
        defaults = {"retraction": "polar", "batched": False}
        shown = (f"{key}={value!r}" for key, value in self.arguments.items() if value != defaults[key])
        return f"Grassmann({', '.join(shown)})"

    __str__ = __repr__

    def dimension(self, shape: Sequence[int]) -> int:
        """Dimension of the manifold: ``p (n - p)`` for each matrix."""
        *batch, rows, columns = self._matrix_shape(shape)
        p = min(rows, columns)
        return math.prod(batch) * p * (max(rows, columns) - p)

    # ------------------------------------------------------------------------------------ bases of a subspace

    def act(self, x: Tensor, turn: Tensor) -> Tensor:
        """Another basis of the subspace, ``x Q``, or a tangent vector as seen from there.

        Args:
            x: weight or tangent vector.
            turn: orthogonal ``Q``, shape (p, p), or (batch, p, p).
        """
        rows, (a,) = self._matrices(x)
        p = min(a.shape[-2:])
        if turn.shape[-2:] != (p, p):
            raise ValueError(
                f"turn must have shape (..., {p}, {p}) for shape {tuple(x.shape)}, got {tuple(turn.shape)}"
            )
        square = turn if turn.ndim == 2 else turn.reshape(-1, p, p)
        return frames.mix(a, square.to(a), rows).reshape(x.shape).to(x.dtype)

    def embed(self, x: Tensor) -> Tensor:
        """The projector on the subspace over the root of 2, ``XXᵀ / √2``: shape (n, n), or (batch, n, n).

        The same for every basis, and an isometry onto its image: what the subspace is in a Euclidean space.
        """
        rows, (a,) = self._matrices(x)
        projector = a.mT @ a if rows else a @ a.mT
        batch = x.shape[:-2] if self.batched else ()
        return (projector / math.sqrt(2)).reshape(*batch, *projector.shape[-2:])

    # ------------------------------------------------------------------------------------------ tangent vectors

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Remove the vertical part, along the subspace: ``u - x xᵀu``."""
        rows, (a, b) = self._matrices(x, u)
        return _horizontal(a, b, rows).view(x.shape).to(x.dtype)

    def horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        """Horizontal part of an ambient vector: `proju`, under the quotient's name."""
        return self.proju(x, u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Projection transport: turn ``v`` with the basis nearest to ``x``'s, then project. Shrinks ``v``.

        It depends on the subspaces alone, but where they hold orthogonal directions: there it is one of several.
        """
        rows, (a, b, c) = self._matrices(x, y, v)
        return _carry(a, b, c, rows).view(x.shape).to(x.dtype)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retract along ``u`` and carry ``v`` along by projection."""
        rows, (a, b, c) = self._matrices(x, u, v)
        y = self._retract(a, b, rows)
        # The polar basis is the one nearest to x's already.
        moved = _horizontal(y, c, rows) if self.projects_linearly else _carry(a, y, c, rows)
        return y.view(x.shape).to(x.dtype), moved.view(x.shape).to(x.dtype)

    # ------------------------------------------------------------------------------------- logarithm, distance

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic along horizontal ``u``, each principal direction by its angle (Edelman et al., eq. 2.65); float64.

        That of `Stiefel` is the same, but torch's matrix exponential is right to 1e-10 only.
        """
        rows, (a, b) = self._matrices(x, u)
        left, angles, right = torch.linalg.svd((b.mT if rows else b).double(), full_matrices=False)
        stay = frames.mix(a.double(), right.mT @ (angles.cos().unsqueeze(-1) * right), rows)
        turn = frames.mix(left.mT if rows else left, angles.sin().unsqueeze(-1) * right, rows)
        return frames.polish(stay + turn, rows).view(x.shape).to(x.dtype)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Shortest tangent vector at ``x`` whose geodesic reaches the span of ``y``; one of them if several do."""
        rows, (a, b) = self._matrices(x, y)
        left, cosines, right = torch.linalg.svd(frames.gram(a, b, rows))
        # Principal vectors: y's, less their part along x's, are orthogonal and as long as the sines.
        normal = frames.mix(b, right.mT, rows) - frames.mix(a, left * cosines.unsqueeze(-2), rows)
        sines = torch.linalg.vector_norm(normal, dim=-1 if rows else -2)
        stretch = torch.where(sines > 0, torch.atan2(sines, cosines) / sines, torch.ones_like(sines))
        moved = frames.mix(normal, stretch.unsqueeze(-1) * left.mT, rows)
        return _horizontal(a, moved, rows).view(x.shape).to(x.dtype)

    def angles(self, x: Tensor, y: Tensor) -> Tensor:
        """Principal angles in radians, ascending in [0, pi/2], shape (p,) or (batch, p); accurate at both ends."""
        rows, (a, b) = self._matrices(x, y)
        cosines = torch.linalg.svdvals(frames.gram(a, b, rows))
        sines = torch.linalg.svdvals(_horizontal(a, b, rows)).flip(-1)
        batch = x.shape[:-2] if self.batched else ()
        return torch.atan2(sines, cosines).reshape(*batch, -1)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance, the root of the sum of squared `angles`: a scalar, or one value for each matrix."""
        distance: Tensor = torch.linalg.vector_norm(self.angles(x, y), dim=-1)
        return distance.reshape(*distance.shape, *[1] * (x.ndim - distance.ndim)) if keepdim else distance

    # ------------------------------------------------------------------------------------------------- checks

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        rows, (a, b) = self._matrices(x, u)
        longest = float(torch.linalg.vector_norm(b.detach(), dim=-1 if rows else -2).amax())
        return _at_most(frames.gram(a, b, rows).abs(), atol + (rtol + _rounding(x)) * longest, "XᵀU")


def _horizontal(x: Tensor, u: Tensor, rows: bool) -> Tensor:
    return frames.add_mix(u, x, frames.gram(x, u, rows), rows, alpha=-1.0)


def _carry(x: Tensor, y: Tensor, v: Tensor, rows: bool) -> Tensor:
    turn = frames.svd_polar_factor(frames.gram(x, y, rows), False)
    return _horizontal(y, frames.mix(v, turn, rows), rows)
