"""RiemannianGD: deterministic gradient descent on any manifold, with a fixed step or a line search."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._base import Closure, ManifoldOptimizer, Params
from ._points import Factors, Point, check_on_manifold, points
from .line_search import SearchResult, armijo, check_armijo_options

__all__ = ["RiemannianGD"]

_SEARCH_OPTIONS = ("sufficient_decrease", "contraction", "max_evaluations")


class RiemannianGD(ManifoldOptimizer):
    """Deterministic gradient descent on any manifold, with a fixed step or an Armijo line search.

    All groups together are one point of a product manifold, Euclidean groups included. A step follows the
    curve t -> retr(w, -t lr grad), with each group's own ``lr``: learning rates fix the proportions of the
    groups. The common multiplier t is 1 with a fixed step. A line search tries 1 first at the first step, and
    afterwards the last accepted t, enlarged by one contraction.

    With a line search, ``step(closure)`` calls the closure at the start and at every trial, as torch.optim.LBFGS
    does: it zeroes gradients, computes the loss on the same data, calls ``backward`` and returns the loss. A trial is
    a forward pass like any other: it moves BatchNorm's running statistics, and with dropout trials could not be
    compared. Gradients end as those of the last trial.

    A search without success (a gradient that is lost in rounding, or wrong, or a loss that is not finite)
    leaves every weight as it was, to the bit; ``last_search.success`` tells. So does a closure that raises.

    Args:
        params: as in `RiemannianSGD`, factored manifolds included.
        lr: fixed step, or its proportions among groups for the line search.
        line_search: ``None`` for the fixed step, or ``"armijo"``.
        sufficient_decrease, contraction, max_evaluations: of `retract.optim.line_search.armijo`. The textbooks' 1e-4
            lets steps of nearly twice the best length pass, which goes back and forth; 0.3 refuses them.
        euclidean_lr: learning rate of groups without a manifold that bring none of their own; default ``lr``.

    Attributes:
        last_search: `SearchResult` of the last line search: accepted t, loss there, trials, success.
        last_step: last accepted t; a key of the param groups, so that state dicts hold it.

    Raises:
        ValueError: an option out of range, a weight off its manifold, or a line search without closure.
        TypeError: a complex weight on a manifold or, when stepping, a sparse gradient.

    Source: Absil, Mahony, Sepulchre 2008, Algorithm 1 (accelerated line search, here without acceleration).
    """

    last_search: SearchResult | None = None

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        *,
        line_search: str | None = None,
        sufficient_decrease: float = 1e-4,
        contraction: float = 0.5,
        max_evaluations: int = 25,
        euclidean_lr: float | None = None,
    ) -> None:
        search = {
            "line_search": line_search,
            "sufficient_decrease": sufficient_decrease,
            "contraction": contraction,
            "max_evaluations": max_evaluations,
        }
        super().__init__(params, {"lr": lr, **search, "last_step": None}, euclidean_lr=euclidean_lr)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range or not common to all groups, and weights off their manifold."""
        super().check_group(group)
        check_on_manifold(group)
        if group["line_search"] not in (None, "armijo"):
            raise ValueError(f"line_search must be None or 'armijo', got {group['line_search']!r}")
        check_armijo_options(*(group[option] for option in _SEARCH_OPTIONS))
        for option in ("line_search", *_SEARCH_OPTIONS):
            here, first = group[option], self.param_groups[0][option]
            if here != first:
                raise ValueError(f"{option} is one for all param groups, got {here!r} after {first!r}")

    @property
    def last_step(self) -> float | None:
        """Last accepted multiplier of the learning rates; None before the first."""
        last: float | None = self.param_groups[0]["last_step"]
        return last

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step and return the loss at its start; only a fixed step can do without a closure."""
        line_search = self.param_groups[0]["line_search"]
        if closure is None and line_search is not None:
            raise ValueError(f"line_search={line_search!r} needs step(closure), got no closure")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = ((point, group["lr"]) for group in self.param_groups for point in points(group))
        if closure is None or line_search is None:
            for point, lr in weights:
                _move(point, point.x, point.rgrad, -lr)
        else:
            self._search(closure, _number(loss), [_Ray(point, float(lr)) for point, lr in weights])
        return loss

    def _search(self, closure: Closure, loss: float, rays: list[_Ray]) -> None:
        options = self.param_groups[0]

        def phi(t: float) -> float:
            for ray in rays:
                ray.move(t)
            with torch.enable_grad():
                return _number(closure())

        self.last_search = None
        try:
            self.last_search = armijo(
                phi,
                loss,
                math.fsum(ray.slope for ray in rays),
                1.0 if self.last_step is None else self.last_step / options["contraction"],
                **{option: options[option] for option in _SEARCH_OPTIONS},
            )
        finally:
            if self.last_search is None or not self.last_search.success:
                for ray in rays:
                    ray.point.write(ray.start)
        if self.last_search.success:
            for group in self.param_groups:
                group["last_step"] = self.last_search.step


class _Ray:
    """The curve t -> retr(w, -t lr grad), kept apart from what trials and closures overwrite."""

    def __init__(self, point: Point, lr: float) -> None:
        self.point, self.lr = point, lr
        self.start = tuple(w.clone() for w in point.x)
        self.rgrad = tuple(h.clone() for h in point.rgrad)
        self.slope = -lr * float(point.derivative(point.rgrad))

    def move(self, t: float) -> None:
        """Put the weights at ``t``."""
        _move(self.point, self.start, self.rgrad, -self.lr * t)


def _move(point: Point, start: Factors, rgrad: Factors, step: float | Tensor) -> None:
    """Put the weights at ``step`` times the gradient from ``start``."""
    if point.manifold is None:
        torch.add(start[0], rgrad[0], alpha=float(step), out=point.x[0])
    else:
        point.write(point.retr(start, tuple(step * h for h in rgrad)))


def _number(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
