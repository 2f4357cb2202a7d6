"""What the numerical checks of a manifold start from: points, random vectors, verbs that may be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .factored import Point, combine, distance, flatten, map_factors, random_like, scale, size, unflatten

__all__ = [
    "along",
    "arbitrary_cost",
    "departure",
    "image",
    "inner",
    "matrix_of",
    "offered",
    "rounding",
    "start",
    "tangent",
    "value_and_gradient",
    "velocity",
]


def start(x: Point, seed: int) -> tuple[Point, torch.Generator]:
    """The point in float64, as plain tensors, and a generator for vectors.

    Its stream is not that of ``torch.manual_seed(seed)``, from which the point may have come: the first
    vector would be the point.
    """

    def plain(t: Tensor) -> Tensor:
        return t.detach().as_subclass(Tensor).double()

    return map_factors(plain, x), torch.Generator().manual_seed(seed ^ 0x5DEECE66D)


def image(manifold: Any, x: Point) -> Tensor:
    """The point as one vector, by which points are compared: what it stands for, ``embed(x)``, or its own entries.

    A manifold with `embed` has points that differ in their entries and are one.
    """
    return flatten(manifold.embed(x) if hasattr(manifold, "embed") else x)


def velocity(manifold: Any, x: Point, u: Point) -> Tensor:
    """The vector ``u`` at ``x`` likewise: the differential of `image` along it."""
    if not hasattr(manifold, "embed"):
        return flatten(u)
    derivative: Tensor = torch.func.jvp(manifold.embed, (x,), (u,))[1]
    return flatten(derivative)


def along(manifold: Any, x: Point, ambient: Tensor) -> Tensor:
    """The part of a vector of the space of `embed` that is tangent at x: the gradient of its product with embed."""
    _, gradient = value_and_gradient(lambda y: image(manifold, y) @ ambient, x)
    return velocity(manifold, x, manifold.egrad2rgrad(x, gradient))


def rounding(manifold: Any, x: Point) -> float:
    """The level of rounding errors of a point's image."""
    return torch.finfo(torch.float64).eps * (1 + size(image(manifold, x)))


def inner(manifold: Any, x: Point, u: Point, v: Point) -> float:
    """The inner product; geoopt's manifolds return one for each batch element, to be summed."""
    return float(torch.as_tensor(manifold.inner(x, u, v)).sum())


def tangent(manifold: Any, x: Point, generator: torch.Generator) -> Point:
    """A random tangent vector of unit norm in the metric (left as it is if the metric gives it none)."""
    u: Point = manifold.proju(x, random_like(x, generator))
    squared = inner(manifold, x, u, u)
    return scale(squared**-0.5, u) if squared > 0 else u


def departure(manifold: Any, x: Point, u: Point, t: float) -> float:
    """How far ``x + t u`` is from its projection to the manifold."""
    moved = combine(1.0, x, t, u)
    return distance(image(manifold, manifold.projx(moved)), image(manifold, moved))


def offered(manifold: Any, verb: str, *arguments: Any) -> Any:
    """What the verb returns, or None if the manifold does not offer it."""
    if not hasattr(manifold, verb):
        return None
    try:
        return getattr(manifold, verb)(*arguments)
    except NotImplementedError:
        return None


def matrix_of(linear: Callable[[Point], Point], x: Point) -> Tensor:
    """Matrix of a linear map of vectors at ``x``, entries in the order of `flatten`."""
    basis = torch.eye(flatten(x).numel(), dtype=torch.float64, device=flatten(x).device)
    return torch.stack([flatten(linear(unflatten(e, x))) for e in basis], dim=1)


def arbitrary_cost(manifold: Any, x: Point, generator: torch.Generator) -> Callable[[Any], Tensor]:
    """A smooth function of all entries of the image."""
    entries = image(manifold, x)
    weights, phases = flatten(random_like(entries, generator)), flatten(random_like(entries, generator))
    return lambda y: torch.sin(weights * image(manifold, y) + phases).sum()


def value_and_gradient(cost: Callable[[Any], Tensor], x: Point) -> tuple[float, Point]:
    """The cost and its Euclidean gradient."""
    entries = flatten(x).clone().requires_grad_()
    value = cost(unflatten(entries, x))
    (gradient,) = torch.autograd.grad(value, entries)
    return float(value.detach()), unflatten(gradient, x)
