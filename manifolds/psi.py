"""The quotient of weights by positive rescaling (Yi, UAI 2022): where a weight that feeds a normalisation lives.

A scale group is a set of entries that one positive factor rescales without changing the network: a filter
before BatchNorm, the filters that share a GroupNorm block, a whole weight before LayerNorm. With metric (6) of
the paper the quotient is isometric to a product of unit spheres, one per scale group; everything here is
that product of spheres, written for a representative of any norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

__all__ = ["PSI"]

_HALF = (torch.float16, torch.bfloat16)


class PSI(geoopt.Manifold):  # type: ignore[misc]  # geoopt is untyped
    r"""Positively scale-invariant weights: :math:`\prod_i (\mathbb{R}^{d_i} \setminus \{0\}) / \mathbb{R}_+`.

    A point is a weight tensor of any shape and any norms; two tensors are the same point when each scale group
    of one is a positive multiple of the other's. A tangent vector is a tensor of the weight's shape, orthogonal
    to the weight within each scale group (horizontal), and scales with the weight.

    Args:
        dim: the dimension whose slices are filters (0 for convolutions and linear layers).
        groups: ``None`` for one scale per slice (BatchNorm, InstanceNorm); ``k`` for ``k`` contiguous blocks of
            slices, one scale each (GroupNorm with ``k`` groups); ``1`` for one scale in all (LayerNorm).
        conv_groups: groups of a transposed convolution. Its weight ``(in, out/g, kH, kW)`` is read as
            ``(g, in/g, out/g, kH, kW)``, and its filters are the slices along ``(g, out/g)``; use ``dim=1``.

    Raises:
        ValueError: an argument that no weight could have. A shape that does not fit is reported when first met.

    Source: Yi, "Accelerating Training of Batch Normalization: A Manifold Perspective", Def. 1, eqs. (6)-(8).
    """

    name = "PSI"
    reversible = False
    ndim = 0  # geoopt checks shapes of at least so many dimensions; ours are checked by `scale_view`

    def __init__(self, dim: int = 0, groups: int | None = None, conv_groups: int = 1) -> None:
        super().__init__()
        for argument, value in (("groups", groups), ("conv_groups", conv_groups)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{argument} must be a positive integer, got {value!r}")
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise ValueError(f"dim must be an integer, got {dim!r}")
        if conv_groups > 1 and dim != 1:
            raise ValueError(f"conv_groups={conv_groups} needs dim=1 (a transposed convolution), got dim={dim}")
        self.dim, self.groups, self.conv_groups = dim, groups, conv_groups

    @property
    def arguments(self) -> dict[str, int | None]:
        """Constructor arguments as plain values; optimizer state dicts hold them in place of the object."""
        return {"dim": self.dim, "groups": self.groups, "conv_groups": self.conv_groups}

    def __repr__(self) -> str:
        extra = "" if self.groups is None else f", groups={self.groups}"
        extra += "" if self.conv_groups == 1 else f", conv_groups={self.conv_groups}"
        return f"PSI(dim={self.dim}{extra})"

    __str__ = __repr__

    # ---------------------------------------------------------------------------------------- scale groups

    def scale_view(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """View ``x`` so that each scale group is what remains after reducing over the returned dimensions.

        Returns:
            A view of ``x`` (never a copy) and the dimensions to reduce, at least one.

        Raises:
            ValueError: ``dim`` is out of range, or ``groups`` or ``conv_groups`` does not divide the shape.
        """
        if not -x.ndim <= self.dim < x.ndim:
            raise ValueError(f"{self} needs a tensor that has dimension {self.dim}, got shape {tuple(x.shape)}")
        dim = self.dim % x.ndim
        scales: tuple[int, ...] = (dim,)
        view = x
        if self.conv_groups > 1:
            view = self._split(view, 0, self.conv_groups, "conv_groups")
            dim, scales = 2, (0, 2)
        if self.groups is not None:
            view, scales = self._blocks_of_slices(view, dim, scales)
        reduced = tuple(i for i in range(view.ndim) if i not in scales)
        return (view, reduced) if reduced else (view.unsqueeze(-1), (view.ndim,))

    def _blocks_of_slices(self, view: Tensor, dim: int, scales: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """Let ``groups`` normalisation blocks share scales, inside or across the groups of the convolution."""
        assert self.groups is not None
        if self.conv_groups == 1:
            return self._split(view, dim, self.groups, "groups"), (dim,)
        if self.groups % self.conv_groups == 0:
            return self._split(view, dim, self.groups // self.conv_groups, "groups / conv_groups"), scales
        if self.conv_groups % self.groups == 0:
            return self._split(view, 0, self.groups, "groups"), (0,)
        raise ValueError(f"{self}: of groups and conv_groups one must divide the other")

    def _split(self, view: Tensor, dim: int, parts: int, argument: str) -> Tensor:
        size = view.shape[dim]
        if size % parts:
            raise ValueError(f"{self}: {argument} = {parts} does not divide size {size} of shape {tuple(view.shape)}")
        parted: Tensor = view.unflatten(dim, (parts, size // parts))
        return parted

    def num_scales(self, shape: Sequence[int]) -> int:
        """Number of scale groups (independent positive factors) of a weight of this shape."""
        view, dims = self.scale_view(torch.empty(tuple(shape), device="meta"))
        return math.prod(size for i, size in enumerate(view.shape) if i not in dims)

    def dimension(self, shape: Sequence[int]) -> int:
        """Dimension of the manifold: entries less scales."""
        return math.prod(shape) - self.num_scales(shape)

    def norms(self, x: Tensor) -> Tensor:
        """Euclidean norm of each scale group, kept broadcastable to the scale view; float32 for half types."""
        view, dims = self.scale_view(x)
        norms: Tensor = torch.linalg.vector_norm(view, dim=dims, keepdim=True, dtype=_accumulation_dtype(x))
        return norms

    def act(self, x: Tensor, scales: Tensor) -> Tensor:
        """Rescale each scale group of a point or a tangent vector: the group action T_a of Def. 1.

        Args:
            x: weight or tangent vector.
            scales: positive factors, shape ``(num_scales,)``. A Euclidean gradient takes ``1 / scales``.
        """
        view, dims = self.scale_view(x)
        if scales.shape != (self.num_scales(x.shape),):
            raise ValueError(
                f"scales must have shape ({self.num_scales(x.shape)},) for {self} and a weight of shape "
                f"{tuple(x.shape)}, got {tuple(scales.shape)}"
            )
        keepdim = [1 if i in dims else size for i, size in enumerate(view.shape)]
        return (view * scales.to(x).reshape(keepdim)).reshape(x.shape)

    # --------------------------------------------------------------------------------------------- metric

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = _accumulation_dtype(x)  # before the products: they underflow in half precision
        left, dims = self.scale_view(x.to(dtype))
        right, _ = self.scale_view(y.to(dtype))
        return (left * right).sum(dims, keepdim=True)

    def _inner_by_group(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        radius = self.norms(x)
        return self._dot(u, v) / radius / radius

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Metric (6): the sum over scale groups of <u_i, v_i> / |w_i|^2. A scalar (all dimensions 1 if kept)."""
        total = self._inner_by_group(x, u, u if v is None else v).sum()
        return total.reshape([1] * x.ndim) if keepdim else total

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The summands of `inner`, each spread over its scale group: a tensor of the weight's shape.

        With it an adaptive optimizer (geoopt's Adam) keeps one second moment per scale group.
        """
        view, _ = self.scale_view(x)
        return self._inner_by_group(x, u, u if v is None else v).to(x.dtype).expand_as(view).reshape(x.shape)

    def angles(self, x: Tensor, y: Tensor) -> Tensor:
        """Angle in radians between matching scale groups, shape ``(num_scales,)``; accurate near 0 and pi."""
        a, b = self._normalized(x), self._normalized(y)
        return (2 * torch.atan2(self.norms(a - b), self.norms(a + b))).flatten()

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance: the root of the sum of squared angles."""
        distance: Tensor = torch.linalg.vector_norm(self.angles(x, y))
        return distance.reshape([1] * x.ndim) if keepdim else distance

    # ------------------------------------------------------------------------------- tangent vectors, gradient

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Remove the vertical part (along the weight) in each scale group."""
        radius = self.norms(x)
        return self._combine(None, u, -self._dot(x, u) / radius / radius, x)

    def horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        """Horizontal part of an ambient vector: `proju`, under the quotient's name."""
        return self.proju(x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient (7): |w_i|^2 times the horizontal part of the Euclidean gradient."""
        radius = self.norms(x)
        return self._combine(radius * radius, u, -self._dot(x, u), x)

    # ------------------------------------------------------------------------------------------------- motion

    def projx(self, x: Tensor) -> Tensor:
        """Every tensor without a zero scale group is a point already: returned as it is."""
        return x

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """First-order retraction (8), ``w + u``, at the representative whose norms are those of ``w``."""
        moved = x + u
        return self._combine(self.norms(x) / self.norms(moved), moved)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic from ``x`` along horizontal ``u``: each group turns by |u_i| / |w_i| radians, norm kept."""
        angle = self.norms(u) / self.norms(x)
        return self._combine(torch.cos(angle), x, torch.sinc(angle / math.pi), u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Horizontal vector at ``x`` whose geodesic reaches ``y``; NaN in a scale group that is antipodal."""
        direction = self.proju(x, self._normalized(y))
        length = self.norms(direction)
        angle = self.angles(x, y).reshape(length.shape)
        stretch = torch.where(angle == 0, torch.ones_like(angle), angle / length)
        return self._combine(stretch * self.norms(x), direction)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of horizontal ``v`` along the shortest geodesic from ``x`` to ``y``; an isometry.

        A scale group whose two ends are antipodal has no shortest geodesic and yields NaN.
        """
        start, end = self._normalized(x), self._normalized(y)
        coefficient = -self._dot(end, v) / (1 + self._dot(start, end))
        turned = self._combine(None, v, coefficient, start + end)
        return self._combine(self.norms(y) / self.norms(x), turned)

    def project_transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Projection transport: the horizontal part of ``v`` at ``y``, rescaled to ``y``'s norms. Shrinks ``v``."""
        return self._combine(self.norms(y) / self.norms(x), self.proju(y, v))

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retract along ``u`` and carry ``v`` along in parallel (the retraction's curve is a geodesic)."""
        y = self.retr(x, u)
        return y, self.transp(x, y, v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Follow the geodesic along ``u`` and carry ``v`` along in parallel, for angles below pi."""
        y = self.expmap(x, u)
        return y, self.transp(x, y, v)

    # ---------------------------------------------------------------------------------------- points, checks

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **_: Any,
    ) -> Tensor:
        """A point uniform on the product of spheres, with Gaussian norms."""
        point = torch.randn(*size, dtype=dtype, device=device, generator=generator)
        self.scale_view(point)  # a shape that does not fit is an error here already
        return self._marked(point)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """The point whose scale groups are constant vectors of unit norm (``seed`` is geoopt's, not used)."""
        return self._marked(self._normalized(torch.ones(*size, dtype=dtype, device=device)))

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        try:
            self.num_scales(shape)
        except ValueError as error:
            return False, f"{name}: {error}"
        return True, None

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        norms = self.norms(x).flatten()
        bad = (~torch.isfinite(norms) | (norms == 0)).nonzero().flatten().tolist()
        if bad:
            return False, f"scale groups {bad[:8]} of {norms.numel()} have norm zero or not finite"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        cosine = (self._dot(x, u).abs() / self.norms(x)).flatten()
        allowed = atol + rtol * self.norms(u).flatten()
        within = cosine <= allowed  # false for NaN
        if not bool(within.all()):
            worst = int((~within).nonzero()[0])
            return False, f"scale group {worst} has a part of {float(cosine[worst]):.3g} along the weight"
        return True, None

    # ------------------------------------------------------------------------------------------------ helpers

    def _marked(self, point: Tensor) -> Tensor:
        """As geoopt returns points: a tensor that knows its manifold."""
        marked: Tensor = geoopt.ManifoldTensor(point, manifold=self)
        return marked

    def _normalized(self, x: Tensor) -> Tensor:
        return self._combine(1 / self.norms(x), x)

    def _combine(self, a: Tensor | None, x: Tensor, b: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """``a * x + b * y`` with one coefficient per scale group; half types are combined in float32."""
        dtype = _accumulation_dtype(x)
        total, _ = self.scale_view(x.to(dtype))
        if a is not None:
            total = total * a
        if b is not None and y is not None:
            total = total + b * self.scale_view(y.to(dtype))[0]
        return total.reshape(x.shape).to(x.dtype)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """Norms of half-precision weights overflow in their own type (papers: |w|^2 in fp16 at |w| > 255)."""
    if not x.is_floating_point():
        raise TypeError(f"a weight on a manifold must be real and floating-point, got dtype {x.dtype}")
    return torch.float32 if x.dtype in _HALF else x.dtype
