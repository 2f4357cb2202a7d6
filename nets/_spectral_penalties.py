"""Penalties that keep the lower singular values of a model's weights from decaying.

Source: Jiang, Chen, Chen, Liu, Zhao, "On computation and generalization of generative adversarial networks under
spectrum control", ICLR 2019. Values count relative to the largest of their weight, q_i = |s_i| / max |s|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["d_optimal", "divergence", "spectral_penalty"]

Reduction = Literal["mean", "sum"]


def d_optimal(values: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""D-optimal penalty :math:`-\sum_i \log q_i`: 0 where all values are equal.

    It is as published up to the factor 1 + eps of q, eps that of the dtype, by which it is finite, about -log eps, at
    a value of zero. Near zero it drives a value away as strongly as 1 / q; exactly at zero there is no direction, and
    the gradient of that value is zero.

    Args:
        values: singular values (..., r) of one or more weights, of either sign, in any order.
        reduction: ``"sum"`` over all values as in the paper, or their ``"mean"``, with which a weight of 1.0 in the
            loss was published (Obukhov et al., AISTATS 2021).

    Returns:
        A scalar, at least in float32.
    """
    return _reduce(-_log(_relative(values)), reduction)


def divergence(values: Tensor, a: float = 0.1, reduction: Reduction = "mean") -> Tensor:
    r"""Divergence penalty :math:`\sum_{i \geq 2} (1 - q_i)^2 / a^2 - \log(q_{i-1} - q_i)`, q in descending order.

    It is, but for constants, the Kullback-Leibler divergence of a distribution with the values as its quantiles from
    one with density proportional to :math:`\exp(-(1 - q)^2 / a^2)`: values spread below the largest, most of them
    within about ``a``. Values that coincide are pushed apart; the logarithm is finite there, as in `d_optimal`.

    Args:
        values: singular values (..., r), of either sign, in any order. With r = 1 the penalty is zero.
        a: scale of the distances from the largest value.
        reduction: ``"sum"`` or ``"mean"`` over the r - 1 terms (of all weights).

    Returns:
        A scalar, at least in float32.
    """
    if not a > 0:
        raise ValueError(f"a must be positive, got {a!r}")
    q = _relative(values).sort(dim=-1, descending=True).values
    return _reduce(((1 - q[..., 1:]) / a).square() - _log(q[..., :-1] - q[..., 1:]), reduction)


_PENALTIES: dict[str, Callable[..., Tensor]] = {"d_optimal": d_optimal, "divergence": divergence}


def spectral_penalty(
    model: nn.Module,
    penalty: Literal["d_optimal", "divergence"] | Callable[..., Tensor] = "d_optimal",
    reduction: Reduction = "mean",
) -> Tensor:
    """Penalty on the singular values of all spectral layers of a model, to be added to its loss.

    A spectral layer has a weight that is parametrized by `torch.nn.utils.parametrize`, first by a module with a
    method ``singular_values(*originals)``, which returns them as a tensor (r,) from the tensors that the layer stores.
    `retract.nets.parametrizations` has such modules; any other that has the method counts too. A weight that several
    layers share counts once.

    Args:
        model: network with spectral layers; its other layers do not count.
        penalty: ``"d_optimal"``, ``"divergence"`` or a function to be called with the values of one weight and
            ``reduction="sum"``, such as ``functools.partial(divergence, a=0.3)``.
        reduction: ``"sum"`` over all layers, or that sum over the number of singular values of all of them, ``"mean"``.

    Returns:
        A scalar.

    Raises:
        ValueError: no spectral layer, or an unknown name.
    """
    if isinstance(penalty, str) and penalty not in _PENALTIES:
        raise ValueError(f"penalty must be {' or '.join(map(repr, _PENALTIES))} or a function, got {penalty!r}")
    _check(reduction)
    function = _PENALTIES[penalty] if isinstance(penalty, str) else penalty
    values = list(_singular_values(model))
    if not values:
        raise ValueError(
            "model has no spectral layer, one whose weight is parametrized by a module with a method singular_values: "
            "see retract.nets.parametrizations.svdp and sttp"
        )
    total = torch.stack([function(v, reduction="sum") for v in values]).sum()
    return total if reduction == "sum" else total / sum(v.numel() for v in values)


def _singular_values(model: nn.Module) -> Iterator[Tensor]:
    for stored in model.modules():
        if isinstance(stored, ParametrizationList) and hasattr(stored[0], "singular_values"):
            names = ["original"] if stored.is_tensor else [f"original{i}" for i in range(stored.ntensors)]
            parametrization: Any = stored[0]
            yield parametrization.singular_values(*(getattr(stored, name) for name in names))


def _relative(values: Tensor) -> Tensor:
    """Magnitudes over the largest, at least in float32; zeros if all are."""
    if values.ndim == 0 or values.numel() == 0:
        raise ValueError(f"values must be a non-empty tensor (..., r), got shape {tuple(values.shape)}")
    magnitudes = values.abs().to(torch.promote_types(values.dtype, torch.float32))
    largest = magnitudes.amax(-1, keepdim=True)
    return magnitudes / torch.where(largest > 0, largest, 1)


def _log(x: Tensor) -> Tensor:
    """Logarithm of x in [0, 1], finite at 0 and 0 at 1."""
    eps = torch.finfo(x.dtype).eps
    return (x + eps).log() - math.log1p(eps)


def _reduce(terms: Tensor, reduction: Reduction) -> Tensor:
    _check(reduction)
    return terms.sum() if reduction == "sum" else terms.sum() / max(terms.numel(), 1)


def _check(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
