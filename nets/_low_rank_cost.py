"""What a layer costs, dense and for each unit of a low rank: parameters, and multiplications of its products."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ._rank_budget import RankCost
from ._unfolding import Unfolding

__all__ = ["multiplications", "multiplications_of", "parameters", "unfolding_of"]


def parameters(unfolding: Unfolding) -> RankCost:
    """Elements of the weight, and of a column of U and a row of V in each group."""
    return RankCost(math.prod(unfolding.weight_shape), unfolding.groups * sum(unfolding.matrix_shape))


def multiplications(unfolding: Unfolding, input_size: Sequence[int], output_size: Sequence[int]) -> RankCost:
    """Multiplications of the layer for one image, or one vector of a linear layer.

    The first of the two convolutions convolves its axes only, so that along the others it has the positions of the
    input. Taps that see only padding count as others do.

    Args:
        unfolding: of the weight.
        input_size: positions along the axes of the kernel.
        output_size: likewise.
    """
    rows, columns = unfolding.matrix_shape
    outputs = math.prod(output_size)
    # An axis of one tap goes with the first convolution, whatever the unfolding.
    second = [axis < unfolding.split and taps > 1 for axis, taps in enumerate(unfolding.weight_shape[2:])]
    between = math.prod(
        before if later else after for before, after, later in zip(input_size, output_size, second, strict=True)
    )
    per_rank = unfolding.groups * (between * columns + outputs * rows)
    return RankCost(outputs * math.prod(unfolding.weight_shape), per_rank)


def multiplications_of(unfolding: Unfolding, calls: Sequence[tuple[Sequence[int], Sequence[int]]]) -> RankCost:
    """Multiplications of all calls of the layer, of given shapes of input and output."""
    axes = len(unfolding.weight_shape) - 2
    dense = per_rank = 0
    for before, after in calls:
        one = multiplications(unfolding, before[len(before) - axes :], after[len(after) - axes :])
        images = math.prod(after[: len(after) - axes]) // unfolding.weight_shape[0]
        dense, per_rank = dense + images * one.dense, per_rank + images * one.per_rank
    return RankCost(dense, per_rank)


def unfolding_of(module: nn.Module, kind: str) -> Unfolding:
    """How the weight of `torch.nn.Linear` or a convolution is unfolded."""
    groups = module.groups if isinstance(module, _ConvNd) else 1
    return Unfolding(tuple(module.get_parameter("weight").shape), kind, groups)  # type: ignore[arg-type]
