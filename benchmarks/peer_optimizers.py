"""Published optimizers to compare with, in a form that steps a whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retract.manifolds import PSI, Oblique
from retract.optim import RiemannianSGD

__all__ = ["SGDG", "GreatCircles", "MuonAdamW", "RiemannianAdam", "UnitNormSGD"]

Groups = list[dict[str, Any]]
Closure = Callable[[], float] | None


class RiemannianAdam(geoopt.optim.RiemannianAdam):  # type: ignore[misc]  # geoopt has no annotations
    """geoopt's, which goes on to the bit when its state is loaded.

    It counts steps in integers; torch's Adam, which it derives from, makes single-precision tensors of those it loads.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for known in self.state.values():
            known["step"] = int(known["step"])


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for hidden weights, and AdamW for all others, as torch's documentation has it.

    Muon takes matrices only: it gets those that convolutions are to the manifolds of this library too, (out, fan_in),
    as its author does.

    Args:
        params: groups; those with the key ``"manifold"`` hold the hidden weights, contiguous.
        lr, momentum: of Muon.
        weight_decay: of both.
        euclidean_lr: of AdamW, for groups that bring no ``"lr"`` of their own.

    Source: https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        euclidean_lr: float = 3e-3,
    ) -> None:
        self._weights = [weight for group in params if "manifold" in group for weight in _tensors(group)]
        others = [
            {"lr": euclidean_lr, **group, "params": _tensors(group)} for group in params if "manifold" not in group
        ]
        # Leaves of their own in the weights' memory.
        self._matrices = [nn.Parameter(weight.detach().view(len(weight), -1)) for weight in self._weights]
        self._muon = torch.optim.Muon(self._matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._adamw = torch.optim.AdamW([dict(group) for group in others], weight_decay=weight_decay)
        super().__init__([{"params": self._weights}, *others], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> float | None:  # type: ignore[override]  # torch's overloads
        """Step both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [*self._muon.param_groups, *self._adamw.param_groups]
        for group, own in zip(stepped, self.param_groups, strict=True):
            group["lr"], group["weight_decay"] = own["lr"], own["weight_decay"]  # schedules set those of this optimizer
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both, and what schedules set."""
        return {"groups": super().state_dict(), "muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states of both."""
        super().load_state_dict(state_dict["groups"])
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])


class UnitNormSGD(torch.optim.SGD):
    """torch.optim.SGD that puts every filter back to norm 1 after each step.

    Momentum is left as it is.

    Args:
        params: groups; those with the key ``"manifold"`` hold the filters, others are SGD's.
        options: of torch.optim.SGD.

    Source: Badrinarayanan, Mishra, Cipolla, "Symmetry-invariant optimization in deep networks", 2015.
    """

    def __init__(self, params: Groups, **options: Any) -> None:
        groups = [{**group, "params": _tensors(group)} for group in params]
        for group in groups:
            group["unit_norm"] = "manifold" in group
            _require_filters(group.pop("manifold", None), "UnitNormSGD")
        super().__init__(groups, **options)
        self._normalize()

    @torch.no_grad()
    def step(self, closure: Closure = None) -> float | None:  # type: ignore[override]  # torch's overloads
        """Step, then normalise."""
        loss: float | None = super().step(closure)
        self._normalize()
        return loss

    @torch.no_grad()
    def _normalize(self) -> None:
        for group in self.param_groups:
            if group["unit_norm"]:
                for weight in group["params"]:
                    weight.copy_(F.normalize(weight.flatten(1)).view_as(weight))


class GreatCircles(Oblique):
    """Filters of norm 1 that move along great circles, where `Oblique` moves along chords."""

    name = "GreatCircles"

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map."""
        return self.expmap(x, u)


class SGDG(RiemannianSGD):
    """SGD-G: momentum on unit spheres, by great circles and parallel transport, with clipped gradients.

    To the gradient of the weight Y of a layer, (out, fan_in), it adds that of the orthogonality penalty
    ``omega / 2 * |Y Y' - I|^2``; then each filter's Riemannian gradient is cut to the length ``clip``.

    Of the authors' code these are left out: that filters of layers with more outputs than inputs stay Euclidean, and
    that momentum starts afresh when the learning rate drops. The learning rate multiplies the step, not the momentum.

    Args:
        params: groups; those with the key ``"manifold"`` hold the filters, which are put on unit spheres.
        lr: radians per unit of gradient.
        momentum, nesterov, weight_decay, euclidean_lr: as in `RiemannianSGD`.
        clip: largest length of a filter's gradient.
        omega: of the penalty.

    Source: Cho, Lee, "Riemannian approach to batch normalization", NeurIPS 2017.
    """

    def __init__(self, params: Groups, lr: float, *, clip: float = 0.1, omega: float = 0.1, **options: Any) -> None:
        self.clip, self.omega = clip, omega
        circles = GreatCircles()
        for group in params:
            if "manifold" in group:
                _require_filters(group["manifold"], "SGDG")
                group["manifold"] = circles
                for weight in _tensors(group):
                    weight.data.copy_(circles.projx(weight.data))
        super().__init__(params, lr, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Change the gradients, then step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if isinstance(group.get("manifold"), GreatCircles):
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad = self._changed(weight, weight.grad)
        super().step()
        return loss

    def _changed(self, weight: Tensor, grad: Tensor) -> Tensor:
        rows, gradient = weight.flatten(1), grad.flatten(1)
        gradient = gradient + 2 * self.omega * (rows @ rows.mT @ rows - rows)
        gradient = gradient - (gradient * rows).sum(1, keepdim=True) * rows
        lengths = gradient.norm(dim=1, keepdim=True)
        changed: Tensor = gradient * (self.clip / lengths).clamp(max=1)
        return changed.view_as(weight)


def _require_filters(manifold: Any, name: str) -> None:
    if manifold is not None and str(manifold) != str(PSI()):
        raise ValueError(f"{name} knows one scale per filter, and this model has weights on {manifold}")


def _tensors(group: dict[str, Any]) -> list[Tensor]:
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
