"""What `retract.nets.factorize` makes of one layer of kind "lowrank", its rank being decided."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from ._exchange import standing_for
from ._following import Following
from ._low_rank_cost import unfolding_of
from ._sizes import check_fresh
from ._unfolding import UnfoldingKind
from .init.low_rank import LowRankMethod, lowrank_factors, lowrank_factors_with_bias
from .init.tensor import tensor_kaiming_
from .layers.low_rank import low_rank_layer

__all__ = ["filter_scales", "scaled", "to_low_rank"]

#: Of the largest weight of a batch normalization the least part that one is taken to be: a filter that is multiplied
#: by zero now may not be so after some training, and keeps some influence on the factors.
_LEAST_MULTIPLIER = 1e-3


@torch.no_grad()
def filter_scales(weight: Tensor, following: Following | None) -> Tensor | None:
    """What filters are multiplied by where a batch normalization follows, to be fitted and compared: (out,).

    It removes their norms and multiplies them by weights of its own. Its running variances are not used: they are large
    where inputs are, of which the fit of factors to a weight knows nothing, and would weigh filters by that alone.

    Args:
        weight: (out, ...) of the layer.
        following: the layer; None if that is not known.

    Returns:
        Factors, positive; None if no normalization is known to follow.
    """
    if following is None or following.normalization is None:
        return None
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide.flatten(1), dim=1)
    multipliers = following.normalization.scale.to(norms).abs()
    multipliers = multipliers.clamp(min=_LEAST_MULTIPLIER * multipliers.amax())
    return torch.where((norms > 0) & (multipliers > 0), multipliers / norms, 1.0)


def scaled(weight: Tensor, scales: Tensor | None) -> Tensor:
    """The weight (out, ...) with its filters multiplied, detached."""
    return weight.detach() if scales is None else weight.detach() * scales.reshape(-1, *[1] * (weight.ndim - 1))


def to_low_rank(
    module: nn.Module,
    *,
    rank: int,
    following: Following | None = None,
    unfolding: UnfoldingKind = "output",
    init: str = "spectral",
    slope: float | None = None,
    correct_bias: bool = False,
    **fresh: Any,
) -> nn.Module:
    """The low-rank layer that stands for a dense one.

    Args:
        module: `torch.nn.Linear`, or `torch.nn.Conv1d` to `Conv3d`; it is left as it is.
        rank: of the matrix of each group.
        following: what follows it, if that is known.
        unfolding: of a convolution.
        init: a method of `retract.nets.init.lowrank_factors`, or ``"kaiming"``.
        slope: of the leaky ReLU after the layer; None for that which follows, or ReLU if that is not known.
        correct_bias: fit a bias, too, unless a batch normalization follows, which removes it.
        fresh: options of the random start.
    """
    methods = get_args(LowRankMethod)
    if init not in (*methods, "kaiming"):
        raise ValueError(f"init must be one of {', '.join(map(repr, (*methods, 'kaiming')))}, got {init!r}")
    if init == "kaiming" and (slope is not None or correct_bias):
        given = "slope" if slope is not None else "correct_bias"
        raise ValueError(f"{given} given with init='kaiming', and of effect for fits to the weight alone")
    weight, kind = module.get_parameter("weight"), unfolding_of(module, unfolding)
    bias: Tensor | None = None
    if init == "kaiming":
        left, right = (weight.new_zeros(shape) for shape in kind.factor_shapes(rank))
    else:
        check_fresh(init, list(fresh))
        if slope is None:
            slope = 0.0 if following is None else following.slope
        options = {"rank": rank, "method": init, "slope": slope, "unfolding": unfolding, "groups": kind.groups}
        left, right, bias = _fitted(module, filter_scales(weight, following), correct_bias, options)
    layer = low_rank_layer(module, rank, unfolding=unfolding, factors=(left, right))
    if init == "kaiming":
        tensor_kaiming_(layer, **fresh)
    for factor in (layer.left, layer.right):
        factor.requires_grad_(weight.requires_grad)
    if bias is None:
        return standing_for(module, layer, "weight")
    old = module._parameters["bias"]
    layer.bias = nn.Parameter(bias.to(weight.dtype), (weight if old is None else old).requires_grad)
    return standing_for(module, layer, "weight", "bias")


@torch.no_grad()
def _fitted(
    module: nn.Module, scales: Tensor | None, correct_bias: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors near the weight or its function, and the bias that goes with them if there is to be another."""
    weight = module.get_parameter("weight")
    if scales is None:
        if correct_bias:
            return lowrank_factors_with_bias(weight, module._parameters["bias"], **options)
        return (*lowrank_factors(weight, **options), None)
    left, right = lowrank_factors(scaled(weight, scales), **options)
    # Rows run over the filters, and within each over some of its taps.
    rows = scales.repeat_interleave(left.shape[:-1].numel() // len(scales))
    return left / rows.reshape(*left.shape[:-1], 1), right, None
