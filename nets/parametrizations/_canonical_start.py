"""Where canonical weights start: random unit factors at the right gain, or the terms of a given weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from retract.manifolds.canonical import alternating_least_squares, power_method

from ._base import widened

__all__ = ["Draw", "Fit", "Mode", "check_finite", "fit_terms", "gain_scale", "random_directions"]

Draw = Literal["normal", "uniform"]
Fit = Literal["power", "als"]
Mode = Literal["fan_in", "fan_out", "fan_avg"]


def random_directions(
    shape: Sequence[int], rank: int, draw: Draw, like: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Unit vectors for each mode, (rank, d): normal draws, or uniform ones from [-1, 1), divided by their norms.

    Either has second moment I / d, whatever the spread of the draws was: entries of the weight are uncorrelated.
    """
    device = like.device if generator is None else generator.device
    (wide,) = widened((like,))
    factors = []
    for size in shape:
        draws = torch.empty(rank, size, dtype=wide.dtype, device=device)
        if draw == "normal":
            draws.normal_(generator=generator)
        else:
            draws.uniform_(-1, 1, generator=generator)
        factors.append((draws / torch.linalg.vector_norm(draws, dim=1, keepdim=True)).to(like.device))
    return tuple(factors)


def gain_scale(module: nn.Module, shape: Sequence[int], rank: int, mode: Mode, gain: float) -> float:
    r"""The :math:`\sigma_0` at which random directions with all :math:`\lambda_r = 1` keep the variance of signals.

    The variance of the weight's entries is :math:`\sigma^2 R / \prod d`. Kaiming's rule asks for gain² / fan, so
    :math:`\sigma_0 = \text{gain} \sqrt{\text{out} / R}` for fan_in and :math:`\text{gain} \sqrt{\text{in} / R}` for
    fan_out, on average over positions: the gradient of a strided convolution has 1 / stride of the taps of its output,
    and a transposed convolution the reverse.

    Args:
        module: the layer, for its strides.
        shape: (out, in, *kernel).
        rank: R.
        mode: ``"fan_in"`` for the forward signal, ``"fan_out"`` for the gradient, ``"fan_avg"`` for the mean fan.
        gain: `torch.nn.init.calculate_gain` of the nonlinearity before or after.
    """
    positions = math.prod(getattr(module, "stride", (1,)))
    taps = math.prod(shape[2:])
    fan_in, fan_out = float(shape[1] * taps), float(shape[0] * taps)
    if getattr(module, "transposed", False):
        fan_in /= positions
    else:
        fan_out /= positions
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    return gain * math.sqrt(math.prod(shape) / (rank * fan))


def fit_terms(
    tensor: Tensor, rank: int, method: Fit, generator: torch.Generator | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Weights (R,) and unit factors (R, d) of a tensor, one after the other or by guarded alternating least squares.

    Raises:
        ValueError: NaN or infinite entries.
    """
    check_finite(tensor)
    (wide,) = widened((tensor.detach(),))
    if method == "power":
        return power_method(wide, rank=rank, generator=generator)
    fit = alternating_least_squares(wide, rank, generator=generator)
    return fit.weights, fit.factors


def check_finite(tensor: Tensor) -> None:
    """Refuse NaN and infinite entries."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("weight has NaN or infinite entries: no sum of rank-one terms is near it")
