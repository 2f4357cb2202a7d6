"""What a calibration asks of its models and options."""

from __future__ import annotations

from numbers import Real

from torch import nn

from retract.nets.layers.low_rank import LowRankLayer

__all__ = ["check_options", "matching_layers"]


def matching_layers(model: nn.Module, reference: nn.Module) -> dict[str, tuple[LowRankLayer, nn.Module]]:
    """The low-rank layers of a model by name, each with the dense layer of that name.

    Raises:
        TypeError: no modules.
        ValueError: no low-rank layer, shared modules, or a dense layer that is missing or of another geometry.
    """
    for argument, module in (("model", model), ("reference", reference)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{argument} must be a torch.nn.Module, got {type(module).__name__}")
    if not set(model.modules()).isdisjoint(reference.modules()):
        raise ValueError("reference must share no module with model, which is changed: make one from a deep copy")
    others = dict(reference.named_modules())
    found: dict[str, tuple[LowRankLayer, nn.Module]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LowRankLayer):
            continue
        other = others.get(name)
        shape = tuple(getattr(getattr(other, "weight", None), "shape", ()))
        if other is None or shape != layer.unfolding.weight_shape:
            got = "no such layer" if other is None else f"{type(other).__name__} with a weight of shape {shape}"
            raise ValueError(
                f"reference must have a layer {name!r} with a weight of shape {layer.unfolding.weight_shape}, got {got}"
            )
        for option in ("stride", "padding", "dilation", "groups", "padding_mode"):
            own, wanted = getattr(layer, option, None), getattr(other, option, None)
            if own != wanted:
                raise ValueError(f"reference: layer {name!r} must have {option}={own!r} as in model, got {wanted!r}")
        found[name] = (layer, other)
    if not found:
        raise ValueError("model must have a low-rank layer such as LowRankLinear, got none")
    return found


def check_options(iterations: int, rows: int, ridge: float) -> None:
    """Refuse options of another type or out of range."""
    for name, value, least in (("iterations", iterations, 0), ("rows", rows, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be positive and finite, got {ridge!r}")
