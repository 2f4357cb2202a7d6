"""Matrices with orthonormal rows or columns, as network weights.

Own code, not geoopt's: that reads a convolution weight as out * in separate 3x3 matrices, refuses wide ones
and bfloat16, and pays a column-major Householder QR for every step, however short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import geoopt
import torch
from torch import Tensor

from . import frames

__all__ = ["Stiefel"]

Retraction = Literal["qr", "polar", "cayley"]
_RETRACTIONS = ("qr", "polar", "cayley")
_HALF = (torch.float16, torch.bfloat16)


class Stiefel(geoopt.Manifold):  # type: ignore[misc]  # geoopt is untyped
    r"""Stiefel manifold with the Euclidean metric: :math:`\{X \in \mathbb{R}^{n \times p} : X^\top X = I\}`.

    A weight of shape ``(out, ...)`` with at least two dimensions is one matrix ``(out, fan_in)``, whatever
    its kernel; its rows are orthonormal when ``out <= fan_in``, its columns otherwise. ``batched=True`` reads
    the last two dimensions as the matrix and the others as a batch. A tangent vector has the weight's shape.
    Half-precision weights are computed in float32; results have the dtype of the point and are contiguous.

    Args:
        retraction: ``"qr"`` (first order, fastest), ``"polar"`` (second order, nearest to ``x + u``; it
            synchronises a GPU) or ``"cayley"`` (first order, a rotation;
            in float32 for steps of norm up to 100: its p x p system squares their length).
        batched: whether leading dimensions are a batch.

    Sources: Edelman, Arias, Smith, SIMAX 1998 (geometry); Absil, Mahony, Sepulchre 2008, section 4.1 (QR,
    polar); Wen, Yin, Math. Program. 2013 (Cayley).
    """

    name = "Stiefel"
    ndim = 2
    reversible = False

    #: ``egrad2rgrad`` and ``transp`` are both the linear ``proju`` at the new point, so one projection does
    #: for momentum and gradient: proju(y, mu * v + g) = mu * transp(x, y, v) + egrad2rgrad(y, g).
    projects_linearly = True

    def __init__(self, retraction: Retraction = "qr", *, batched: bool = False) -> None:
        super().__init__()
        if retraction not in _RETRACTIONS:
            raise ValueError(f"retraction must be one of {', '.join(_RETRACTIONS)}, got {retraction!r}")
        if not isinstance(batched, bool):
            raise TypeError(f"batched must be a bool, got {batched!r}")
        self.retraction, self.batched = retraction, batched

    @property
    def arguments(self) -> dict[str, str | bool]:
        """Constructor arguments as plain values; optimizer state dicts hold them in place of the object."""
        return {"retraction": self.retraction, "batched": self.batched}

    def __repr__(self) -> str:
        defaults = {"retraction": "qr", "batched": False}
        shown = (f"{key}={value!r}" for key, value in self.arguments.items() if value != defaults[key])
        return f"Stiefel({', '.join(shown)})"

    __str__ = __repr__

    # ------------------------------------------------------------------------------- the weight as a matrix

    def _matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(out, fan_in) of a weight, or (batch, m, n)."""
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"{self} needs a non-empty weight of two or more dimensions, got shape {tuple(shape)}")
        if not self.batched:
            return (shape[0], math.prod(shape[1:]))
        return tuple(shape) if len(shape) == 2 else (math.prod(shape[:-2]), *shape[-2:])

    def _matrices(self, x: Tensor, *vectors: Tensor) -> tuple[bool, list[Tensor]]:
        """Whether the rows are the frame; point and vectors as matrices in the dtype of the computation."""
        if not x.is_floating_point():
            raise TypeError(f"{self} needs a real floating-point weight, got dtype {x.dtype}")
        shape = self._matrix_shape(x.shape)
        for u in vectors:
            if u.shape != x.shape:
                raise ValueError(f"vector has shape {tuple(u.shape)}, the weight has {tuple(x.shape)}; they must agree")
        dtype = torch.float32 if x.dtype in _HALF else x.dtype
        return shape[-2] <= shape[-1], [t.to(dtype).reshape(shape) for t in (x, *vectors)]

    def dimension(self, shape: Sequence[int]) -> int:
        """Dimension of the manifold: ``n p - p (p + 1) / 2`` for each matrix."""
        *batch, rows, columns = self._matrix_shape(shape)
        p = min(rows, columns)
        return math.prod(batch) * (rows * columns - p * (p + 1) // 2)

    # ------------------------------------------------------------------------------ metric, tangent vectors

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Sum of the products of entries: a scalar, or one value for each matrix of a batch."""
        _, (_, a, b) = self._matrices(x, u, u if v is None else v)
        total = (a * b).sum((-2, -1))
        batch = x.shape[:-2] if self.batched else ()
        kept = [1] * (x.ndim - len(batch)) if keepdim else []
        return total.reshape([*batch, *kept])

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Nearest tangent vector: ``u - x sym(xᵀu)``."""
        rows, (a, b) = self._matrices(x, u)
        return _proju(a, b, rows).view(x.shape).to(x.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient: the projection of the Euclidean one."""
        return self.proju(x, u)

    # ---------------------------------------------------------------------------------------------- motion

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point of the manifold to any finite ``x`` (polar factor); one of them if several are."""
        rows, (a,) = self._matrices(x)
        if not bool(torch.isfinite(a).all()):
            raise ValueError(f"{self}: a weight with NaN or infinite entries has no projection")
        return frames.svd_polar_factor(a, rows).view(x.shape).to(x.dtype)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract along tangent ``u`` of any length. NaN gives NaN or LinAlgError."""
        rows, (a, b) = self._matrices(x, u)
        return self._retract(a, b, rows).view(x.shape).to(x.dtype)

    def _retract(self, x: Tensor, u: Tensor, rows: bool) -> Tensor:
        if self.retraction == "qr":
            return frames.q_factor(x + u, rows)
        if self.retraction == "polar":
            return frames.polar_factor(x + u, rows)
        return _cayley(x, u, rows)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Projection transport: the nearest tangent vector at ``y``. Linear, not an isometry."""
        return self.proju(y, v)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retract along ``u`` and carry ``v`` along by projection."""
        rows, (a, b, c) = self._matrices(x, u, v)
        y = self._retract(a, b, rows)
        return y.view(x.shape).to(x.dtype), _proju(y, c, rows).view(x.shape).to(x.dtype)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic of the Euclidean metric along tangent ``u`` (Edelman et al., eq. 2.42), in float64."""
        rows, (a, b) = self._matrices(x, u)
        return _geodesic(a.double(), b.double(), rows).view(x.shape).to(x.dtype)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Not offered: it has no closed form."""
        raise NotImplementedError(f"{self} has no closed-form logmap; it offers expmap, retr and proju")

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Not offered: it has no closed form."""
        raise NotImplementedError(f"{self} has no closed-form dist; it offers expmap, and norm of x - y in the space")

    # ---------------------------------------------------------------------------------------- points, checks

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **_: Any,
    ) -> Tensor:
        """A point uniform on the manifold (Haar measure): the Q factor of a Gaussian matrix."""
        weight = torch.randn(*size, dtype=dtype, device=device, generator=generator)
        rows, (a,) = self._matrices(weight)
        point = frames.householder_q(a, rows).view(weight.shape).to(weight.dtype)
        tensor: Tensor = geoopt.ManifoldTensor(point, manifold=self)
        return tensor

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """The first rows or columns of the identity matrix (``seed`` is geoopt's, not used)."""
        weight = torch.zeros(*size, dtype=dtype, device=device)
        weight.view(self._matrix_shape(weight.shape)).diagonal(dim1=-2, dim2=-1).fill_(1)
        tensor: Tensor = geoopt.ManifoldTensor(weight, manifold=self)
        return tensor

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        try:
            self._matrix_shape(shape)
        except ValueError as error:
            return False, f"{name}: {error}"
        return True, None

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        rows, (a,) = self._matrices(x)
        products = frames.gram(a, a, rows)
        return _at_most((products - frames.identity_like(products)).abs(), atol + _rounding(x), "XᵀX - I")

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        rows, (a, b) = self._matrices(x, u)
        products = frames.gram(a, b, rows)
        longest = float(torch.linalg.vector_norm(b.detach(), dim=-1 if rows else -2).amax())
        return _at_most((products + products.mT).abs(), atol + (rtol + _rounding(x)) * longest, "XᵀU + UᵀX")


def _proju(x: Tensor, u: Tensor, rows: bool) -> Tensor:
    products = frames.gram(x, u, rows)
    return frames.add_mix(u, x, products + products.mT, rows, alpha=-0.5)


def _cayley(x: Tensor, u: Tensor, rows: bool) -> Tensor:
    """Cayley transform ``(I - W/2)⁻¹(I + W/2) x`` of the skew n x n matrix W with ``W x = u``.

    Woodbury's 2p x 2p system has equal diagonal blocks and folds once more, into a p x p one. With A = xᵀu
    and N = u - xA, the part of u normal to the span of x, the result is -x + (2x + N)(I - A/2 + NᵀN/4)⁻¹. The
    matrix inverted has symmetric part >= I. A rotation keeps the error x came with, so `polish` ends it.
    """
    turn = frames.gram(x, u, rows)
    normal = frames.add_mix(u, x, turn, rows, alpha=-1.0)
    system = frames.identity_like(turn) - turn / 2 + frames.gram(normal, normal, rows) / 4
    moved = frames.add_mix(x, normal.add(x, alpha=2), torch.linalg.inv_ex(system).inverse, rows, alpha=1.0, beta=-1.0)
    return frames.polish(moved, rows)


def _geodesic(x: Tensor, u: Tensor, rows: bool) -> Tensor:
    """``[x, u/t] exp([[A, -S/t], [t I, A]]) [I; 0] exp(-A)`` with A = xᵀu, S = uᵀu; t = |u| balances it."""
    turn = frames.gram(x, u, rows)
    length = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
    length = torch.where(length > 0, length, torch.ones_like(length))
    scaled_eye = length * frames.identity_like(turn)
    top = torch.cat((turn, -frames.gram(u, u, rows) / length), dim=-1)
    bottom = torch.cat((scaled_eye, turn), dim=-1)
    p = turn.shape[-1]
    flow = torch.matrix_exp(torch.cat((top, bottom), dim=-2))[..., :p] @ torch.matrix_exp(-turn)
    moved = frames.mix(x, flow[..., :p, :], rows) + frames.mix(u / length, flow[..., p:, :], rows)
    return frames.polish(moved, rows)


def _rounding(x: Tensor) -> float:
    """What storing a unit vector in half precision costs its products; nothing for the wider types."""
    return 2 * torch.finfo(x.dtype).eps if x.dtype in _HALF else 0.0


def _at_most(error: Tensor, allowed: float, what: str) -> tuple[bool, str | None]:
    worst = float(error.detach().amax())
    return (True, None) if worst <= allowed else (False, f"{what} reaches {worst:.3g}, allowed {allowed:.3g}")
