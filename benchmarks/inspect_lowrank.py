"""``retract inspect MODEL --lowrank``: what layers of low rank would cost, and the error of each initialization."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer
from torch import nn

from retract.nets._observation import observe
from retract.nets._text_table import text_table
from retract.nets.compress import factorize
from retract.nets.init.function_error import function_error
from retract.nets.layers.low_rank import LowRankLayer, low_rank_layer

from .model_argument import load_model_and_input

__all__ = ["START", "LowRankRow", "lowrank_rows", "lowrank_text"]

DEFAULT_BUDGET = 0.25
#: The initializations compared, and their options for `retract.nets.layers.low_rank_layer`.
START: dict[str, dict[str, Any]] = {
    "spectral": {"method": "spectral"},
    "scaled": {"method": "scaled"},
    "relu": {"method": "relu"},
    "relu_dc": {"method": "relu_dc"},
    "relu + bias": {"method": "relu", "correct_bias": True},
}


@dataclass(frozen=True)
class LowRankRow:
    """A layer, and what would become of it with a weight of low rank."""

    name: str
    shape: tuple[int, ...]
    rank: int
    #: Elements of the weight.
    dense_parameters: int
    #: Elements of the two factors.
    parameters: int
    #: What follows in the model: ``"BatchNorm"``, ``"ReLU"``, both, a leaky ReLU, or nothing.
    following: str
    #: Of the rectifier that follows; 1 where there is none.
    slope: float
    #: |U V - W|² / |W|² of the nearest matrix.
    matrix_error: float
    #: Of each initialization E |s(layer(x)) - s(full(x))|² / E |s(full(x))|² for x ~ N(0, I).
    function_error: dict[str, float]


@torch.no_grad()
def lowrank_rows(model: nn.Module, example_input: Any, **options: Any) -> list[LowRankRow]:
    """Rows of the layers that `retract.nets.factorize` would give a weight of low rank.

    Args:
        model: a network; it is left as it is.
        example_input: one tensor, or the tuple of positional arguments of a forward pass.
        options: of `retract.nets.factorize` that choose layers, ranks and unfoldings.

    Raises:
        ValueError, TypeError: as `retract.nets.factorize`.
    """
    converted = factorize(copy.deepcopy(model), "lowrank", example_input=example_input, **options)
    layers = {name: layer for name, layer in converted.named_modules() if isinstance(layer, LowRankLayer)}
    dense = {name: model.get_submodule(name) for name in layers}
    dense = {name: layer for name, layer in dense.items() if not isinstance(layer, LowRankLayer)}
    seen = observe(model, dense, example_input)
    return [_row(name, layer, layers[name], seen[name].following) for name, layer in dense.items()]


def _row(name: str, dense: Any, converted: LowRankLayer, following: Any) -> LowRankRow:
    slope = following.slope
    sizes: dict[str, Any] = {"unfolding": converted.unfolding.kind, "slope": slope}
    layers = {start: low_rank_layer(dense, converted.rank, **sizes, **chosen) for start, chosen in START.items()}
    difference = layers["spectral"].weight - dense.weight
    return LowRankRow(
        name=name,
        shape=tuple(dense.weight.shape),
        rank=converted.rank,
        dense_parameters=dense.weight.numel(),
        parameters=converted.left.numel() + converted.right.numel(),
        following=str(following),
        slope=slope,
        matrix_error=float(difference.double().square().sum() / dense.weight.double().square().sum()),
        function_error={start: function_error(layer, dense, slope=slope) for start, layer in layers.items()},
    )


def lowrank_text(spec: str, input_shape: str | None, batch: int, options: Mapping[str, Any], as_json: bool) -> str:
    """The table of a model, its weights drawn with a seed, or JSON.

    Args:
        spec: of the model.
        input_shape: of one input, if it is not the model's own.
        batch: inputs in the batch.
        options: rank, budget, energy, unfolding and skip, and others that must be None.
        as_json: for JSON.

    Raises:
        typer.BadParameter: an option that means nothing here, or that is not allowed.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    allowed = ("rank", "budget", "energy", "unfolding", "skip")
    if unused := [f"--{name}" for name in chosen if name not in allowed]:
        raise typer.BadParameter("means nothing with --lowrank", param_hint=" and ".join(unused))
    if not chosen.keys() & {"rank", "budget", "energy"}:
        chosen["budget"] = DEFAULT_BUDGET
    if "skip" in chosen:
        chosen["skip"] = [pattern.strip() for pattern in chosen["skip"].split(",") if pattern.strip()]
    torch.manual_seed(0)
    model, example_input = load_model_and_input(spec, input_shape, batch)
    try:
        rows = lowrank_rows(model, example_input, **chosen)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--lowrank") from error
    return json.dumps({"layers": [asdict(row) for row in rows]}, indent=2) if as_json else _table(rows)


def _table(rows: list[LowRankRow]) -> str:
    header = ["layer", "weight", "followed by", "rank", "parameters", "dense", "matrix error", *START]
    cells = [
        [
            *(row.name or "(model)", "x".join(map(str, row.shape)), row.following),
            *(f"{row.rank}", f"{row.parameters:,}", f"{row.dense_parameters:,}", f"{row.matrix_error:.4f}"),
            *(f"{error:.4f}" for error in row.function_error.values()),
        ]
        for row in rows
    ]
    stored, whole = sum(row.parameters for row in rows), sum(row.dense_parameters for row in rows)
    total = (
        f"{len(rows)} layers: {stored:,} parameters for {whole:,} ({100 * stored / whole:.1f} %); others stay dense."
    )
    return "\n".join((*text_table([header, *cells], _TEXT), total, *_NOTES))


_TEXT = 3  # columns of text, on the left
_NOTES = (
    "Columns from spectral on: relative error of the layer's function, its rectifier included, for inputs N(0, I).",
    "A BatchNorm that follows removes the lengths of filters: spectral, scaled and relu are one function before it.",
)
