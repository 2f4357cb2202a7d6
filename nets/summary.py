"""What the layers of a model hold and cost: ranks, degrees of freedom, multiplications, singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ._layers import matrix_layers, obstacles
from .layers.factored import FACTORED, products
from .parametrizations._base import SpectralParametrization
from .parametrizations.models import spectral_weights
from .parametrizations.spectral import STTP

__all__ = ["LayerSummary", "Summary", "summary"]

_FACTORED: tuple[type[nn.Module], ...] = tuple(FACTORED.values())


@dataclass(frozen=True)
class LayerSummary:
    """A linear layer, embedding or convolution of a model; all counts are of its weight alone.

    Floating-point operations, two a multiplication, are per output position of a convolution, per input position of a
    transposed one, per vector of a linear layer and per index of an embedding, where a dense look-up costs nothing.
    They are those of the way the layer runs; what making the weight or its factors costs, once a call, is not counted.
    """

    #: Name of the module in the model.
    name: str
    #: ``"svdp"``, ``"sttp"`` or ``"dense"``.
    kind: str
    #: Shape of the weight, in torch's order.
    shape: tuple[int, ...]
    #: Trainable elements stored.
    parameters: int
    #: Dimension of the set of weights that the layer can have.
    degrees_of_freedom: int
    #: Elements of the weight.
    elements: int
    #: Floating-point operations as the layer runs.
    flops: int
    #: Floating-point operations of the dense layer.
    dense_flops: int
    #: Whether it runs on the factors and never builds the weight.
    factored: bool = False
    #: Rank of a spectral weight's matrix.
    rank: int | None = None
    #: Ranks of all bonds of a tensor train, from the first mode of out inward and from there to the first of fan_in.
    bonds: tuple[int, ...] | None = None
    #: Largest and smallest singular value of a spectral weight's matrix.
    largest: float | None = None
    smallest: float | None = None
    #: Why `retract.nets.factorize` leaves this layer dense, if it has to.
    obstacle: str = ""


@dataclass(frozen=True)
class Summary:
    """The layers of a model, in its order, and totals for the whole of it. ``str`` is a table."""

    layers: tuple[LayerSummary, ...]
    #: Elements of all parameters of the model.
    parameters: int
    #: Elements of the running means and variances of its normalisation layers.
    running_statistics: int

    @property
    def degrees_of_freedom(self) -> int:
        """Those of the spectral weights, and every element outside of them, running statistics included."""
        return self._outside + sum(layer.degrees_of_freedom for layer in self._spectral)

    @property
    def elements(self) -> int:
        """What `degrees_of_freedom` would be if all layers were dense."""
        return self._outside + sum(layer.elements for layer in self._spectral)

    @property
    def compression(self) -> float:
        """Degrees of freedom in percent of the elements: Z of Obukhov et al., AISTATS 2021, eq. (11)."""
        return 100 * self.degrees_of_freedom / max(self.elements, 1)

    @property
    def _spectral(self) -> list[LayerSummary]:
        return [layer for layer in self.layers if layer.kind != "dense"]

    @property
    def _outside(self) -> int:
        """Elements outside of spectral weights: the C_l of eq. (11), and dense weights."""
        return self.parameters + self.running_statistics - sum(layer.parameters for layer in self._spectral)

    def __str__(self) -> str:
        rows = [_HEADER, *(_cells(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        lines += [f"{layer.name or '(model)'} is dense: {layer.obstacle}" for layer in self.layers if layer.obstacle]
        lines.append(
            f"Z = {self.compression:.2f} %: {self.degrees_of_freedom:,} degrees of freedom, where the dense model has "
            f"{self.elements:,} elements; {self.parameters:,} parameters are stored"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Describe a model's linear layers, embeddings and convolutions, and how far spectral weights compress it.

    Z counts degrees of freedom, not what is stored; biases, and normalisation layers with their running statistics,
    count on both sides. Singular values are those of the weights' matrices, computed from the stored factors. A
    module that the model holds under several names is listed once.

    Returns:
        A `Summary`: ``layers`` has a row for each layer, ``compression`` is Z, and its string is a table.

    Raises:
        ValueError: a lazy layer whose weight has no shape yet.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"model: {name} has no shape yet: run one forward pass of the lazy model first")
    spectral = {name: (parametrization, originals) for name, parametrization, originals in spectral_weights(model)}
    reasons = obstacles(model)
    rows = []
    for name, module in matrix_layers(model).items():
        found = spectral.get(f"{name}.weight" if name else "weight")
        rows.append(_dense(name, module, reasons.get(name, "")) if found is None else _spectral(name, module, *found))
    statistics = (
        statistic
        for module in model.modules()
        if isinstance(module, _NormBase)
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    )
    return Summary(
        layers=tuple(rows),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        running_statistics=sum(statistic.numel() for statistic in statistics),
    )


@torch.no_grad()
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


_HEADER = (
    *("layer", "weight", "kind", "rank", "stored", "DOF", "elements"),
    *("FLOPs", "if dense", "runs", "largest s", "least s"),
)
_TEXT = 3  # columns of text, on the left


def _cells(layer: LayerSummary) -> tuple[str, ...]:
    return (
        layer.name or "(model)",
        "x".join(map(str, layer.shape)),
        layer.kind,
        "" if layer.rank is None else str(layer.rank),
        f"{layer.parameters:,}",
        f"{layer.degrees_of_freedom:,}",
        f"{layer.elements:,}",
        f"{layer.flops:,}",
        f"{layer.dense_flops:,}",
        "factored" if layer.factored else "dense",
        *("" if value is None else f"{value:.4g}" for value in (layer.largest, layer.smallest)),
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column < _TEXT else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
