"""Train first, truncate after: canonical layers with fewer terms, and the optimizer's state for what is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from retract.manifolds.cp_terms import cp_norm
from retract.manifolds.cp_truncation import refit

from ._canonical_layers import CanonicalLayer, canonical_layers, ranks_by_error, ranks_by_name, ranks_by_ratio
from ._canonical_pressure import canonical_penalty, shrink_terms_
from ._text_table import text_table
from .parametrizations.canonical import canonical_weight, put_terms

__all__ = ["LayerTruncation", "Truncation", "canonical_penalty", "shrink_terms_", "truncate"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LayerTruncation:
    """What became of one canonical layer; parameters are those of its terms, sigma and bias not among them."""

    #: Name of the module in the model.
    name: str
    old_rank: int
    new_rank: int
    #: Frobenius norm of the change of the weight over that of the weight.
    error: float
    parameters_before: int
    parameters_after: int


class Kept(NamedTuple):
    """What has become of a parameter."""

    #: The parameter of the truncated model.
    parameter: nn.Parameter
    #: Rows of the old one that it consists of; None for all, where nothing was truncated.
    rows: Tensor | None


@dataclass(frozen=True)
class Truncation(Generic[Model]):
    """A truncated model, what was lost, and where its parameters come from. ``str`` is a table."""

    model: Model
    layers: tuple[LayerTruncation, ...]
    #: For each parameter of the old model by its name, that of the new one and the rows that are left.
    new_parameters: dict[str, Kept]
    _old: dict[str, nn.Parameter] = field(repr=False)

    @property
    def error(self) -> float:
        """Root mean square of the relative errors of the layers."""
        return math.sqrt(math.fsum(layer.error**2 for layer in self.layers) / len(self.layers))

    @property
    def table(self) -> str:
        """A row for each canonical layer, and their sum."""
        before = sum(layer.parameters_before for layer in self.layers)
        after = sum(layer.parameters_after for layer in self.layers)
        rows = [
            ("layer", "terms", "kept", "error", "parameters", "kept"),
            *(_cells(layer) for layer in self.layers),
            ("together", "", "", f"{self.error:.4f}", f"{before:,}", f"{after:,}"),
        ]
        return "\n".join(text_table(rows, 1))

    def __str__(self) -> str:
        return self.table

    @torch.no_grad()
    def carry_state(self, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
        """Give the new model's optimizer the state that the old one's had: moments, of factors the rows that are left.

        Learning rates and other options are those that ``new`` was made with.

        Args:
            old: an optimizer of the model that was truncated.
            new: one of the same class, made of the parameters of the truncated model, not yet stepped.

        Raises:
            ValueError: ``old`` steps a parameter whose successor ``new`` does not have, which then would not be
                trained; optimizers of two classes; or state that is no tensor or number by parameter. ``new`` is
                unchanged then.
        """
        if type(old) is not type(new):
            raise ValueError(f"new must be of old's class, {type(old).__name__}, got {type(new).__name__}")
        stepped, has = ({id(p) for group in one.param_groups for p in group["params"]} for one in (old, new))
        names = [name for name, parameter in self._old.items() if id(parameter) in stepped]
        if not names:
            raise ValueError("old steps no parameter of the model that was truncated")
        missing = [name for name in names if id(self.new_parameters[name].parameter) not in has]
        if missing:
            shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            raise ValueError(
                f"new lacks {shown} of the truncated model, which would not be trained: make it of the parameters of "
                "Truncation.model"
            )
        carried = {}
        for name in names:
            (parameter, rows), before = self.new_parameters[name], self._old[name]
            state = old.state.get(before, {})
            carried[parameter] = {
                key: _carried(key, value, rows, len(before) if before.ndim else 1) for key, value in state.items()
            }
        new.state.update({parameter: state for parameter, state in carried.items() if state})


@torch.no_grad()
def truncate(
    model: Model,
    *,
    error: float | None = None,
    ratio: float | None = None,
    ranks: int | Mapping[str, int] | None = None,
) -> Truncation[Model]:
    """A copy of a model whose canonical layers have fewer terms: those that matter most, with weights refitted.

    Terms are ordered greedily by the Gram formula (`retract.manifolds.canonical.select_terms`), and the weights of
    those kept are fitted to the whole (`refit`): the truncated weight is the nearest that they can make. Vectors of
    the terms are kept to the bit, in their order. The parameters are new ones: make the optimizer anew, and
    let `Truncation.carry_state` fill it, else fine-tuning trains the old model's.

    Exactly one of the following:

    Args:
        model: a network with canonical layers, or one such layer; it is left as it is.
        error: root mean square over the canonical layers of the relative Frobenius errors of their weights, in
            [0, 1); the fewest parameters within it. Terms go first where a parameter less costs the least squared
            relative error (`allocate_ranks`). 0 removes the terms that are zero, or that others make up for.
        ratio: the part of its terms that each layer keeps, in (0, 1], rounded down.
        ranks: how many terms a layer keeps: an int for all, or by names or patterns (`fnmatch`) of layers or modules
            around them, where the first that fits a layer holds. Layers without one, or with fewer terms, keep all.

    Returns:
        A `Truncation`.

    Raises:
        ValueError: not exactly one argument, one out of range, a pattern that fits no layer, a truncation that would
            leave a layer without terms, weights that are not finite, or another parametrization on top of one.
    """
    if sum(argument is not None for argument in (error, ratio, ranks)) != 1:
        raise ValueError(f"give one of error, ratio and ranks, got error={error}, ratio={ratio}, ranks={ranks}")
    layers = canonical_layers(model)
    if error is not None:
        counts = ranks_by_error(layers, error)
    elif ratio is not None:
        counts = ranks_by_ratio(layers, ratio)
    else:
        assert ranks is not None
        counts = ranks_by_name(layers, ranks)
    truncated = copy.deepcopy(model)
    rows: dict[int, Tensor] = {}
    reports = []
    for layer, count in zip(layers, counts, strict=True):
        kept = layer.selection.order[:count].sort().values
        if count < layer.rank:
            rows |= dict.fromkeys(map(id, layer.originals), kept)
        reports.append(_cut(truncated.get_submodule(layer.module), layer, kept))
    old, new = dict(model.named_parameters()), dict(truncated.named_parameters())
    new_parameters = {name: Kept(new[name], rows.get(id(parameter))) for name, parameter in old.items()}
    return Truncation(truncated, tuple(reports), new_parameters, old)


def _cut(module: nn.Module, layer: CanonicalLayer, kept: Tensor) -> LayerTruncation:
    """Leave a layer of the copy with some of its terms, their vectors as they were stored."""
    error = 0.0
    if len(kept) < layer.rank:
        weights = refit(layer.weights, layer.factors, kept)
        change = layer.weights.double().index_add(0, kept, weights.double(), alpha=-1)
        wide = [factor.double() for factor in layer.factors]
        norm = cp_norm(layer.weights.double(), wide)
        error = float(cp_norm(change, wide) / norm) if norm > 0 else 0.0
        put_terms(module, weights, [factor[kept] for factor in layer.factors], name=layer.weight)
        found = canonical_weight(module, layer.weight)
        assert found is not None
        # Vectors of the length they had, which sets how far a step turns them.
        stored = (weights / layer.parametrization.sigma.to(weights), *(factor[kept] for factor in layer.originals[1:]))
        for new, old, value in zip(found[1], layer.originals, stored, strict=True):
            new.requires_grad_(old.requires_grad).copy_(value)
    per_term = layer.parameters_per_term
    return LayerTruncation(layer.name, layer.rank, len(kept), error, layer.rank * per_term, len(kept) * per_term)


def _carried(key: str, value: Any, rows: Tensor | None, length: int) -> Any:
    """One entry of the state of a parameter whose first dimension had ``length`` slices."""
    if not isinstance(value, Tensor):
        if value is None or isinstance(value, bool | int | float):
            return value
        raise ValueError(f"old keeps {key!r}, a {type(value).__name__}, for a parameter: it cannot be carried over")
    if rows is None or value.ndim == 0 or value.shape[0] == 1:
        return value.clone()
    if value.shape[0] != length:
        raise ValueError(
            f"old keeps {key!r} of shape {tuple(value.shape)} for {length} terms: it cannot be carried over"
        )
    return value[rows.to(value.device)]


def _cells(layer: LayerTruncation) -> tuple[str, ...]:
    return (
        layer.name or "(model)",
        str(layer.old_rank),
        str(layer.new_rank),
        f"{layer.error:.4f}",
        f"{layer.parameters_before:,}",
        f"{layer.parameters_after:,}",
    )
