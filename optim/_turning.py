"""What PSISGD, PSIAngular and PSIAdam share: an optimizer that turns scale groups and steps the rest by SGD."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._base import Closure, ManifoldOptimizer, Params, check_range, is_sharded, parameter_name, plain
from ._scale import ScaledParameter

__all__ = ["TurningOptimizer", "check_scale_group", "require_scale_groups"]


class TurningOptimizer(ManifoldOptimizer):
    """An optimizer of weights made of scale groups; groups without a manifold take torch.optim.SGD's step.

    Subclasses implement `turn`. They name, in ``state_names``, what they keep for a weight: ``momentum_buffer`` like
    the weight, and ``carry`` and ``square``, one number per scale group.
    """

    def __init__(self, params: Params, defaults: dict[str, Any], *, euclidean_lr: float | None = None) -> None:
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)
        require_scale_groups(self)

    def turn(self, group: dict[str, Any], *, check_finite: bool) -> None:
        """Step one group on its manifold; FloatingPointError if asked to look and a step is not finite."""
        raise NotImplementedError

    def momentum_of(self, group: dict[str, Any]) -> float:
        """Momentum of the groups without a manifold."""
        return float(group["momentum"])

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range and weights that are not made of scale groups."""
        super().check_group(group)
        check_range("weight_decay", group["weight_decay"], 0)
        check_scale_group(group)
        if group["fused"] and group["foreach"]:
            raise ValueError("fused=True and foreach=True exclude each other")
        if group["manifold"] is not None and group["weight_decay"]:
            warnings.warn(
                "weight_decay is ignored on scale-invariant weights, where it could only change their norm, which "
                "stays fixed; it acts on the others. weight_decay=0 in the groups with a manifold silences this.",
                stacklevel=6,
            )
            group["weight_decay"] = 0

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step. ``closure``, if given, recomputes the loss with gradients on; the loss is returned.

        Raises:
            FloatingPointError: a gradient on a manifold is NaN or infinite (see ``check_finite``).
            TypeError: a gradient on a manifold is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["manifold"] is None:
                self.euclidean_sgd(group, self.momentum_of(group))
            elif group["params"]:
                look = group["check_finite"]
                try:
                    self.turn(group, check_finite=group["params"][0].is_cpu if look is None else look)
                except FloatingPointError:
                    raise _nonfinite(group) from None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the numbers of half-precision weights stay float32, where torch would narrow them."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        weights = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, weights, strict=True):
            for name in ("carry", "square"):
                if name in state_dict["state"].get(index, {}):
                    self.state[p][name] = state_dict["state"][index][name].to(p.device, copy=True)

    def scaled_parameters(self, group: dict[str, Any], state_names: Sequence[str]) -> list[ScaledParameter]:
        """The group's parameters that have a gradient, with their state, which is made here at first need."""
        parameters = []
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise TypeError(
                    f"{parameter_name(group, index)} has a sparse gradient; scale-invariant weights need dense ones"
                )
            weight, state = plain(p), self.state[p]
            fresh = any(name not in state for name in state_names)
            if fresh:
                state.update(_initial_state(p, weight, group["manifold"], state_names))
            stored = [plain(state[name]) for name in state_names]
            parameters.append(ScaledParameter(weight, plain(p.grad), group["manifold"], fresh, *stored))
        return parameters


def check_scale_group(group: dict[str, Any]) -> None:
    """Refuse a manifold whose points are not made of scale groups."""
    manifold = group["manifold"]
    if manifold is None:
        return
    if not hasattr(manifold, "scale_view"):
        raise ValueError(
            "this optimizer takes scale-invariant weights (on retract.manifolds.PSI), got a group on "
            f"{manifold}; retract.optim.RiemannianSGD takes any manifold"
        )
    for index, p in enumerate(group["params"]):
        if is_sharded(p) and any(_splits(manifold, p.shape, place.dim) for place in p.placements if place.is_shard()):
            raise ValueError(
                f"{parameter_name(group, index)} is sharded across its scale groups ({p.placements}); on {manifold} "
                "every process must hold whole scale groups: shard the filters' dimension"
            )


def _splits(manifold: Any, shape: Sequence[int], dim: int) -> bool:
    """Whether cutting a weight along ``dim`` cuts scale groups: then twice the slices are not twice the groups."""
    one, two = ([size if i == dim else s for i, s in enumerate(shape)] for size in (1, 2))
    try:
        return bool(manifold.num_scales(two) != 2 * manifold.num_scales(one))
    except ValueError:
        return True


def require_scale_groups(optimizer: ManifoldOptimizer) -> None:
    """Refuse to train as a Euclidean optimizer by mistake: some group must be on a manifold of scale groups."""
    if not any(hasattr(group["manifold"], "scale_view") and group["params"] for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise ValueError(
            f"{name} was given no scale-invariant parameter, so it would train as a Euclidean optimizer. Before making "
            f"it, add\n    retract.nets.register_scale_invariant(model, example_input)\nor make it of groups:\n"
            f"    {name}(retract.nets.scale_invariant_groups(model, example_input), ...)"
        )


def _initial_state(p: Tensor, weight: Tensor, manifold: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Zeros: a buffer sharded as its parameter is, and numbers for the scale groups that are here."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    count = manifold.num_scales(weight.shape)
    return {
        name: torch.zeros_like(p if is_sharded(p) else weight)
        if name == "momentum_buffer"
        else torch.zeros(count, dtype=dtype, device=weight.device)
        for name in names
    }


def _nonfinite(group: dict[str, Any]) -> FloatingPointError:
    """The error for a step that met a value that is not finite, naming the parameter whose gradient holds it."""
    for index, p in enumerate(group["params"]):
        if p.grad is None or bool(torch.isfinite(p.grad).all()):
            continue
        view, dims = group["manifold"].scale_view(plain(p.grad))
        bad = (~torch.isfinite(view)).sum(dims).flatten()
        return FloatingPointError(
            f"the gradient of {parameter_name(group, index)} is not finite in scale groups "
            f"{bad.nonzero().flatten().tolist()[:8]} of {bad.numel()}; these were not moved, but others may "
            "have been: go back to a checkpoint"
        )
    return FloatingPointError("a step on scale-invariant weights overflowed: weights or momentum are out of range")
