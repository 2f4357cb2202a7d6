"""The numerical check of quotient manifolds: verbs do not depend on the representative."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .factored import Point, distance, flatten, random_like, scale, size, unflatten
from .probes import arbitrary_cost, image, inner, matrix_of, offered, start, tangent, value_and_gradient, velocity
from .reports import Findings, Report

__all__ = ["check_gauge"]


def check_gauge(manifold: Any, x: Point, element: Any = None, *, seed: int = 0, tol: float = 1e-9) -> Report:
    """Every verb is equivariant under ``manifold.act(point_or_vector, element)``; the metric is invariant.

    ``element`` may be left out for a manifold of ``num_scales`` positive factors (`PSI`). A Euclidean
    gradient transforms by the inverse adjoint of the action, solved for densely: use small shapes. Of a manifold
    with ``embed``, the action keeps what points and vectors stand for, and that is compared.
    """
    x, generator = start(x, seed)
    report = Findings("gauge")
    if not hasattr(manifold, "act"):
        return report.skipped("no act")
    if element is None:
        if not isinstance(x, Tensor) or not hasattr(manifold, "num_scales"):
            raise ValueError("element: this manifold does not say how to draw a group element; pass one")
        logarithms = torch.randn(manifold.num_scales(x.shape), dtype=torch.float64, generator=generator)
        element = logarithms.exp().to(x.device)

    def act(u: Point) -> Point:
        acted: Point = manifold.act(u, element)
        return acted

    z = act(x)
    ambient = random_like(x, generator)
    u, v = tangent(manifold, x, generator), scale(0.5, tangent(manifold, x, generator))
    gradients = _gradients(manifold, x, act, ambient, generator)
    y = manifold.retr(x, v)
    point, at_z, at_y = partial(image, manifold), partial(velocity, manifold, z), partial(velocity, manifold, act(y))
    magnitude = 1 + size(point(z))
    if hasattr(manifold, "embed"):
        report.error("embed", distance(point(z), point(x)) / magnitude, tol)
        report.error("embed's differential", distance(at_z(act(u)), velocity(manifold, x, u)), tol)
    cases: dict[str, tuple[Callable[[Point], Tensor], tuple[Point, ...], tuple[Point, ...]]] = {
        "proju": (at_z, (x, ambient), (z, act(ambient))),
        "egrad2rgrad": (at_z, (x, gradients[0]), (z, gradients[1])),
        "retr": (point, (x, v), (z, act(v))),
        "expmap": (point, (x, v), (z, act(v))),
        "logmap": (at_z, (x, y), (z, act(y))),
        "transp": (at_y, (x, y, u), (z, act(y), act(u))),
    }
    for verb, (compared, here, there) in cases.items():
        result = offered(manifold, verb, *here)
        if result is not None:
            error = distance(compared(getattr(manifold, verb)(*there)), compared(act(result)))
            report.error(verb, error / magnitude, tol)
    moved, carried = manifold.retr_transp(z, act(v), act(u))
    error = distance(velocity(manifold, moved, carried), at_y(act(manifold.retr_transp(x, v, u)[1])))
    report.error("retr_transp", error / magnitude, tol)
    report.error("inner", abs(inner(manifold, z, act(u), act(v)) - inner(manifold, x, u, v)), tol)
    length = offered(manifold, "dist", x, y)
    if length is not None:
        report.error("dist", float((manifold.dist(z, act(y)) - length).abs().max()), tol)
    return report.done()


def _gradients(
    manifold: Any, x: Point, act: Callable[[Point], Point], ambient: Point, generator: torch.Generator
) -> tuple[Point, Point]:
    """Euclidean gradients at x and at ``act(x)`` of one function of the equivalence class."""
    if hasattr(manifold, "embed"):
        cost = arbitrary_cost(manifold, x, generator)
        return value_and_gradient(cost, x)[1], value_and_gradient(cost, act(x))[1]
    return ambient, unflatten(torch.linalg.solve(matrix_of(act, x).mT, flatten(ambient)), x)
