"""A weight from its rank-one terms, as cheaply as it can be had: one matrix product and little besides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from retract.manifolds.cp_terms import khatri_rao

__all__ = ["build_weight"]


def build_weight(weights: Tensor, factors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Sum of weights[r] times the outer product of the rows r of the factors, contiguous; differentiable.

    All ways to sum R terms multiply R prod(d) times in a matrix product. They differ in what goes into it: here the
    products of the vectors of all modes but the largest, which are fewest, made from the smallest mode on, so that the
    weights and the positions of a kernel are multiplied when there are few numbers yet, and the longest mode is
    the innermost.

    Args:
        weights: (R,).
        factors: (R, d) for each mode with d > 1, in order.
        shape: of the weight, unit modes among it.
    """
    if not factors:
        return weights.sum().reshape(shape)
    order = sorted(range(len(factors)), key=lambda mode: factors[mode].shape[1])
    *small, largest = (factors[mode] for mode in order)
    weight = khatri_rao([weights.unsqueeze(1), *small]).mT @ largest
    weight = weight.reshape([factors[mode].shape[1] for mode in order])
    return weight.permute([order.index(mode) for mode in range(len(order))]).reshape(shape).contiguous()
