"""Singular values of a network's weights as it uses them, and how far they are from where a constraint wants them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from .._conv_norm import conv_norm
from .._layers import weight_layers
from ..parametrizations._base import SpectralParametrization, spectral_weight, widened
from ..parametrizations._layout import MatrixLayout
from ..parametrizations.spectral_regularization import SpectralRegularization

__all__ = ["evaluating", "singular_values", "spectrum_violation"]

#: Positions per dimension of the circle on which convolutions are measured that are held to their own norm.
_POSITIONS = 8


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode, where reading a weight changes no state.

    In training mode it may: power iteration takes a step, and the ratios of spectral regularization grow.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Singular values of every linear layer, convolution and embedding, by name.

    They are taken from the matrix (out, fan_in) of the weight that the layer works with, whatever makes it, and not
    from what a parametrization says of itself. The call changes no state.

    Args:
        model: any network. Groups of a convolution, and the factors of tensor and low-rank layers, count as
            their weight: one matrix.

    Returns:
        Values in descending order, at least in float32, on the model's device: (r,) for a factored weight of rank r,
        whose others are zero, (min(out, fan_in),) for any other. A weight with NaN or infinite entries has values NaN.
    """
    with evaluating(model):
        return {name: _values(module) for name, module in weight_layers(model).items()}


@torch.no_grad()
def spectrum_violation(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> float:
    """The largest distance of a singular value from the set that its layer's constraint allows, over all layers.

    For ``-c`` it is that of each value from 1, for ``-l``, ``-r`` and ``sr`` that of the largest. For ``sn`` it is what
    the largest exceeds 1 by, which one step of power iteration does not rule out; for ``lipschitz-operator`` what the
    norm of a convolution, measured on a circle of 8 positions, exceeds 1 by. Layers without a constraint have none.

    Args:
        model: any network.
        values: what `singular_values` has returned for it, if that is known.

    Returns:
        The distance: zero to rounding if all is well, and if there is nothing to violate; NaN if a value is.
    """
    values = singular_values(model) if values is None else values
    with evaluating(model):
        found = [_distance(module, values[name]) for name, module in weight_layers(model).items()]
    distances = [distance for distance in found if distance is not None]
    return float(torch.stack(distances).amax()) if distances else 0.0


def _values(module: Any) -> Tensor:
    matrix = _matrix(module)
    if not bool(torch.isfinite(matrix).all()):  # LAPACK raises for such, after an iteration that may be long
        return matrix.new_full((min(matrix.shape),), torch.nan)
    values: Tensor = torch.linalg.svdvals(matrix)
    found = spectral_weight(module, "weight")
    return values if found is None else values[: found[0].rank]


def _matrix(module: Any) -> Tensor:
    weight: Tensor = module.weight
    layout = MatrixLayout(tuple(weight.shape), bool(getattr(module, "transposed", False)))
    (matrix,) = widened((layout.matrix(weight),))
    return matrix


def _distance(module: nn.Module, values: Tensor) -> Tensor | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first: Any = module.parametrizations["weight"][0]  # type: ignore[index]
    if isinstance(first, SpectralParametrization):
        if first.operator_norm is not None:
            return _operator_excess(module, first.operator_norm)
        return (values - first.spectrum.project(values)).abs().amax()
    if isinstance(first, SpectralRegularization):
        return (values[0] - 1).abs()
    return (values[0] - 1).clamp(min=0) if isinstance(first, _SpectralNorm) else None


def _operator_excess(module: Any, norm: float) -> Tensor:
    (kernel,) = widened((module.weight,))
    return (conv_norm(kernel, _POSITIONS) - norm).clamp(min=0)
