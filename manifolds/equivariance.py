"""The numerical check of quotient manifolds: verbs do not depend on the representative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .factored import Point, distance, flatten, random_like, scale, unflatten
from .probes import inner, matrix_of, offered, start, tangent
from .reports import Findings, Report

__all__ = ["check_gauge"]


def check_gauge(manifold: Any, x: Point, element: Any = None, *, seed: int = 0, tol: float = 1e-9) -> Report:
    """Every verb is equivariant under ``manifold.act(point_or_vector, element)``; the metric is invariant.

    ``element`` may be left out for a manifold of ``num_scales`` positive factors (`PSI`). A Euclidean
    gradient transforms by the inverse adjoint of the action, solved for densely: use small shapes.
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
    gradient = unflatten(torch.linalg.solve(matrix_of(act, x).mT, flatten(ambient)), x)
    y = manifold.retr(x, v)
    size = 1 + distance(z, scale(0.0, z))
    here_and_there: dict[str, tuple[tuple[Point, ...], tuple[Point, ...]]] = {
        "proju": ((x, ambient), (z, act(ambient))),
        "egrad2rgrad": ((x, ambient), (z, gradient)),
        "retr": ((x, v), (z, act(v))),
        "expmap": ((x, v), (z, act(v))),
        "logmap": ((x, y), (z, act(y))),
        "transp": ((x, y, u), (z, act(y), act(u))),
    }
    for verb, (here, there) in here_and_there.items():
        result = offered(manifold, verb, *here)
        if result is not None:
            report.error(verb, distance(getattr(manifold, verb)(*there), act(result)) / size, tol)
    carried = manifold.retr_transp(z, act(v), act(u))[1]
    report.error("retr_transp", distance(carried, act(manifold.retr_transp(x, v, u)[1])) / size, tol)
    report.error("inner", abs(inner(manifold, z, act(u), act(v)) - inner(manifold, x, u, v)), tol)
    length = offered(manifold, "dist", x, y)
    if length is not None:
        report.error("dist", float((manifold.dist(z, act(y)) - length).abs().max()), tol)
    return report.done()
