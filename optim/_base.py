"""What every optimizer of the package shares: param groups that carry the manifold of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.sgd import sgd

__all__ = ["Closure", "ManifoldOptimizer", "Params", "describe", "parameter_name"]

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Closure: TypeAlias = Callable[[], Any]


class ManifoldOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose param groups say on which manifold their weights live.

    Every group has a key ``manifold``; ``None`` means Euclidean. A group given without that key is split by the
    manifolds of its `geoopt.ManifoldParameter`s, so that from here on a manifold is a property of a group alone.
    State dicts hold a manifold as its name and arguments, and load with ``weights_only=True``.

    Subclasses set `defaults`, override `check_group` and implement `step`.
    """

    def __init__(self, params: Params, defaults: dict[str, Any], *, euclidean_lr: float | None = None) -> None:
        defaults = {**defaults, "manifold": None, "euclidean_lr": euclidean_lr}
        if euclidean_lr is not None:
            check_rate("euclidean_lr", euclidean_lr)
        super().__init__(params, defaults)

    # ------------------------------------------------------------------------------------------- param groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by manifold if it names none.

        Raises:
            ValueError: an option out of range, or a weight whose shape or dtype its manifold refuses.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        # A copy: torch would write defaults into the caller's dict, which the next optimizer would take for its own.
        groups = [dict(param_group)] if "manifold" in param_group else split_by_manifold(param_group)
        for group in groups:
            if is_euclidean(group["manifold"]):
                group["manifold"] = None
                if self.defaults["euclidean_lr"] is not None:
                    group.setdefault("lr", self.defaults["euclidean_lr"])
            super().add_param_group(group)
            del group["euclidean_lr"]  # spent: it chose this group's lr
            try:
                check_rate("lr", group["lr"])
                self.check_group(group)
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range and weights that do not fit their manifold."""
        if group["manifold"] is not None:
            for index in range(len(group["params"])):
                check_weight(group, index)

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: each manifold as ``{"name": ..., "arguments": {...}}``."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["manifold"] = describe(group["manifold"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that was saved for the same weights on the same manifolds.

        Raises:
            ValueError: a group's manifold differs from the saved one.
        """
        saved = [dict(group) for group in state_dict["param_groups"]]
        for index, (group, live) in enumerate(zip(saved, self.param_groups, strict=False)):
            here, there = describe(live["manifold"]), group.get("manifold")
            if here != there:
                raise ValueError(f"param group {index} was saved on manifold {there}, and is on {here} here")
            group["manifold"] = live["manifold"]
        super().load_state_dict({**state_dict, "param_groups": saved})

    # ------------------------------------------------------------------------------------------------- steps

    def euclidean_sgd(self, group: dict[str, Any], momentum: float) -> None:
        """One step of torch.optim.SGD, by torch's own functions, on a group off every manifold."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        states: list[dict[str, Any]] = [self.state[p] if momentum else {} for p in params]
        buffers = [state.get("momentum_buffer") for state in states]
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=_foreach(group, grads),
            fused=group.get("fused"),
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=group.get("dampening", 0),
            nesterov=group.get("nesterov", False),
            maximize=group["maximize"],
        )
        for state, buffer in zip(states, buffers, strict=True):
            state["momentum_buffer"] = buffer


def _foreach(group: dict[str, Any], grads: list[Tensor]) -> bool | None:
    """As asked for. If nothing was: by lists where they take the steps of torch's default, a loop, to the bit."""
    foreach: bool | None = group.get("foreach")
    if foreach is not None or group.get("fused") is not None or isinstance(group["lr"], Tensor):
        return foreach
    if group.get("nesterov"):
        return None  # torch's lists would write the look-ahead into the gradients
    same = all(g.is_cpu and not g.is_sparse and g.dtype in (torch.float32, torch.float64) for g in grads)
    return True if same else None


def describe(manifold: Any) -> dict[str, Any] | None:
    """A manifold as plain values: its name and, where it has them, its constructor's arguments."""
    if manifold is None:
        return None
    arguments = getattr(manifold, "arguments", None)
    nameless = " object at 0x" in str(manifold)  # Python's own text, different in every process
    name = type(manifold).__name__ if arguments is not None or nameless else str(manifold)
    return {"name": name, "arguments": dict(arguments or {})}


def is_euclidean(manifold: Any) -> bool:
    """Whether a group of this manifold is plain: it has none, or geoopt's Euclidean."""
    return manifold is None or getattr(manifold, "name", None) == "Euclidean"


def parameter_name(group: dict[str, Any], index: int) -> str:
    """The parameter's name if the group has names, else its place and shape: for error messages."""
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    return f"parameter {index} (shape {tuple(group['params'][index].shape)}) of its param group"


def plain(x: Tensor) -> Tensor:
    """Past a subclass: geoopt's, whose dispatch can cost more than arithmetic, or a shard's, to its own part."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return x
    local: Tensor = x.to_local() if is_sharded(x) else x.as_subclass(Tensor)  # type: ignore[attr-defined]
    return local


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor (FSDP2, tensor parallelism): this process holds a part, or a replica."""
    return hasattr(x, "to_local")


def check_rate(argument: str, value: Any) -> None:
    """Learning rates are finite and not negative; a zero-dimensional tensor is one too."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{argument} as a tensor must have one element, got shape {tuple(value.shape)}")
    if not (isinstance(value, Tensor) and value.device.type != "cpu") and not 0 <= float(value) < math.inf:
        raise ValueError(f"{argument} must be finite and >= 0, got {value}")


def check_range(argument: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse an option outside ``[low, high)``; NaN is outside."""
    if not low <= value < high:
        raise ValueError(f"{argument} must be in [{low:g}, {high:g}), got {value}")


def check_sgd_options(group: dict[str, Any]) -> None:
    """Refuse what torch.optim.SGD refuses, in every group."""
    check_range("momentum", group["momentum"], 0)
    check_range("weight_decay", group["weight_decay"], 0)
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")
    if group["fused"] and group["foreach"]:
        raise ValueError("fused=True and foreach=True exclude each other")


def check_weight(group: dict[str, Any], index: int) -> None:
    """A weight on a manifold is real, floating-point, and of a shape that the manifold takes."""
    weight, manifold = group["params"][index], group["manifold"]
    if not weight.is_floating_point():
        raise TypeError(
            f"{parameter_name(group, index)} has dtype {weight.dtype}; weights on {manifold} are real floating-point"
        )
    if not getattr(manifold, "factored", False):
        ok, reason = manifold.check_point(weight, explain=True)
        if not ok:
            raise ValueError(f"{parameter_name(group, index)} does not fit {manifold}: {reason}")


def split_by_manifold(group: dict[str, Any]) -> list[dict[str, Any]]:
    """One group a manifold, in order of first appearance; parameters without one form a group of their own."""
    params = group["params"]
    parts: dict[str, tuple[Any, list[Any]]] = {}
    for entry in [params] if isinstance(params, Tensor) else params:
        manifold = getattr(entry[1] if isinstance(entry, tuple) else entry, "manifold", None)
        key = "" if is_euclidean(manifold) else str(describe(manifold))
        parts.setdefault(key, (None if key == "" else manifold, []))[1].append(entry)
    parts = parts or {"": (None, [])}
    return [{**group, "params": entries, "manifold": manifold} for manifold, entries in parts.values()]
