"""The layers of a model that have a weight, and what stands in the way of factorizing some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize

from .layers.factored import FACTORED
from .layers.low_rank import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLayer, LowRankLinear
from .layers.tensor import TensorConv1d, TensorConv2d, TensorConv3d, TensorLinear
from .parametrizations._registration import layout_of

__all__ = [
    "LOW_RANK_LAYERS",
    "TENSOR_LAYERS",
    "canonical_obstacle",
    "is_low_rank_layer",
    "is_tensor_layer",
    "low_rank_obstacle",
    "matrix_obstacle",
    "naming",
    "note_of",
    "obstacles",
    "set_note",
    "tensor_obstacle",
    "weight_layers",
]

#: The tensor layer of each class of torch that has one.
TENSOR_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TensorLinear,
    nn.Conv1d: TensorConv1d,
    nn.Conv2d: TensorConv2d,
    nn.Conv3d: TensorConv3d,
}

#: The low-rank layer of each class of torch that has one.
LOW_RANK_LAYERS: dict[type[nn.Module], type[LowRankLayer]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}

_TENSOR: tuple[type[nn.Module], ...] = tuple(TENSOR_LAYERS.values())
_LOW_RANK: tuple[type[nn.Module], ...] = tuple(LOW_RANK_LAYERS.values())
_WITHOUT_WEIGHT = (*_TENSOR, *_LOW_RANK)  # of factors that are no parametrization
_KINDS: tuple[type[nn.Module], ...] = (*FACTORED, *_WITHOUT_WEIGHT)
_NOTE = "_stays_dense"


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, embeddings and convolutions by name: each module once, under the first of its names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _KINDS)}


def is_tensor_layer(module: nn.Module) -> bool:
    """Whether this is one of the library's tensor layers, and not of a class derived from them."""
    return parametrize.type_before_parametrizations(module) in _TENSOR


def is_low_rank_layer(module: nn.Module) -> bool:
    """Whether this is one of the library's low-rank layers, and not of a class derived from them."""
    return parametrize.type_before_parametrizations(module) in _LOW_RANK


def set_note(module: nn.Module, note: str | None) -> None:
    """Keep on a layer why the last call of `retract.nets.factorize` left it dense, if it did."""
    vars(module).pop(_NOTE, None)
    if note is not None:
        vars(module)[_NOTE] = note


def note_of(module: nn.Module) -> str:
    """What `set_note` has kept."""
    return str(vars(module).get(_NOTE, ""))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in what is wrong with a layer which one it is."""
    try:
        yield
    except (TypeError, ValueError) as problem:
        raise type(problem)(f"layer {name!r}: {problem}" if name else str(problem)) from problem


def matrix_obstacle(module: nn.Module) -> str | None:
    """What keeps a layer without parametrizations from a parametrized weight, if anything does."""
    try:
        layout_of(module, "weight")
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def canonical_obstacle(module: nn.Module) -> str | None:
    """What keeps a layer without parametrizations from a canonical weight, if anything does."""
    if isinstance(module, nn.Embedding):
        return "it is an Embedding: canonical weights are for linear layers and convolutions"
    return matrix_obstacle(module)


def tensor_obstacle(module: nn.Module) -> str | None:
    """What keeps a layer without parametrizations from becoming a tensor layer, if anything does.

    Unlike `matrix_obstacle` it lets groups pass: the weight of a grouped convolution is one tensor all the same.
    """
    return _replacement_obstacle(module, TENSOR_LAYERS, "tensor")


def low_rank_obstacle(module: nn.Module) -> str | None:
    """What keeps a layer without parametrizations from becoming a low-rank layer, if anything does.

    Unlike `matrix_obstacle` it lets groups pass: each of them has a matrix.
    """
    return _replacement_obstacle(module, LOW_RANK_LAYERS, "low-rank")


def _replacement_obstacle(module: nn.Module, classes: Mapping[type[nn.Module], object], kind: str) -> str | None:
    """What keeps a layer from becoming one of another class."""
    if type(module) not in classes:
        names = ", ".join(layer.__name__ for layer in classes)
        return f"{type(module).__name__} is not one of torch.nn's own {names}, which have {kind} layers"
    parameter = module._parameters.get("weight")
    if parameter is None:
        return f"module has no parameter 'weight', it has {', '.join(module._parameters)}"
    if parameter.is_meta:
        return "weight is on the meta device and has no values to start from: initialise it before"
    if not parameter.is_floating_point():
        return f"weight must be real and floating-point, got dtype {parameter.dtype}"
    return None


def obstacles(model: nn.Module, obstacle: Callable[[nn.Module], str | None] = matrix_obstacle) -> dict[str, str]:
    """Why layers of a model cannot be factorized, by name; those that can are not listed.

    Args:
        model: any model.
        obstacle: what keeps a layer by itself from it; what it shares, and what it is already, is looked at here.
    """
    users = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    found = {name: _obstacle(module, users, obstacle) for name, module in weight_layers(model).items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def _obstacle(module: nn.Module, users: Mapping[int, int], obstacle: Callable[[nn.Module], str | None]) -> str | None:
    if isinstance(module, _WITHOUT_WEIGHT):
        return f"it is a {type(module).__name__} already"
    if parametrize.is_parametrized(module):
        name, chain = next(iter(module.parametrizations.items()))  # type: ignore[union-attr, operator]
        return f"{name} is parametrized already, by {', '.join(type(one).__name__ for one in chain)}"
    if (reason := obstacle(module)) is not None:
        return reason
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter:
        return f"weight is a {type(weight).__name__}, not a plain torch.nn.Parameter"
    if users[id(weight)] > 1:
        return "weight is shared with another layer, and factors of its own would part the two"
    return None
