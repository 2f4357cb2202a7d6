"""RiemannianSGD: torch.optim.SGD on any manifold."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ._base import Closure, ManifoldOptimizer, Params, check_sgd_options
from ._points import Factors, Point, check_on_manifold, points

__all__ = ["RiemannianSGD"]


class RiemannianSGD(ManifoldOptimizer):
    r"""torch.optim.SGD on any manifold.

    .. math::
        \begin{aligned}
        &\textbf{for each point } w,\ \text{Euclidean gradient } g,\ \text{momentum } b \in T_w \\
        &\quad h \leftarrow \operatorname{grad} = \text{egrad2rgrad}(w, g) \\
        &\quad b \leftarrow \mu\, b + (1 - \tau)\, h &&\text{(first step: } b \leftarrow h \text{)} \\
        &\quad d \leftarrow b, \text{ or } h + \mu b \text{ with Nesterov} \\
        &\quad w, b \leftarrow \text{retr\_transp}(w, -\gamma d, b)
        \end{aligned}

    Manifolds are known by these verbs alone: ours, geoopt's and your own will do. A manifold with the
    attribute ``factored = True`` has points of several tensors: the parameters of its group, in order, are
    the factors of *one* point, and its verbs take and return tuples. Give your own manifold ``arguments``, a
    dict of plain values: with the name of its class, state dicts hold it. Groups without a manifold are
    stepped by torch.optim.SGD's own functions, bit for bit.

    Nesterov: torch keeps the look-ahead point y = x - lr mu b and moves it by h + mu b, both taken at y. On a
    manifold both are tangent at y too, so their sum is one retraction. It replaces two (by the gradient to
    the new x, by the momentum on to the new y) to first order, and exactly in a flat space.

    No gradient is written to; results are copied into the memory of parameters and momentum. A step ends in a
    retraction, so weights do not drift from a manifold whose retraction ends on it (all of ours). A NaN in a
    gradient makes its weight NaN, as in torch, or is an error of the retraction's linear algebra.

    Args:
        params: parameters or param groups; a weight's manifold is the key ``manifold`` of its group or that
            of its `geoopt.ManifoldParameter`.
        lr: step length per length of gradient, in the metric of the manifold.
        momentum, dampening, nesterov, maximize: as in torch.optim.SGD.
        weight_decay: acts on groups without a manifold only, for on spheres and Stiefel manifolds |w|^2 is a
            constant; a group that would have had it warns. Where a penalty makes sense, put it into the loss.
        foreach, fused: torch's implementation for groups without a manifold; points move one by one.
        euclidean_lr: learning rate of groups without a manifold that bring none of their own; default ``lr``.

    Raises:
        ValueError: an option out of range, or a weight that is not on its manifold.
        TypeError: a complex weight on a manifold or, when stepping, a sparse gradient there.

    Sources: Bonnabel, IEEE TAC 2013; Absil, Mahony, Sepulchre 2008, sections 4.1 and 8.1.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        euclidean_lr: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range and weights off their manifold."""
        super().check_group(group)
        check_sgd_options(group)
        check_on_manifold(group)
        if group["manifold"] is not None and group["weight_decay"]:
            warnings.warn(NO_DECAY, stacklevel=6)
            group["weight_decay"] = 0

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step. ``closure``, if given, recomputes the loss with gradients on; returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["manifold"] is None:
                self.euclidean_sgd(group, group["momentum"])
            else:
                for point in points(group):
                    self._step_point(point, group)
        return loss

    def _step_point(self, point: Point, group: dict[str, Any]) -> None:
        lr = -group["lr"] if group["maximize"] else group["lr"]
        if not group["momentum"]:
            point.write(point.retr(point.x, tuple(-lr * h for h in point.rgrad)))
            return
        lazy = getattr(point.manifold, "projects_linearly", False)
        buffers = self._update_momentum(point, group, lazy)
        direction = buffers
        if group["nesterov"]:
            direction = tuple(h + group["momentum"] * b for h, b in zip(point.rgrad, buffers, strict=True))
        step = tuple(-lr * d for d in direction)
        if lazy:
            point.write(point.retr(point.x, step))
            return
        y, moved = point.retr_transp(step, buffers)
        point.write(y)
        for b, new in zip(buffers, moved, strict=True):
            b.copy_(new)

    def _update_momentum(self, point: Point, group: dict[str, Any], lazy: bool) -> Factors:
        """Momentum, tangent at the point as it is now, in the memory of the optimizer's state.

        A lazy manifold (``projects_linearly``: its egrad2rgrad and its transport are one linear projection)
        leaves the transport of the last step to this one's projection: mu transp(b) + grad = proju(mu b + g).
        """
        states = [self.state[w] for w in point.x]
        if "momentum_buffer" not in states[0]:
            for state, w, h in zip(states, point.x, point.rgrad, strict=True):
                state["momentum_buffer"] = torch.empty_like(w).copy_(h)
            return tuple(state["momentum_buffer"] for state in states)
        buffers = tuple(state["momentum_buffer"] for state in states)
        for b, g in zip(buffers, point.egrad if lazy else point.rgrad, strict=True):
            b.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
        if lazy:
            for b, projected in zip(buffers, point.proju(buffers), strict=True):
                b.copy_(projected)
        return buffers


NO_DECAY = (
    "weight_decay acts on parameters without a manifold only and is ignored on this one: put a penalty into "
    "the loss, or silence this by weight_decay=0 in the groups with a manifold."
)
