"""Putting a spectral parametrization on a layer: what must hold first, and the weight to start from."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from retract.nets.layers import factored  # a module, not its names: it imports this package in turn

from .._conv_norm import circular_excess
from ._base import SpectralParametrization
from ._layout import MatrixLayout

__all__ = ["Execution", "Init", "layout_of", "register"]

Execution = Literal["auto", "factored", "weight"]
Init = Literal["fit", "spread"]
Layer = TypeVar("Layer", bound=nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

#: How far values at the border of a spectrum are drawn towards its `spread`, where they are distinct and inside.
_DRAW = 0.1


def layout_of(module: nn.Module, name: str) -> MatrixLayout:
    """How the weight of a layer lies in its matrix.

    Raises:
        TypeError: not a layer with a weight that is one matrix, or no plain parameter of that name.
        ValueError: a parameter that cannot be parametrized.
    """
    if not isinstance(module, _LAYERS):
        names = ", ".join(layer.__name__ for layer in _LAYERS)
        raise TypeError(f"module must be one of torch.nn's {names}, got {type(module).__name__}")
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{name} is parametrized already: torch.nn.utils.parametrize.remove_parametrizations makes it plain"
        )
    parameter = module._parameters.get(name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"module has no parameter {name!r}, it has {', '.join(module._parameters)}")
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"{name} has no shape yet: call the lazy module once before")
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values to start from: initialise it before")
    if not parameter.is_floating_point():
        raise TypeError(f"{name} must be real and floating-point, got dtype {parameter.dtype}")
    if getattr(module, "groups", 1) != 1:
        raise ValueError(f"module has groups={module.groups}: its weight is as many matrices; allowed is groups=1")
    if isinstance(module, nn.Embedding) and module.sparse:
        raise ValueError("module has sparse=True, but the factors of its weight have dense gradients: use sparse=False")
    return MatrixLayout(tuple(parameter.shape), isinstance(module, _TRANSPOSED) and name == "weight")


def register(
    module: Layer, name: str, parametrization: SpectralParametrization, *, execution: Execution, init: Init
) -> Layer:
    """Parametrize; the module changes only after everything has been checked and computed."""
    if execution not in ("auto", "factored", "weight"):
        raise ValueError(f"execution must be 'auto', 'factored' or 'weight', got {execution!r}")
    if init not in ("fit", "spread"):
        raise ValueError(f"init must be 'fit' or 'spread', got {init!r}")
    runs_factored = _runs_factored(module, name, parametrization.rank, execution)
    _check_norm(module, parametrization)
    weight = module._parameters[name]
    assert weight is not None
    with torch.no_grad():
        originals = _initial(parametrization, weight, init)
    kind = module.__class__
    if runs_factored:
        module.__class__ = factored.FACTORED[kind]  # type: ignore[assignment]  # the type of the variable stays true
    # Registration asks for the originals of the layer's own weight: it is given those found above, at no second SVD.
    parametrization.__dict__["right_inverse"] = lambda _: originals
    try:
        parametrize.register_parametrization(module, name, parametrization)
    except BaseException:
        module.__class__ = kind
        raise
    finally:
        del parametrization.__dict__["right_inverse"]
    return module


def _runs_factored(module: nn.Module, name: str, rank: int, execution: Execution) -> bool:
    if execution == "weight":
        return False
    obstacle = factored.why_not_factored(module, name)
    if execution == "factored" and obstacle is not None:
        raise ValueError(f"execution='factored' is not possible: {obstacle}; use execution='weight'")
    return obstacle is None and (execution == "factored" or factored.saves_products(module, rank))


def _check_norm(module: nn.Module, parametrization: SpectralParametrization) -> None:
    padding = getattr(module, "padding_mode", "zeros")
    if parametrization.operator_norm is not None and padding not in ("zeros", "circular"):
        raise ValueError(
            f"spectrum {parametrization.spectrum} bounds the norm of convolutions padded by zeros or circularly, "
            f"module has padding_mode={padding!r}"
        )
    if parametrization.operator_norm is not None and padding == "circular" and max(circular_excess(module)) > 0:
        raise ValueError(
            f"spectrum {parametrization.spectrum} bounds the norm of convolutions whose circular padding adds no more "
            f"than the kernel takes away, module has kernel_size={module.kernel_size}, dilation={module.dilation} and "
            f"padding={module.padding}"
        )


def _initial(parametrization: SpectralParametrization, weight: Tensor, init: Init) -> tuple[Tensor, ...]:
    """Originals for the nearest weight, with singular values that are distinct where it lets them be."""
    matrix = parametrization.matrix(weight)
    point = parametrization.nearest(matrix)
    u, s, v = parametrization.contract(point)
    start = parametrization.spectrum.spread(parametrization.rank, dtype=s.dtype, device=s.device)
    if init == "fit":
        moved = ((matrix.mT @ u * v).sum(0) - s).abs() > math.sqrt(torch.finfo(s.dtype).eps) * s.amax()
        start = torch.where(moved, torch.lerp(s, start, _DRAW), s)
    middle = len(parametrization.modes[0])
    return parametrization.originals((*point[:middle], start, *point[middle + 1 :]), weight.dtype)
