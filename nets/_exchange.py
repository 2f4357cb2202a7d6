"""A layer that becomes another one, of another class and with other parameters, and stays the same object.

What holds the layer (its model, a list, a hook's closure) then holds what it has become. A conversion works on a
`twin` first, so that a model changes only when all of its layers have been converted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ._layers import LOW_RANK_LAYERS, TENSOR_LAYERS, is_low_rank_layer, is_tensor_layer
from .layers.canonical import CANONICAL
from .layers.factored import FACTORED
from .layers.low_rank import LowRankLayer, LowRankLinear

__all__ = ["exchange", "make_low_rank_dense", "make_parametrized_dense", "make_tensor_dense", "standing_for", "twin"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")

#: The class of torch of each of ours.
_DENSE: dict[type[nn.Module], type[nn.Module]] = {
    own: dense for classes in (FACTORED, CANONICAL, TENSOR_LAYERS, LOW_RANK_LAYERS) for dense, own in classes.items()
}


def exchange(module: nn.Module, other: nn.Module) -> None:
    """Make a module what another one is, which is not to be used any more."""
    vars(module).clear()
    vars(module).update(vars(other))
    module.__class__ = type(other)


def twin(module: nn.Module) -> nn.Module:
    """A module like this one, of the same tensors, hooks and submodules, that may be changed without changing it."""
    copy = object.__new__(type(module))
    vars(copy).update(vars(module))
    for registry in _REGISTRIES:
        vars(copy)[registry] = vars(module)[registry].copy()
    return copy


def standing_for(module: nn.Module, new: nn.Module, *replaced: str) -> nn.Module:
    """A new module with all of an old one that is not what its class made: hooks, mode, what its users have set.

    Args:
        module: the old one.
        new: of another class.
        replaced: names of those parameters and submodules of the old module that the new one has others for.
    """
    made_by_class = vars(_blank(module)).keys()
    shared = vars(nn.Module()).keys() - set(_REGISTRIES)  # hooks and mode
    kept = {key: value for key, value in vars(module).items() if key in shared or key not in made_by_class}
    for registry in _REGISTRIES:
        old = {name: value for name, value in vars(module)[registry].items() if name not in replaced}
        kept[registry] = {**vars(new)[registry], **old}
    vars(new).update(kept)
    return new


def make_parametrized_dense(module: nn.Module, name: str) -> None:
    """Put the weight that a parametrization makes in its place, before the module's other parameters, as at first."""
    stored: Any = module.parametrizations
    trainable = any(original.requires_grad for original in stored[name].parameters(recurse=False))
    with torch.no_grad():
        value = getattr(module, name).clone(memory_format=torch.contiguous_format)
    # Its own class, made anew: deep copies share the one that `parametrize` made, and removal edits the class.
    (base,) = type(module).__bases__
    module.__class__ = _parametrized_like(module, _DENSE.get(base, base))
    parametrize.remove_parametrizations(module, name)
    delattr(module, name)  # a buffer, if nothing needs a gradient
    module._parameters = {name: nn.Parameter(value, trainable), **module._parameters}


def make_tensor_dense(layer: nn.Module) -> None:
    """Make a tensor layer the layer of torch with its weight, geometry and bias."""
    found = cast(Any, layer)
    dense = _DENSE[parametrize.type_before_parametrizations(layer)]
    if issubclass(dense, nn.Linear):
        new: nn.Module = dense(found.in_features, found.out_features, bias=False, device="meta")
    else:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        geometry = {name: getattr(found, name) for name in names}
        new = dense(found.in_channels, found.out_channels, found.kernel_size, bias=False, device="meta", **geometry)
    with torch.no_grad():
        weight = found.weight.clone(memory_format=torch.contiguous_format)
    new._parameters = {"weight": nn.Parameter(weight, any(core.requires_grad for core in found.cores))}
    new = standing_for(layer, new, "cores")
    new.__class__ = _parametrized_like(layer, dense)
    exchange(layer, new)


def make_low_rank_dense(layer: nn.Module) -> None:
    """Make a low-rank layer the layer of torch with its weight, geometry and bias."""
    found = cast(LowRankLayer, layer)
    with torch.enable_grad():  # a factor that is parametrized needs a gradient if what it is made of does
        trainable = found.left.requires_grad or found.right.requires_grad
    new = found.to_dense()
    dense = type(new)
    new.requires_grad_(trainable)
    new._parameters = {"weight": new.get_parameter("weight")}
    # Its own class, as in `make_parametrized_dense`; then factors that are parameters again, to be left behind.
    layer.__class__ = _parametrized_like(layer, cast(Any, parametrize.type_before_parametrizations(layer)))
    for factor in ("left", "right"):
        if parametrize.is_parametrized(layer, factor):
            parametrize.remove_parametrizations(layer, factor)
    new = standing_for(layer, new, "left", "right")
    new.__class__ = _parametrized_like(layer, dense)
    exchange(layer, new)


def _parametrized_like(module: nn.Module, base: type[nn.Module]) -> type[nn.Module]:
    """Another class, with the parametrizations that a module has, if it has any."""
    if not parametrize.is_parametrized(module):
        return base
    return type(f"Parametrized{base.__name__}", (base,), dict(vars(type(module))))


def _blank(module: nn.Module) -> nn.Module:
    """A module of the same class, without values, to see what its class makes of it."""
    made: Any = parametrize.type_before_parametrizations(module)
    arguments: Any = (1, 1, 1) if issubclass(made, _ConvNd) else (1, 1)
    if is_tensor_layer(module):
        arguments = (cast(Any, module).network,)
    elif is_low_rank_layer(module):
        arguments = (1, 1, 1) if made is LowRankLinear else (1, 1, 1, 1)
    blank: nn.Module = made(*arguments, device="meta")
    return blank
