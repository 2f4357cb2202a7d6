"""From factors of their own to points of the manifold of matrices of fixed rank."""

from __future__ import annotations

import math

from torch import nn

from .layers.low_rank import LowRankLayer
from .parametrizations._registration import Execution
from .parametrizations.spectral import svdp

__all__ = ["fixed_rank_layer"]


def fixed_rank_layer(layer: LowRankLayer, *, execution: Execution = "auto") -> nn.Module:
    """The layer of `torch.nn` whose weight is that of a low-rank layer, on the manifold of matrices of its rank.

    It is ``svdp(layer.to_dense(), layer.rank, "free", form="stiefel")``: the weight is U diag(s) Vᵀ with orthonormal U
    and V, for `RiemannianSGD` and the groups of `manifold_groups`. Its steps, unlike those of the factors U and V
    of a low-rank layer, do not depend on how the weight was split into factors.

    Args:
        layer: a linear one, or a convolution without groups that is unfolded by output channels; it is left as it is.
        execution: as of `svdp`.

    Raises:
        TypeError: another layer.
        ValueError: groups, or another unfolding (of kernels of one tap any will do).
    """
    if not isinstance(layer, LowRankLayer):
        raise TypeError(f"layer must be a low-rank layer such as LowRankLinear, got {type(layer).__name__}")
    unfolding = layer.unfolding
    if unfolding.kind != "output" and math.prod(unfolding.weight_shape[2:]) > 1:
        raise ValueError(
            f"layer must have unfolding 'output', the matrix of spectral parametrizations, got {unfolding.kind!r}"
        )
    return svdp(layer.to_dense(), layer.rank, "free", form="stiefel", execution=execution)
