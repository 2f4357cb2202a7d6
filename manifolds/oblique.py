"""Tensors whose slices are unit vectors: filters on spheres.

Own code, not geoopt's: its Sphere knows the last dimension only. The geometry is that of `PSI` at norm one,
which is called here; what differs is that the norms are a constraint, restored at every move, not a gauge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from .psi import PSI

__all__ = ["Oblique"]


class Oblique(geoopt.Manifold):  # type: ignore[misc]  # geoopt is untyped
    r"""Oblique manifold :math:`\prod_i S^{d-1}`: every slice along ``dim`` has Frobenius norm 1.

    A point is a tensor of any shape, a tangent vector one of the same shape, orthogonal to the point in every
    slice. Half-precision weights are computed in float32 and returned in their own dtype.

    Args:
        dim: the dimension whose slices are unit vectors: 0 for the filters of convolutions and linear layers,
            1 for the columns of a matrix.

    Source: Absil, Gallivan, "Joint diagonalization on the oblique manifold", ICASSP 2006.
    """

    name = "Oblique"
    reversible = False
    ndim = 2

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self._cone = PSI(dim)

    @property
    def arguments(self) -> dict[str, int]:
        """Constructor arguments as plain values; optimizer state dicts hold them in place of the object."""
        return {"dim": self.dim}

    def __repr__(self) -> str:
        return f"Oblique(dim={self.dim})"

    __str__ = __repr__

    def dimension(self, shape: Sequence[int]) -> int:
        """Dimension of the manifold: entries less slices."""
        self._assert_check_shape(tuple(shape), "shape")
        return self._cone.dimension(shape)

    # ------------------------------------------------------------------------------ metric, tangent vectors

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Sum of the products of entries. A scalar (all dimensions 1 if kept)."""
        return self._cone.inner(x, u, v, keepdim=keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The summands of `inner` by slice, each spread over its slice: a tensor of the weight's shape."""
        return self._cone.component_inner(x, u, v)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Remove the radial part in each slice."""
        return self._cone.proju(x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient: the projection of the Euclidean one."""
        return self.proju(x, u)

    def angles(self, x: Tensor, y: Tensor) -> Tensor:
        """Angle in radians between matching slices, accurate near 0 and pi."""
        return self._cone.angles(x, y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance: the root of the sum of squared angles."""
        return self._cone.dist(x, y, keepdim=keepdim)

    # ---------------------------------------------------------------------------------------------- motion

    def projx(self, x: Tensor) -> Tensor:
        """Normalize each slice: the nearest point."""
        norms = self._cone.norms(x)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError(f"{self}: a slice that is zero or not finite has no projection")
        return self._normalized(x)

    def _normalized(self, x: Tensor) -> Tensor:
        view, _ = self._cone.scale_view(x)
        return (view / self._cone.norms(x)).reshape(x.shape).to(x.dtype)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Second-order retraction: normalize ``x + u``."""
        return self._normalized(x + u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Great circles from ``x`` along tangent ``u``, each of length |u_i| radians."""
        return self._normalized(self._cone.expmap(x, u))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Tangent vector at ``x`` whose geodesic reaches ``y``; NaN in a slice that is antipodal."""
        return self._cone.logmap(x, y)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of ``v`` along the shortest geodesic, an isometry; NaN in an antipodal slice."""
        return self._cone.transp(x, y, v)

    # ---------------------------------------------------------------------------------------- points, checks

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **_: Any,
    ) -> Tensor:
        """A point uniform on the product of spheres."""
        gaussian = torch.randn(*size, dtype=dtype, device=device, generator=generator)
        self._assert_check_shape(gaussian.shape, "size")
        point: Tensor = geoopt.ManifoldTensor(self._normalized(gaussian), manifold=self)
        return point

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """The point whose slices are constant (``seed`` is geoopt's, not used)."""
        ones = torch.ones(*size, dtype=dtype, device=device)
        self._assert_check_shape(ones.shape, "size")
        point: Tensor = geoopt.ManifoldTensor(self._normalized(ones), manifold=self)
        return point

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        try:
            slices = self._cone.num_scales(shape)
        except ValueError:
            return (
                False,
                f"{name}: {self} needs a tensor that has dimension {self.dim}, got shape {tuple(shape)}",
            )
        if self._cone.dimension(shape) < max(slices, 1):
            return False, f"{name}: {self} needs slices of two or more entries, got shape {tuple(shape)}"
        return True, None

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        worst = float((self._cone.norms(x.detach()) - 1).abs().amax())
        allowed = atol + rtol + torch.finfo(x.dtype).eps
        if not worst <= allowed:  # NaN too
            return False, f"a slice norm is {worst:.3g} from 1, allowed {allowed:.3g}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        rtol = rtol + torch.finfo(x.dtype).eps
        ok, reason = self._cone.check_vector_on_tangent(
            x.detach(), u.detach(), ok_point=True, explain=True, atol=atol, rtol=rtol
        )
        return ok, reason
