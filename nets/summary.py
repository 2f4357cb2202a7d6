"""What the layers of a model hold and cost: ranks, degrees of freedom, multiplications, singular values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ._layer_summary import LayerSummary, layer_summary
from ._layers import note_of, obstacles, weight_layers
from ._text_table import text_table

__all__ = ["LayerSummary", "Summary", "summary"]


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
        """Those of the factored weights, and every element outside of them, running statistics included."""
        return self._outside + sum(layer.degrees_of_freedom for layer in self._factored)

    @property
    def elements(self) -> int:
        """What `degrees_of_freedom` would be if all layers were dense."""
        return self._outside + sum(layer.elements for layer in self._factored)

    @property
    def compression(self) -> float:
        """Degrees of freedom in percent of the elements: Z of Obukhov et al., AISTATS 2021, eq. (11)."""
        return 100 * self.degrees_of_freedom / max(self.elements, 1)

    @property
    def dense_parameters(self) -> int:
        """What `parameters` would be if all layers were dense."""
        return self.elements - self.running_statistics

    @property
    def _factored(self) -> list[LayerSummary]:
        return [layer for layer in self.layers if layer.kind != "dense"]

    @property
    def _outside(self) -> int:
        """Elements outside of factored weights: the C_l of eq. (11), and dense weights."""
        return self.parameters + self.running_statistics - sum(layer.parameters for layer in self._factored)

    def __str__(self) -> str:
        lines = _table(self.layers)
        networks = {layer.equation: layer.kind for layer in self.layers if layer.equation is not None}
        lines += [f"{kind}: {equation}, ranks {_bonds(equation)}" for equation, kind in networks.items()]
        lines += [f"{layer.name or '(model)'} is dense: {layer.obstacle}" for layer in self.layers if layer.obstacle]
        lines.append(
            f"Z = {self.compression:.2f} %: {self.degrees_of_freedom:,} degrees of freedom, where the dense model has "
            f"{self.elements:,} elements; {self.parameters:,} parameters are stored"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Describe a model's linear layers, embeddings and convolutions, and how far factored weights compress it.

    Z counts degrees of freedom, not what is stored (of tensor layers the elements of their cores, some of which are
    gauge); biases, and normalisation layers with their running statistics, count on both sides. Singular values are
    those of the weights' matrices, computed from the stored factors. A module that the model holds under several
    names is listed once.

    Returns:
        A `Summary`: ``layers`` has a row for each layer, ``compression`` is Z, and its string is a table.

    Raises:
        ValueError: a lazy layer whose weight has no shape yet.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"model: {name} has no shape yet: run one forward pass of the lazy model first")
    reasons = obstacles(model)
    statistics = (
        statistic
        for module in model.modules()
        if isinstance(module, _NormBase)
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    )
    return Summary(
        layers=tuple(
            layer_summary(name, module, note_of(module) or reasons.get(name, ""))
            for name, module in weight_layers(model).items()
        ),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        running_statistics=sum(statistic.numel() for statistic in statistics),
    )


#: Of each column the header, the text of a layer's cell, and whether it is there for every model.
_COLUMNS: tuple[tuple[str, Callable[[LayerSummary], str], bool], ...] = (
    ("layer", lambda layer: layer.name or "(model)", True),
    ("weight", lambda layer: "x".join(map(str, layer.shape)), True),
    ("kind", lambda layer: layer.kind, True),
    ("rank", lambda layer: _rank(layer), True),
    ("stored", lambda layer: f"{layer.parameters:,}", True),
    ("DOF", lambda layer: f"{layer.degrees_of_freedom:,}", True),
    ("elements", lambda layer: f"{layer.elements:,}", True),
    ("FLOPs", lambda layer: f"{layer.flops:,}", True),
    ("if dense", lambda layer: f"{layer.dense_flops:,}", True),
    ("runs", lambda layer: "factored" if layer.factored else "dense", True),
    ("largest s", lambda layer: _figure(layer.largest), False),
    ("least s", lambda layer: _figure(layer.smallest), False),
    ("degeneracy", lambda layer: _figure(layer.degeneracy), False),
)
_TEXT = 3  # columns of text, on the left


def _bonds(equation: str) -> str:
    """The indices that are summed, in the order of the ranks."""
    cores, external = equation.split("->")
    return ",".join(label for label in dict.fromkeys(cores.replace(",", "")) if label not in external)


def _rank(layer: LayerSummary) -> str:
    if layer.equation is not None:
        return ",".join(map(str, layer.bonds or ()))
    return "" if layer.rank is None else str(layer.rank)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(layers: Sequence[LayerSummary]) -> list[str]:
    """Lines of the table: columns that no layer of the model fills are left out."""
    columns = [[header, *map(text, layers)] for header, text, always in _COLUMNS if always or any(map(text, layers))]
    return text_table(list(zip(*columns, strict=True)), _TEXT)
