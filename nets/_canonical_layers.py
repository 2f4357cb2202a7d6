"""The canonical layers of a model as truncation sees them, and how many terms each is to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from retract.manifolds.cp_truncation import Selection, select_terms

from ._rank_allocation import allocate_ranks
from .parametrizations.canonical import Canonical
from .parametrizations.models import canonical_weights

__all__ = ["CanonicalLayer", "canonical_layers", "ranks_by_error", "ranks_by_name", "ranks_by_ratio"]


@dataclass(frozen=True)
class CanonicalLayer:
    """A weight that is a sum of rank-one terms, and the order in which its terms are worth keeping."""

    #: Names of the module in the model, and of the weight in the module.
    module: str
    weight: str
    parametrization: Canonical
    #: Weights (R,) and a factor (R, d) for each mode that is stored.
    originals: tuple[Tensor, ...]
    #: Weights with sigma in them, and unit vectors of all modes.
    weights: Tensor
    factors: tuple[Tensor, ...]
    selection: Selection

    @property
    def name(self) -> str:
        """That of the module; of a weight that is not called "weight" its own."""
        return self.module if self.weight == "weight" else f"{self.module}.{self.weight}".lstrip(".")

    @property
    def rank(self) -> int:
        """The number of terms R."""
        return len(self.weights)

    @property
    def parameters_per_term(self) -> int:
        """Elements stored for one term."""
        return sum(original.numel() for original in self.originals) // self.rank

    def describe(self) -> str:
        """For error messages."""
        return f"layer {self.name!r}" if self.name else "the layer"


def canonical_layers(model: nn.Module) -> list[CanonicalLayer]:
    """All of a model, in its order.

    Raises:
        ValueError: none; terms that are not finite, or that do not alone make the weight.
    """
    layers = []
    for path, parametrization, originals in canonical_weights(model):
        module, _, weight = path.rpartition(".")
        label = f"weight {path!r}"
        stored: Any = model.get_submodule(module).parametrizations
        if len(stored[weight]) > 1:
            raise ValueError(f"{label} has another parametrization on top of its terms: remove that before")
        weights, factors = parametrization.terms(*originals)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (weights, *factors)):
            raise ValueError(f"{label} has terms that are NaN or infinite, or vectors that are zero")
        selection = select_terms(weights, factors)
        layers.append(CanonicalLayer(module, weight, parametrization, originals, weights, factors, selection))
    if not layers:
        raise ValueError("model has no canonical layer: see retract.nets.parametrizations.canonical_weight_norm")
    return layers


def ranks_by_ratio(layers: list[CanonicalLayer], ratio: float) -> list[int]:
    """The same part of the terms of each layer, rounded down."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    ranks = [math.floor(ratio * layer.rank * (1 + 1e-12)) for layer in layers]  # 0.57 of 100 are 57: in floats 56.99...
    for layer, rank in zip(layers, ranks, strict=True):
        if rank == 0:
            raise ValueError(f"ratio={ratio} would leave {layer.describe()} without terms: it has {layer.rank}")
    return ranks


def ranks_by_name(layers: list[CanonicalLayer], ranks: int | Mapping[str, int]) -> list[int]:
    """What is asked for, for all layers or by names and patterns; at most the terms that there are."""
    chosen = [layer.rank for layer in layers]
    open_ = set(range(len(layers)))
    for pattern, rank in (ranks if isinstance(ranks, Mapping) else {"*": ranks}).items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"ranks must be ints, got {rank!r} for {pattern!r}")
        fitting = [index for index, layer in enumerate(layers) if _fits(layer.name, pattern)]
        if not fitting:
            names = ", ".join(repr(layer.name) for layer in layers[:8])
            raise ValueError(f"ranks: {pattern!r} fits no canonical layer of the model, which has {names}")
        if rank < 1:
            raise ValueError(f"ranks={rank} would leave {layers[fitting[0]].describe()} without terms")
        for index in open_.intersection(fitting):
            chosen[index] = min(rank, layers[index].rank)
        open_.difference_update(fitting)
    return chosen


def ranks_by_error(layers: list[CanonicalLayer], error: float) -> list[int]:
    """The fewest parameters with which the root mean square of the layers' relative errors is at most ``error``."""
    if not 0 <= error < 1:
        raise ValueError(f"error must be in [0, 1), got {error}: at 1 nothing of a layer need be left")
    curves = []
    for layer in layers:
        errors = layer.selection.errors
        if not float(errors[0]) > 0:
            raise ValueError(f"{layer.describe()} has weight zero: a truncation by error would leave it without terms")
        curves.append((errors / errors[0]).square().tolist())
    return allocate_ranks(curves, [layer.parameters_per_term for layer in layers], len(layers) * error**2)


def _fits(name: str, pattern: str) -> bool:
    ancestors = accumulate(name.split("."), "{}.{}".format)
    return any(fnmatchcase(ancestor, pattern) for ancestor in ancestors)
