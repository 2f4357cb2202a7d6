"""The layers of a model whose weight is one matrix, and what stands in the way of factorizing some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from .layers.factored import FACTORED
from .parametrizations._registration import layout_of

__all__ = ["matrix_layers", "obstacles"]

_KINDS: tuple[type[nn.Module], ...] = tuple(FACTORED)


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, embeddings and convolutions by name: each module once, under the first of its names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _KINDS)}


def obstacles(model: nn.Module) -> dict[str, str]:
    """Why layers of a model cannot be factorized, by name; those that can are not listed."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    found = {name: _obstacle(module, users) for name, module in matrix_layers(model).items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def _obstacle(module: nn.Module, users: Mapping[int, int]) -> str | None:
    if parametrize.is_parametrized(module):
        name, chain = next(iter(module.parametrizations.items()))  # type: ignore[union-attr, operator]
        return f"{name} is parametrized already, by {', '.join(type(one).__name__ for one in chain)}"
    try:
        layout_of(module, "weight")
    except (TypeError, ValueError) as error:
        return str(error)
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter:
        return f"weight is a {type(weight).__name__}, not a plain torch.nn.Parameter"
    if users[id(weight)] > 1:
        return "weight is shared with another layer, and factors of its own would part the two"
    return None
