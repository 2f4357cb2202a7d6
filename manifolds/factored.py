"""Arithmetic on points and tangent vectors that are one tensor or a tuple of tensors (a factored point)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Point", "combine", "distance", "flatten", "map_factors", "random_like", "scale", "size", "unflatten"]

Point = Tensor | tuple[Tensor, ...]


def map_factors(function: Callable[..., Tensor], *points: Point) -> Point:
    """Apply ``function`` to matching factors."""
    if isinstance(points[0], Tensor):
        return function(*points)
    return tuple(function(*factors) for factors in zip(*points, strict=True))


def combine(a: float, u: Point, b: float, v: Point) -> Point:
    """``a u + b v``."""
    return map_factors(lambda s, t: a * s + b * t, u, v)


def scale(a: float, u: Point) -> Point:
    """``a u``."""
    return map_factors(lambda t: a * t, u)


def random_like(u: Point, generator: torch.Generator) -> Point:
    """Gaussian entries, in the shape of ``u``."""
    return map_factors(lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator).to(t.device), u)


def flatten(u: Point) -> Tensor:
    """All entries as one vector."""
    return u.reshape(-1) if isinstance(u, Tensor) else torch.cat([t.reshape(-1) for t in u])


def unflatten(entries: Tensor, like: Point) -> Point:
    """The inverse of `flatten`, in the shape of ``like``."""
    if isinstance(like, Tensor):
        return entries.reshape(like.shape)
    parts = entries.split([math.prod(t.shape) for t in like])
    return tuple(part.reshape(t.shape) for part, t in zip(parts, like, strict=True))


def distance(u: Point, v: Point) -> float:
    """Euclidean distance of all entries: infinite where one is not finite, so that it fails every bound."""
    return size(combine(1.0, u, -1.0, v))


def size(u: Point) -> float:
    """Euclidean norm of all entries: infinite where one is not finite."""
    value = float(torch.linalg.vector_norm(flatten(u)))
    return value if math.isfinite(value) else math.inf
