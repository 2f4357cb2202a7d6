"""What `retract.nets.factorize` makes of one layer, for each kind.

A conversion leaves the layer it is given alone and returns what this is to become.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from retract.manifolds.canonical import cp_tensor, power_method
from retract.manifolds.tensor_train import capped_ranks

from ._exchange import standing_for, twin
from ._layers import canonical_obstacle, low_rank_obstacle, matrix_obstacle, tensor_obstacle
from ._low_rank_conversion import to_low_rank
from ._low_rank_plan import plan_low_rank
from ._sizes import StaysDense, allowed_by, check_error, check_fresh, check_saving
from .init.decomposition import decompose
from .init.tensor import tensor_kaiming_
from .layers.tensor import tensor_layer
from .layers.tensor_formats import FORMATS, tensor_network
from .layers.tensor_network import TensorNetwork
from .parametrizations._base import widened
from .parametrizations._canonical_start import check_finite
from .parametrizations._layout import MatrixLayout, Modes
from .parametrizations._registration import layout_of
from .parametrizations.canonical import put_terms, start_canonical
from .parametrizations.spectral import sttp, svdp

__all__ = ["KINDS", "Kind"]


@dataclass(frozen=True)
class Kind:
    """A kind of weight that layers can be given."""

    #: From a layer and options to what it is to become.
    convert: Callable[..., nn.Module]
    #: What keeps a layer from it.
    obstacle: Callable[[nn.Module], str | None]
    #: Names of the options of ``convert`` and ``plan``. What is not given has the default of the function.
    options: tuple[str, ...]
    #: What is decided of all layers together, before any is converted: from the model, the layers by name, the options
    #: of each, and those named in ``planned``, to options of each and the reasons of layers that stay dense.
    plan: Callable[..., tuple[dict[str, dict[str, Any]], dict[str, str]]] | None = None
    planned: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------ spectral


def _to_svdp(module: nn.Module, *, rank: Any, **options: Any) -> nn.Module:
    layout = layout_of(module, "weight")
    return svdp(twin(module), min(rank, *layout.matrix_shape) if isinstance(rank, int) else rank, **options)


def _to_sttp(module: nn.Module, *, rank: Any, modes: Modes | None = None, **options: Any) -> nn.Module:
    layout = layout_of(module, "weight")
    checked = layout.prime_modes() if modes is None else layout.check_modes(modes)
    ranks = capped_ranks(*checked, rank) if isinstance(rank, int) else rank
    return sttp(twin(module), ranks, modes=checked, **options)


# ----------------------------------------------------------------------------------------------------------- canonical


def _to_canonical(
    module: nn.Module,
    *,
    rank: int | None = None,
    budget: float | None = None,
    error: float | None = None,
    init: str = "fit",
    form: Any = "euclidean",
    execution: Any = "auto",
    **fresh: Any,
) -> nn.Module:
    layout = layout_of(module, "weight")
    shape = (layout.matrix_shape[0], *layout.fan_in_shape)
    elements, a_term = math.prod(shape), 1 + sum(size for size in shape if size > 1)
    if error is not None:
        check_error(error)
        if init not in ("fit", "power"):
            raise ValueError(f"error needs init='fit', which adds terms up to that error, got init={init!r}")
        weights, factors = _terms(module.get_parameter("weight"), layout, error, (elements - 1) // a_term)
        return put_terms(twin(module), weights, factors, form=form, execution=execution)
    if budget is not None:
        allowed = allowed_by(budget, elements)
        rank = allowed // a_term
        if rank == 0:
            raise StaysDense(f"one term has {a_term:,} elements, its budget is {allowed:,}")
        check_saving(rank * a_term, elements)
    elif isinstance(rank, int) and not isinstance(rank, bool):
        rank = min(rank, elements // max(shape))  # no tensor of this shape needs more
    if init in ("fit", "power", "als"):
        check_fresh(init, [name for name in fresh if name != "generator"])
    start: Any = {"fit": "power", "kaiming": "normal"}.get(init, init)
    return start_canonical(twin(module), cast(int, rank), form=form, init=start, execution=execution, **fresh)


def _terms(weight: Tensor, layout: MatrixLayout, error: float, most: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Terms of a weight to a relative error, no more than save elements: for the modes out, in, *kernel."""
    check_finite(weight)
    (tensor,) = widened(((weight.transpose(0, 1) if layout.transposed else weight).detach(),))
    if most < 1:
        raise StaysDense("a single term saves no elements")
    if not bool(tensor.any()):
        raise ValueError("weight is zero, of which there is no relative error: use rank or budget")
    weights, factors = power_method(tensor, rank=most, error=error)
    if len(weights) == most:  # fewer have reached the error
        left = float(torch.linalg.vector_norm(tensor - cp_tensor(weights, factors)) / torch.linalg.vector_norm(tensor))
        if left > error:
            raise StaysDense(f"{most:,} terms, as many as save elements, leave an error of {left:.2g}")
    return weights, factors


# -------------------------------------------------------------------------------------------------------------- tensor


def _to_tensor(
    name: str,
    module: nn.Module,
    *,
    rank: Any = None,
    budget: float | None = None,
    error: float | None = None,
    modes: Modes | None = None,
    init: str = "fit",
    execution: Any = "auto",
    **fresh: Any,
) -> nn.Module:
    if init not in ("fit", "kaiming"):
        raise ValueError(f"init must be 'fit' or 'kaiming', got {init!r}")
    if init == "fit":
        check_fresh(init, list(fresh))
    weight = module._parameters["weight"]
    assert weight is not None
    split = _split(modes)
    if error is not None:
        check_error(error)
    else:
        network, cores = _network(name, weight, rank, budget, split), None
    if error is not None or init == "fit":
        found = decompose(weight.detach(), name, rank=rank, budget=budget, error=error, **split)
        network, cores = found.network, found.cores
    if rank is None:
        check_saving(network.parameters, weight.numel())
    layer = tensor_layer(module, network, cores if init == "fit" else None, execution=execution)
    if fresh:
        tensor_kaiming_(layer, **fresh)
    layer.requires_grad_(weight.requires_grad)
    return standing_for(module, layer, "weight")


def _network(name: str, weight: Tensor, rank: Any, budget: float | None, split: dict[str, Any]) -> TensorNetwork:
    if budget is None:
        return tensor_network(name, weight.shape, rank=rank, **split)
    allowed = allowed_by(budget, weight.numel())
    tensor_network(name, weight.shape, rank=1, **split)
    try:
        return tensor_network(name, weight.shape, budget=budget, **split)
    except ValueError:  # not of the modes or the shape, which have passed just now
        raise StaysDense(f"{allowed:,} elements are fewer than the format needs") from None


def _split(modes: Modes | None) -> dict[str, Any]:
    if modes is None:
        return {}
    if len(modes) != 2:
        raise ValueError(f"modes must be a pair (those of out, those of in), got {modes}")
    return {"out_modes": modes[0], "in_modes": modes[1]}


# --------------------------------------------------------------------------------------------------------------- kinds

_SPECTRAL = ("rank", "spectrum", "form", "execution", "init")
_FRESH = ("mode", "nonlinearity", "generator")
_TENSOR = ("rank", "budget", "error", "execution", "init", *_FRESH)
_PLANNED = ("cost", "example_input")
_LOW_RANK = ("rank", "budget", "energy", "unfolding", "init", "slope", "correct_bias", *_FRESH, *_PLANNED)

#: What `retract.nets.factorize` can make of layers, by name.
KINDS: dict[str, Kind] = {
    "svdp": Kind(_to_svdp, matrix_obstacle, _SPECTRAL),
    "sttp": Kind(_to_sttp, matrix_obstacle, (*_SPECTRAL, "modes")),
    "canonical": Kind(_to_canonical, canonical_obstacle, (*_TENSOR, "form")),
    "lowrank": Kind(to_low_rank, low_rank_obstacle, _LOW_RANK, plan_low_rank, _PLANNED),
    **{
        name: Kind(partial(_to_tensor, name), tensor_obstacle, (*_TENSOR, "modes") if format.splits else _TENSOR)
        for name, format in FORMATS.items()
    },
}
