"""How far low-rank layers are from the layers they copy, by initialization, and what finding their factors costs.

A layer is a square matrix and the ReLU after it. Errors are relative: E |s(Y x + b) - s(W x)|² / E |s(W x)|².
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retract.nets.init.arc_cosine import kernel
from retract.nets.init.function_error import function_error, monte_carlo_error
from retract.nets.init.low_rank import LowRankMethod, lowrank_factors, lowrank_factors_with_bias

from .grid import Stopping
from .timing import interleave

__all__ = [
    "FRACTIONS",
    "INITIALIZATIONS",
    "PROBLEMS",
    "SIZES",
    "CostCell",
    "ErrorCell",
    "Initialization",
    "Inputs",
    "cost_cells",
    "error_cells",
    "inputs_of",
    "measure_costs",
    "measure_errors",
    "weight_of",
]

SIZES = (64, 256, 1024)
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # rank over size
PROBLEMS = (
    ("Gaussian", "white"),
    ("orthogonal", "white"),
    ("decaying", "white"),
    ("Gaussian", "1/k"),
    ("Gaussian", "rectified"),
)
"""Weights and inputs. Decaying: singular values k^-1/2. 1/k: Gaussian with variances in these ratios. Rectified: behind
a layer of Gaussian weights and its ReLU. The mean square of inputs is 1 (of rectified ones, nearly).
"""
DRAWS = {64: 20, 256: 5, 1024: 1}  # by size: large matrices of one law are all alike
SAMPLES = 8192  # of inputs that are not Gaussian
COST_SECONDS, COST_ROUNDS = 2.0, 5


class Initialization(NamedTuple):
    """A method of `lowrank_factors`, with a bias or not, for the inputs' second moments or for white inputs."""

    method: LowRankMethod
    bias: bool = False
    whitened: bool = False


INITIALIZATIONS = {
    "spectral": Initialization("spectral"),
    "scaled": Initialization("scaled"),
    "relu": Initialization("relu"),
    "relu_dc": Initialization("relu_dc"),
    "relu_varpro": Initialization("relu_varpro"),
    "relu, bias": Initialization("relu", bias=True),
    "whitened": Initialization("spectral", whitened=True),
    "whitened relu": Initialization("relu", whitened=True),
    "whitened relu, bias": Initialization("relu", bias=True, whitened=True),
}


@dataclass(frozen=True)
class ErrorCell:
    """The errors of all initializations of one problem."""

    size: int
    rank: int
    weights: str
    inputs: str
    part: str = "errors"


@dataclass(frozen=True)
class CostCell:
    """The times of all initializations of a Gaussian matrix beside that of its singular value decomposition."""

    size: int
    rank: int
    dtype: str
    part: str = "costs"


def error_cells() -> list[ErrorCell]:
    """A cell for each row of the tables of errors."""
    grid = product(PROBLEMS, SIZES, FRACTIONS)
    return [ErrorCell(size, max(1, round(size * part)), *problem) for problem, size, part in grid]


def cost_cells() -> list[CostCell]:
    """A cell for each row of the table of costs."""
    grid = product(("float32", "float64"), SIZES, FRACTIONS)
    return [CostCell(size, max(1, round(size * part)), dtype) for dtype, size, part in grid]


# -------------------------------------------------------------------------------------------------------- problems


class Inputs(NamedTuple):
    """The law of a layer's inputs: Gaussian of mean zero, or whatever has given the samples."""

    second: Tensor  # E x xᵀ
    mean: Tensor
    samples: Tensor | None = None


def weight_of(law: str, size: int, generator: torch.Generator) -> Tensor:
    """A square matrix in float64, of one of the laws in `PROBLEMS`."""
    gaussian: Tensor = torch.randn(size, size, dtype=torch.float64, generator=generator) / math.sqrt(size)
    if law == "Gaussian":
        return gaussian
    left, _, right = torch.linalg.svd(gaussian)
    values = torch.ones(size, dtype=torch.float64) if law == "orthogonal" else _indices(size).rsqrt()
    weight: Tensor = (left * values) @ right
    return weight


def inputs_of(law: str, size: int, generator: torch.Generator) -> Inputs:
    """Inputs of one of the laws in `PROBLEMS`, with exact moments."""
    zero = torch.zeros(size, dtype=torch.float64)
    if law == "white":
        return Inputs(torch.eye(size, dtype=torch.float64), zero)
    if law == "1/k":
        variances = 1 / _indices(size)
        return Inputs(torch.diag(variances / variances.mean()), zero)
    before = math.sqrt(2 / size) * torch.randn(size, size, dtype=torch.float64, generator=generator)
    norms = torch.linalg.vector_norm(before, dim=1)
    # E s(g·z) s(h·z) = |g||h| kappa / 2 for white z; E s(g·z) = |g| / sqrt(2 pi).
    lengths = torch.outer(norms, norms)
    second = lengths / 2 * kernel((before @ before.mT / lengths).clamp(-1, 1))
    samples = torch.randn(SAMPLES, size, dtype=torch.float64, generator=generator) @ before.mT
    return Inputs((second + second.mT) / 2, norms / math.sqrt(2 * math.pi), samples.relu())


def _indices(size: int) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- errors


def measure_errors(cell: ErrorCell, stopping: Stopping) -> dict[str, Any] | None:
    """``errors`` of every initialization, a list over draws of weight and inputs; None if it was stopped first.

    Of white inputs there are none for whitened initializations, which are the others then.
    """
    torch.set_num_threads(1)
    errors: dict[str, list[float]] = {}
    for draw in range(DRAWS[cell.size]):
        generator = torch.Generator().manual_seed(draw)
        weight = weight_of(cell.weights, cell.size, generator)
        inputs = inputs_of(cell.inputs, cell.size, generator)
        for name, initialization in INITIALIZATIONS.items():
            if stopping():
                return None
            if cell.inputs != "white" or not initialization.whitened:
                layer = initialized(weight, cell.rank, initialization, inputs)
                errors.setdefault(name, []).append(_error(layer, weight, inputs))
    return {"errors": errors}


def initialized(weight: Tensor, rank: int, initialization: Initialization, inputs: Inputs) -> nn.Linear:
    """The low-rank layer, as a dense one.

    With moments of the inputs, and a bias to take up their mean, it is fitted on x - E x.
    """
    method, with_bias, whitened = initialization
    if not with_bias:
        covariance = inputs.second if whitened else None
        return _dense(*lowrank_factors(weight, rank=rank, method=method, covariance=covariance))
    if not whitened:
        return _dense(*lowrank_factors_with_bias(weight, rank=rank, method=method))
    centred = inputs.second - torch.outer(inputs.mean, inputs.mean)
    left, right, bias = lowrank_factors_with_bias(
        weight, weight @ inputs.mean, rank=rank, method=method, covariance=centred
    )
    return _dense(left, right, bias - left @ (right @ inputs.mean))


def _dense(left: Tensor, right: Tensor, bias: Tensor | None = None) -> nn.Linear:
    weight = left @ right
    options: dict[str, Any] = {"bias": bias is not None, "dtype": weight.dtype}
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, *weight.mT.shape, **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _error(layer: nn.Linear, weight: Tensor, inputs: Inputs) -> float:
    if inputs.samples is None:
        return function_error(layer, weight, covariance=inputs.second)
    with torch.no_grad():
        return monte_carlo_error(layer, partial(torch.nn.functional.linear, weight=weight), inputs.samples).error


# ----------------------------------------------------------------------------------------------------------- costs


def measure_costs(cell: CostCell, stopping: Stopping) -> dict[str, Any] | None:
    """``seconds`` of the singular value decomposition and of every initialization: median, and its middle half.

    All take turns in one process, on one thread. None if it was stopped first.
    """
    if stopping():
        return None
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = weight_of("Gaussian", cell.size, generator).to(getattr(torch, cell.dtype))
    covariance = inputs_of("1/k", cell.size, generator).second.to(weight.dtype)
    steps: dict[str, Callable[[], object]] = {"SVD": partial(torch.linalg.svd, weight, full_matrices=False)}
    for name, (method, with_bias, whitened) in INITIALIZATIONS.items():
        find = lowrank_factors_with_bias if with_bias else lowrank_factors
        options: dict[str, Any] = {"rank": cell.rank, "method": method, "covariance": covariance if whitened else None}
        steps[name] = partial(find, weight, **options)
    times = interleave(steps, COST_SECONDS, rounds=COST_ROUNDS)
    return {"seconds": {name: [time.median, time.low, time.high] for name, time in times.items()}}
