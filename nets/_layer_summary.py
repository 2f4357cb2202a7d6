"""What one layer of a model holds and costs: a row of `retract.nets.summary`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retract.manifolds.cp_terms import degeneracy

from ._layers import TENSOR_LAYERS
from ._low_rank_cost import multiplications
from .layers.canonical import runs_factored
from .layers.factored import FACTORED, products
from .layers.low_rank import LowRankLayer
from .layers.tensor_formats import FORMATS, Format
from .layers.tensor_network import TensorNetwork
from .parametrizations._base import SpectralParametrization, spectral_weight
from .parametrizations.canonical import Canonical, canonical_weight
from .parametrizations.spectral import STTP

__all__ = ["LayerSummary", "layer_summary"]

#: Positions of the output for which a canonical layer is asked whether it runs on its terms, which it decides anew in
#: each call.
_POSITIONS = 4096
_FACTORED: tuple[type[nn.Module], ...] = tuple(FACTORED.values())
_TENSOR: tuple[type[nn.Module], ...] = tuple(TENSOR_LAYERS.values())


@dataclass(frozen=True)
class LayerSummary:
    """A linear layer, embedding or convolution of a model; all counts are of its weight alone.

    Floating-point operations, two a multiplication, are per output position of a convolution, per input position of a
    transposed one, per vector of a linear layer and per index of an embedding, where a dense look-up costs nothing.
    They are those of the way the layer runs; what making the weight or its factors costs, once a call, is not counted.
    Canonical layers, which choose it call by call, are described as they run for many positions (4096).
    """

    #: Name of the module in the model.
    name: str
    #: ``"svdp"``, ``"sttp"``, ``"canonical"``, ``"lowrank"``, ``"dense"``, or that of a tensor layer: the name of its
    #: format (`retract.nets.layers.tensor_formats`), ``"tensor"`` if it has none.
    kind: str
    #: Shape of the weight, in torch's order.
    shape: tuple[int, ...]
    #: Trainable elements stored.
    parameters: int
    #: Dimension of the set of weights that the layer can have. Of a tensor layer the elements stored, which bound it.
    degrees_of_freedom: int
    #: Elements of the weight.
    elements: int
    #: Floating-point operations as the layer runs.
    flops: int
    #: Floating-point operations of the dense layer.
    dense_flops: int
    #: Whether it runs on the factors and never builds the weight.
    factored: bool = False
    #: Rank of a spectral or low-rank weight's matrix, or matrices, or the number of terms of a canonical weight.
    rank: int | None = None
    #: Ranks of all bonds: of a tensor train from the first mode of out inward and from there to the first of fan_in,
    #: of a tensor layer in the order in which its cores have them.
    bonds: tuple[int, ...] | None = None
    #: The einsum that makes the weight of a tensor layer from its cores, ``"or,ir,hr,wr->oihw"``.
    equation: str | None = None
    #: Largest and smallest singular value of a spectral weight's matrix.
    largest: float | None = None
    smallest: float | None = None
    #: Sum of the magnitudes of a canonical weight's terms over the norm of their sum: 1 to sqrt(rank) where terms add
    #: up, far above where they cancel.
    degeneracy: float | None = None
    #: Why `retract.nets.factorize` leaves this layer dense: what keeps it from a spectral weight, or what the last
    #: call with ``budget``, ``error`` or ``energy`` found.
    obstacle: str = ""


@torch.no_grad()
def layer_summary(name: str, module: nn.Module, obstacle: str) -> LayerSummary:
    """The row of a layer.

    Args:
        name: of the layer in its model.
        module: one of `retract.nets._layers.weight_layers`.
        obstacle: why it is dense, if it is.
    """
    if isinstance(module, _TENSOR):
        return _tensor(name, module)
    if isinstance(module, LowRankLayer):
        return _low_rank(name, module)
    if (spectral := spectral_weight(module, "weight")) is not None:
        return _spectral(name, module, *spectral)
    if (canonical := canonical_weight(module)) is not None:
        return _canonical(name, module, *canonical)
    return _dense(name, module, obstacle)


def _spectral(
    name: str, module: nn.Module, parametrization: SpectralParametrization, originals: Sequence[Tensor]
) -> LayerSummary:
    values = parametrization.singular_values(*originals).double()
    factored = isinstance(module, _FACTORED) and len(module.parametrizations.weight) == 1  # type: ignore[union-attr, arg-type]
    dense_products, factored_products = products(module, parametrization.rank)
    return LayerSummary(
        name=name,
        kind=type(parametrization).__name__.lower(),
        shape=parametrization.layout.weight_shape,
        rank=parametrization.rank,
        bonds=parametrization.ranks if isinstance(parametrization, STTP) else None,
        parameters=sum(original.numel() for original in originals),
        degrees_of_freedom=parametrization.degrees_of_freedom,
        elements=math.prod(parametrization.layout.weight_shape),
        factored=factored,
        flops=2 * (factored_products if factored else dense_products),
        dense_flops=2 * dense_products,
        largest=float(values.amax()),
        smallest=float(values.amin()),
    )


def _canonical(name: str, module: nn.Module, parametrization: Canonical, originals: Sequence[Tensor]) -> LayerSummary:
    elements = math.prod(parametrization.shape)
    contraction: Any = parametrization.contraction
    alone = len(module.parametrizations.weight) == 1  # type: ignore[union-attr, arg-type]
    factored = alone and runs_factored(parametrization, _POSITIONS)
    return LayerSummary(
        name=name,
        kind="canonical",
        shape=parametrization.layout.weight_shape,
        rank=parametrization.rank,
        parameters=sum(original.numel() for original in originals),
        degrees_of_freedom=min(parametrization.degrees_of_freedom, elements),
        elements=elements,
        factored=factored,
        flops=2 * (contraction.cost.multiplications if factored else elements),
        dense_flops=2 * elements,
        degeneracy=float(degeneracy(*parametrization.terms(*originals))),
    )


def _tensor(name: str, module: Any) -> LayerSummary:
    network: TensorNetwork = module.network
    elements = math.prod(network.weight_shape)
    return LayerSummary(
        name=name,
        kind=_format(network),
        shape=network.weight_shape,
        bonds=tuple(network.dims[label] for label in network.bonds),
        equation=network.equation,
        parameters=network.parameters,
        degrees_of_freedom=network.parameters,
        elements=elements,
        factored=module.factored,
        flops=2 * (module.contraction.multiplications if module.factored else elements),
        dense_flops=2 * elements,
    )


def _low_rank(name: str, layer: LowRankLayer) -> LayerSummary:
    unfolding, rank = layer.unfolding, layer.rank
    rows, columns = unfolding.matrix_shape
    stride: tuple[int, ...] = getattr(layer, "stride", ())
    dense, per_rank = multiplications(unfolding, stride, [1] * len(stride))  # inputs of an output position: the stride
    return LayerSummary(
        name=name,
        kind="lowrank",
        shape=unfolding.weight_shape,
        rank=rank,
        parameters=unfolding.groups * rank * (rows + columns),
        degrees_of_freedom=unfolding.groups * rank * (rows + columns - rank),
        elements=math.prod(unfolding.weight_shape),
        factored=True,
        flops=2 * rank * per_rank,
        dense_flops=2 * dense,
    )


def _format(network: TensorNetwork) -> str:
    """The name of the format with these cores, ``"tensor"`` if none has them."""
    return next((name for name, one in FORMATS.items() if _has_cores(one, network)), "tensor")


def _has_cores(format: Format, network: TensorNetwork) -> bool:
    try:
        return format.cores(network.outputs, network.inputs, network.kernel) == network.cores
    except ValueError:  # the format is not for as many indices
        return False


def _dense(name: str, module: nn.Module, obstacle: str) -> LayerSummary:
    shape = _weight_shape(module)
    elements = math.prod(shape)
    flops = 0 if isinstance(module, nn.Embedding) else 2 * elements
    return LayerSummary(
        name=name,
        kind="dense",
        shape=shape,
        parameters=elements,
        degrees_of_freedom=elements,
        elements=elements,
        flops=flops,
        dense_flops=flops,
        obstacle=obstacle,
    )


def _weight_shape(module: Any) -> tuple[int, ...]:
    """From the layer's arguments: a weight may have no shape yet, or be one that reading it changes."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    if isinstance(module, nn.Embedding):
        return (module.num_embeddings, module.embedding_dim)
    first, second = module.out_channels, module.in_channels
    if module.transposed:
        first, second = second, first
    return (first, second // module.groups, *module.kernel_size)
