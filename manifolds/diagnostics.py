"""Is this a manifold? Numerical checks of every verb, each a function that returns a `Report`.

They take any object with geoopt's verbs and a point, one tensor or a tuple of them (a factored point), and
compute in float64. Orders are slopes of log(error) over log(step), as in Manopt's ``checkmanifold``,
``checkretraction`` and ``checkgradient`` (Boumal et al., JMLR 2014); here they end in a verdict for tests.

A manifold may offer ``embed(point)``, a tensor that the point stands for (the matrix of its factors), with the
Euclidean metric of that tensor. Its points are then compared by that, its vectors by its differential.

    >>> from retract.manifolds import Stiefel, diagnostics
    >>> bool(diagnostics.check_manifold(Stiefel(), (6, 3)))
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .equivariance import check_gauge
from .factored import Point, combine, distance, flatten, random_like, scale, size
from .probes import (
    along,
    arbitrary_cost,
    departure,
    image,
    inner,
    matrix_of,
    offered,
    rounding,
    start,
    tangent,
    value_and_gradient,
    velocity,
)
from .reports import Findings, ManifoldReport, Report
from .slopes import slope_of

__all__ = [
    "ManifoldReport",
    "Report",
    "check_dimension",
    "check_gauge",
    "check_gradient",
    "check_logarithm",
    "check_manifold",
    "check_metric",
    "check_projection",
    "check_retraction",
    "check_tangency",
    "check_transport",
]


def check_tangency(manifold: Any, x: Point, *, seed: int = 0, tol: float = 1e-9) -> Report:
    """`proju` and `egrad2rgrad` give tangent vectors: a step t leaves the manifold by O(t²) only (slope 2).

    The manifold's own ``check_vector_on_tangent`` and ``check_point_on_manifold`` are asked too, where it has
    them.
    """
    x, generator = start(x, seed)
    report = Findings("tangency")
    for verb in ("proju", "egrad2rgrad"):
        u = getattr(manifold, verb)(x, random_like(x, generator))
        u = scale(1 / max(size(velocity(manifold, x, u)), 1e-300), u)
        report.slope(f"{verb} slope", slope_of(partial(departure, manifold, x, u), noise=rounding(manifold, x)), 2)
        _own_test(report, f"{verb} passes", manifold, "check_vector_on_tangent", x, u, tol=tol)
    y = manifold.retr(x, tangent(manifold, x, generator))
    _own_test(report, "retr passes", manifold, "check_point_on_manifold", y, tol=tol)
    return report.done()


def check_projection(manifold: Any, x: Point, *, seed: int = 0, tol: float = 1e-9) -> Report:
    """`proju` is linear, idempotent and self-adjoint in the metric; `projx` keeps points."""
    x, generator = start(x, seed)
    report = Findings("projection")
    u, v = random_like(x, generator), random_like(x, generator)
    pu, pv = manifold.proju(x, u), manifold.proju(x, v)
    at_x = partial(velocity, manifold, x)
    report.error("idempotence", distance(at_x(manifold.proju(x, pu)), at_x(pu)), tol)
    together = manifold.proju(x, combine(2.0, u, -3.0, v))
    report.error("linearity", distance(at_x(together), at_x(combine(2.0, pu, -3.0, pv))), tol)
    report.error("self-adjointness", abs(inner(manifold, x, pu, v) - inner(manifold, x, u, pv)), tol)
    report.error("projx of a point", distance(image(manifold, manifold.projx(x)), image(manifold, x)), tol)
    return report.done()


def check_retraction(
    manifold: Any, x: Point, *, order: int = 1, seed: int = 0, tol: float = 1e-9, plot: Any = None
) -> Report:
    """`retr` starts at x with velocity u (slope 2 against ``x + t u``) and follows the geodesic to its order.

    That is slope 2 against `expmap` for ``order=1``, 3 for ``order=2``, which needs an `expmap` to be told. A manifold
    with ``embed`` needs none: its geodesics have no tangential acceleration, so it is the slope of the tangential
    part of embed(retr(x, t u)) - embed(x) - t d embed(u).
    """
    x, generator = start(x, seed)
    report = Findings("retraction")
    u = tangent(manifold, x, generator)
    here, direction = image(manifold, x), velocity(manifold, x, u)

    def off_line(t: float) -> Tensor:
        return image(manifold, manifold.retr(x, scale(t, u))) - (here + t * direction)

    def off_geodesic(t: float) -> Tensor:
        step = scale(t, u)
        return image(manifold, manifold.retr(x, step)) - image(manifold, manifold.expmap(x, step))

    references = [("slope of retr - (x + t u)", off_line, 1)]
    if offered(manifold, "expmap", x, u) is not None:
        references.append(("slope of retr - expmap", off_geodesic, order))
    elif hasattr(manifold, "embed"):
        references.append(("slope of its tangential part", lambda t: along(manifold, x, off_line(t)), order))
    else:
        report.note = "no expmap"
        report.add("order", 1, order == 1)
    report.error("retr of zero", distance(image(manifold, manifold.retr(x, scale(0.0, u))), here), tol)
    for name, difference, claimed in references:
        axes = plot if name == references[-1][0] else None
        errors = partial(_size_of, difference)
        slope = slope_of(errors, noise=rounding(manifold, x), plot=axes, expected=claimed + 1)
        report.slope(name, slope, claimed + 1)
    return report.done()


def check_metric(manifold: Any, x: Point, *, seed: int = 0, tol: float = 1e-9) -> Report:
    """`inner` is symmetric, linear and positive on tangent vectors, and `norm` is its root."""
    x, generator = start(x, seed)
    report = Findings("metric")
    vectors = [tangent(manifold, x, generator) for _ in range(8)]
    u, v, w = vectors[:3]
    products = torch.tensor([[inner(manifold, x, a, b) for b in vectors] for a in vectors], dtype=torch.float64)
    report.error("symmetry", float((products - products.mT).abs().max()), tol)
    split = 2 * inner(manifold, x, u, w) - 3 * inner(manifold, x, v, w)
    report.error("linearity", abs(inner(manifold, x, combine(2.0, u, -3.0, v), w) - split), tol)
    smallest = float(torch.linalg.eigvalsh((products + products.mT) / 2)[0])
    report.add("smallest eigenvalue", smallest, smallest > -tol and float(products.diagonal().min()) > 0)
    norm = offered(manifold, "norm", x, u)
    if norm is not None:
        report.error("norm", abs(float(torch.as_tensor(norm).square().sum()) - float(products[0, 0])), tol)
    return report.done()


def check_gradient(
    manifold: Any,
    x: Point,
    cost: Callable[[Any], Tensor] | None = None,
    *,
    seed: int = 0,
    tol: float = 1e-9,
    plot: Any = None,
) -> Report:
    """`egrad2rgrad` represents the differential in the metric.

    Its product with a tangent vector u is the directional derivative, and the remainder
    f(retr(x, t u)) - f(x) - t <grad f, u> has slope 2. ``cost`` maps a point to a scalar, of a manifold with ``embed``
    a function of that; the default is smooth and arbitrary.
    """
    x, generator = start(x, seed)
    report = Findings("gradient")
    cost = cost or arbitrary_cost(manifold, x, generator)
    value, gradient = value_and_gradient(cost, x)
    u = tangent(manifold, x, generator)
    slope = inner(manifold, x, manifold.egrad2rgrad(x, gradient), u)

    def error(t: float) -> float:
        return abs(float(cost(manifold.retr(x, scale(t, u)))) - value - t * slope)

    report.error("directional derivative", abs(slope - float(flatten(gradient) @ flatten(u))), tol)
    noise = rounding(manifold, x) * (1 + abs(value))
    report.slope("slope", slope_of(error, noise=noise, plot=plot, expected=2), 2)
    return report.done()


def check_transport(manifold: Any, x: Point, *, isometric: bool = False, seed: int = 0, tol: float = 1e-9) -> Report:
    """Transport lands in the tangent space of the new point, is linear, and does nothing on the spot.

    ``isometric=True`` asks it to keep inner products too; their change is reported either way. Both `transp`
    (where offered) and `retr_transp` are checked.
    """
    x, generator = start(x, seed)
    report = Findings("transport")
    u, v, w = (tangent(manifold, x, generator) for _ in range(3))
    y, none = manifold.retr(x, u), scale(0.0, u)
    at_y = partial(velocity, manifold, y)
    transports: dict[str, Callable[[Point, Point], Point]] = {
        "retr_transp": lambda step, vector: manifold.retr_transp(x, step, vector)[1],
    }
    if offered(manifold, "transp", x, y, v) is not None:
        transports["transp"] = lambda step, vector: manifold.transp(x, manifold.retr(x, step), vector)
    moved = image(manifold, manifold.retr_transp(x, u, v)[0])
    report.error("retr_transp's point", distance(moved, image(manifold, y)), tol)
    for name, transport in transports.items():
        tv, tw = transport(u, v), transport(u, w)
        _own_test(report, f"{name} passes", manifold, "check_vector_on_tangent", y, tv, tol=tol)
        report.error(f"{name} tangency", distance(at_y(manifold.proju(y, tv)), at_y(tv)), tol)
        together = transport(u, combine(2.0, v, -3.0, w))
        report.error(f"{name} linearity", distance(at_y(together), at_y(combine(2.0, tv, -3.0, tw))), tol)
        stayed = velocity(manifold, manifold.retr(x, none), transport(none, v))
        report.error(f"{name} on the spot", distance(stayed, velocity(manifold, x, v)), tol)
        change = abs(inner(manifold, y, tv, tw) - inner(manifold, x, v, w))
        change = max(change, abs(inner(manifold, y, tv, tv) - inner(manifold, x, v, v)))
        report.add(f"{name} isometry", change, not isometric or change <= tol)
    return report.done()


def check_logarithm(manifold: Any, x: Point, *, seed: int = 0, tol: float = 1e-7) -> Report:
    """`logmap` inverts `expmap` and `dist` is the length of the geodesic, within half a radian."""
    x, generator = start(x, seed)
    report = Findings("logarithm")
    u = scale(0.5, tangent(manifold, x, generator))
    y = offered(manifold, "expmap", x, u)
    if y is None:
        return report.skipped("no expmap")
    log = offered(manifold, "logmap", x, y)
    length = offered(manifold, "dist", x, y)
    if log is None and length is None:
        return report.skipped("neither logmap nor dist")
    if log is not None:
        report.error("log of exp", distance(velocity(manifold, x, log), velocity(manifold, x, u)), tol)
    if length is not None:
        squared = float(torch.as_tensor(length).square().sum())
        report.error("dist", abs(math.sqrt(squared) - math.sqrt(inner(manifold, x, u, u))), tol)
    return report.done()


def check_dimension(manifold: Any, x: Point, expected: int | None = None) -> Report:
    """The rank of `proju` as a matrix is ``manifold.dimension(shape)``, or ``expected``. For small shapes."""
    x, _ = start(x, 0)
    report = Findings("dimension")
    projection = matrix_of(lambda u: velocity(manifold, x, manifold.proju(x, u)), x)
    rank = int(torch.linalg.matrix_rank(projection, rtol=1e-8))
    if expected is None:
        shape = tuple(x.shape) if isinstance(x, Tensor) else tuple(tuple(t.shape) for t in x)
        expected = offered(manifold, "dimension", shape)
    if expected is None:
        return report.skipped(f"no dimension verb; proju has rank {rank}")
    report.add("rank", rank, rank == expected)
    report.add("dimension", expected, rank == expected)
    return report.done()


def check_manifold(
    manifold: Any,
    shape: Sequence[int] | None = None,
    *,
    point: Point | None = None,
    order: int = 1,
    isometric: bool = False,
    element: Any = None,
    seed: int = 0,
) -> ManifoldReport:
    """All checks at one point: ``point``, or ``manifold.random`` of the given shape.

    Args:
        manifold: any object with geoopt's verbs; what raises NotImplementedError is left out.
        shape: shape of a random point.
        point: a point, instead of ``shape``.
        order: order of the retraction.
        isometric: whether the transport claims to be an isometry.
        element: a group element for `check_gauge`.
        seed: seed of every random vector.
    """
    if (shape is None) == (point is None):
        raise ValueError("give either shape or point")
    if point is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            point = manifold.random(*(shape or ()), dtype=torch.float64)
    reports = (
        check_tangency(manifold, point, seed=seed),
        check_projection(manifold, point, seed=seed),
        check_retraction(manifold, point, order=order, seed=seed),
        check_metric(manifold, point, seed=seed),
        check_gradient(manifold, point, seed=seed),
        check_transport(manifold, point, isometric=isometric, seed=seed),
        check_logarithm(manifold, point, seed=seed),
        check_gauge(manifold, point, element, seed=seed),
        check_dimension(manifold, point),
    )
    return ManifoldReport(str(manifold), reports)


def _size_of(difference: Callable[[float], Tensor], t: float) -> float:
    return size(difference(t))


def _own_test(report: Findings, name: str, manifold: Any, verb: str, *arguments: Point, tol: float) -> None:
    """Ask the manifold's own membership test, which returns a bool."""
    if hasattr(manifold, verb):
        ok = bool(getattr(manifold, verb)(*arguments, atol=tol, rtol=tol))
        report.add(name, float(ok), ok)
