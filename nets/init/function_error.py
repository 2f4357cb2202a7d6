"""How far a layer with an approximate weight is from the layer, as functions followed by ReLU or leaky ReLU.

For inputs x ~ N(0, I), a weight W with rows w_i and its approximation Y with rows y_i, s(z) = max(z, slope z), kappa
the normalised arc-cosine kernel of order 1 (`retract.nets.init.arc_cosine`) and rho_i the cosine of w_i and y_i,

    E |s(y_i·x) - s(w_i·x)|² = (1 + slope²)/2 [|w_i|² + |y_i|² - 2 |w_i||y_i| kappa(rho_i)].

The same holds for each filter of a convolution, away from its padding. With biases the closed form needs the bivariate
normal distribution (`retract.nets.init.rectified_moments`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._whitening import covariance_roots
from .arc_cosine import angle_between, curvature, kernel_deficit
from .rectified_moments import leaky_product

__all__ = ["MonteCarloError", "function_error", "monte_carlo_error", "relu_error", "relu_target"]


def relu_error(weight: Tensor, approximation: Tensor, *, slope: float = 0.0) -> Tensor:
    """E (s(y·x) - s(w·x))² of each output unit for x ~ N(0, I): (out,).

    Zero where the rows are equal, and exact to relative precision where they nearly are. Differentiable once with
    respect to both weights, everywhere but at zero rows, where the gradient is a subgradient.

    Args:
        weight: (out, ...), a floating-point tensor.
        approximation: of the same shape.
        slope: of the leaky ReLU for negative numbers; 0 is ReLU, 1 is linear.

    Raises:
        ValueError: the shapes differ, or have fewer than two dimensions.
        TypeError: a dtype that is not float32 or float64.
    """
    w, y = _rows(weight, approximation)
    error: Tensor = _ReluError.apply(w, y, slope)  # type: ignore[no-untyped-call]
    return error


def relu_target(weight: Tensor, approximation: Tensor, *, slope: float = 0.0) -> Tensor:
    """The matrix T(Y) for which the gradient of the summed `relu_error` with respect to Y is (1 + slope²)(Y - T(Y)).

    Row i is kappa'(rho_i) w_i + (kappa(rho_i) - rho_i kappa'(rho_i)) |w_i|/|y_i| y_i. The error is (1 + slope²)/2 |Y|²
    minus a convex function of Y, so that for every Y' it is at most (1 + slope²)/2 |Y' - T(Y)|² plus a constant,
    with equality at Y.

    Args:
        weight: (out, ...), a floating-point tensor.
        approximation: of the same shape.
        slope: of the leaky ReLU.

    Raises:
        ValueError: as `relu_error`.
        TypeError: as `relu_error`.
    """
    w, y = _rows(weight, approximation)
    return (y - _residual(w, y, slope)).reshape(weight.shape)


@torch.no_grad()
def function_error(
    layer: nn.Module | Tensor, full: nn.Module | Tensor, *, slope: float = 0.0, covariance: Tensor | None = None
) -> float:
    """Relative error of a layer as a function: E |s(layer(x)) - s(full(x))|² / E |s(full(x))|², exactly.

    Computed in float64. With biases the absolute precision is that of float64, without them the relative one is.
    Of a convolution it is the error at outputs that see no padding. 0 where both layers are zero.

    Args:
        layer: a weight (out, ...), or a module with ``weight`` and perhaps ``bias``, such as a low-rank layer.
        full: the layer that it stands for, with a weight of the same shape.
        slope: of the leaky ReLU s; 0 is ReLU, 1 is linear.
        covariance: second moments E x xᵀ, (fan_in, fan_in), of inputs x ~ N(0, C); the identity if not given.

    Raises:
        ValueError: weights of different shapes or with NaN or infinite entries, or a covariance that is none.
        TypeError: a layer without a weight.
    """
    (y, y_bias), (w, w_bias) = _matrix_and_bias("layer", layer), _matrix_and_bias("full", full)
    if w.shape != y.shape:
        raise ValueError(f"layer and full must have weights of one shape, got {tuple(y.shape)} and {tuple(w.shape)}")
    if covariance is not None:
        root, _ = covariance_roots(covariance.to(w.device), w.shape[1])
        w, y = w @ root, y @ root
    if w_bias is None and y_bias is None:
        error, energy = relu_error(w, y, slope=slope), (1 + slope**2) / 2 * w.square().sum(1)
    else:
        error, energy = _biased_error(w, _or_zeros(w_bias, w), y, _or_zeros(y_bias, y), slope)
    total, whole = float(error.sum()), float(energy.sum())
    return total / whole if whole > 0 else 0.0 if total == 0 else math.inf


class MonteCarloError(NamedTuple):
    """An estimate of the relative error of a layer, and the standard deviation of the estimate."""

    error: float
    standard_error: float


@torch.no_grad()
def monte_carlo_error(
    layer: Callable[[Tensor], Tensor], full: Callable[[Tensor], Tensor], inputs: Tensor, *, slope: float = 0.0
) -> MonteCarloError:
    """The relative error on given inputs, of any layers: sum |s(layer(x)) - s(full(x))|² / sum |s(full(x))|².

    Args:
        layer: maps inputs to outputs before the ReLU.
        full: the layer that it stands for.
        inputs: (samples, ...), independent of each other, at least two.
        slope: of the leaky ReLU s.

    Raises:
        ValueError: fewer than two samples, outputs of different shapes, or a full layer whose outputs are all zero.
    """
    if len(inputs) < 2:
        raise ValueError(f"inputs must be at least two samples, got {len(inputs)}")
    outputs, wanted = layer(inputs), full(inputs)
    if outputs.shape != wanted.shape:
        raise ValueError(
            f"layer and full must give outputs of one shape, got {tuple(outputs.shape)} and {tuple(wanted.shape)}"
        )
    outputs, wanted = (nn.functional.leaky_relu(x.double().flatten(1), slope) for x in (outputs, wanted))
    errors, energies = (outputs - wanted).square().sum(1), wanted.square().sum(1)
    total = float(energies.sum())
    if total == 0:
        raise ValueError("full must not be zero on all inputs: there is no relative error then")
    ratio = float(errors.sum()) / total
    return MonteCarloError(ratio, float(torch.linalg.vector_norm(errors - ratio * energies)) / total)


class _ReluError(torch.autograd.Function):
    """The closed form with its closed-form gradient: automatic differentiation through acos has none at angle 0."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(w, y)
        ctx.slope = slope
        w_norm, y_norm = (torch.linalg.vector_norm(x, dim=1) for x in (w, y))
        total = w_norm + y_norm
        # |w| - |y| from w - y: the norms of rows that nearly agree cancel.
        excess = torch.where(total > 0, torch.linalg.vecdot(w - y, w + y) / total, 0.0)
        deficit = kernel_deficit(angle_between(w, y), slope)
        error: Tensor = (1 + slope**2) / 2 * (excess.square() + 2 * w_norm * y_norm * deficit)
        return error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        w, y = ctx.saved_tensors
        scaled = (1 + ctx.slope**2) * gradient[:, None]
        to_w, to_y = ctx.needs_input_grad[:2]
        return (
            scaled * _residual(y, w, ctx.slope) if to_w else None,
            scaled * _residual(w, y, ctx.slope) if to_y else None,
            None,
        )


def _residual(w: Tensor, y: Tensor, slope: float) -> Tensor:
    """Y - T(Y) = (y - w) + curvature/π [t w - sin t |w| y/|y|], row by row."""
    w_norm, y_norm = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (w, y))
    angle = angle_between(w, y)[:, None]
    ratio = torch.where(y_norm > 0, w_norm / y_norm, 0.0)
    return (y - w) + curvature(slope) / math.pi * (angle * w - angle.sin() * ratio * y)


def _rows(weight: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights as matrices (out, fan_in)."""
    for name, tensor in (("weight", weight), ("approximation", approximation)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be of float32 or float64, got {tensor.dtype}")
    if weight.ndim < 2 or weight.shape != approximation.shape:
        raise ValueError(
            "weight and approximation must have the same shape (out, ...), "
            f"got {tuple(weight.shape)} and {tuple(approximation.shape)}"
        )
    return weight.flatten(1), approximation.flatten(1)


def _matrix_and_bias(name: str, layer: nn.Module | Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (out, fan_in) and bias (out,) in float64."""
    weight = layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)
    bias = None if isinstance(layer, Tensor) else getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise TypeError(f"{name} must be a weight (out, ...) or a module that has one, got {type(layer).__name__}")
    if not weight.isfinite().all() or not (bias is None or bias.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return weight.detach().double().flatten(1), None if bias is None else bias.detach().double()


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias


def _biased_error(w: Tensor, beta: Tensor, y: Tensor, bias: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Errors E (s(y·x + bias) - s(w·x + beta))² and energies E s(w·x + beta)²: (out,) each."""
    cosine = angle_between(w, y).cos().cpu().numpy()
    means = [x.cpu().numpy() for x in (beta, bias)]
    scales = [torch.linalg.vector_norm(x, dim=1).cpu().numpy() for x in (w, y)]
    energy, approximated = (leaky_product((m, m), (s, s), 1 + 0 * m, slope) for m, s in zip(means, scales, strict=True))
    product = leaky_product((means[0], means[1]), (scales[0], scales[1]), cosine, slope)
    return torch.from_numpy(energy + approximated - 2 * product).clamp(min=0), torch.from_numpy(energy)
