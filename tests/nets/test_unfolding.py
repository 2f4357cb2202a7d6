"""Unfoldings of a weight: where each of its entries is in the matrix."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from retract.nets._unfolding import Unfolding


@pytest.mark.parametrize(
    ("shape", "kind", "groups", "entry"),
    [
        ((4, 6), "output", 1, lambda o, i: (o, i)),
        ((4, 3, 5), "output", 1, lambda o, i, w: (o, 5 * i + w)),
        ((4, 3, 5), "input", 1, lambda o, i, w: (5 * o + w, i)),
        ((4, 3, 5), "separable", 1, lambda o, i, w: (5 * o + w, i)),
        ((4, 3, 2, 5), "output", 1, lambda o, i, h, w: (o, 10 * i + 5 * h + w)),
        ((4, 3, 2, 5), "input", 1, lambda o, i, h, w: (10 * o + 5 * h + w, i)),
        ((4, 3, 2, 5), "separable", 1, lambda o, i, h, w: (2 * o + h, 5 * i + w)),
        ((4, 3, 2, 5), "separable", 2, lambda o, i, h, w: (o // 2, 2 * (o % 2) + h, 5 * i + w)),
        ((4, 3, 2, 5), "output", 4, lambda o, i, h, w: (o, 0, 10 * i + 5 * h + w)),
        ((4, 3, 2, 5, 7), "input", 1, lambda o, i, d, h, w: (70 * o + 35 * d + 7 * h + w, i)),
        ((4, 3, 2, 5, 7), "separable", 1, lambda o, i, d, h, w: (2 * o + d, 35 * i + 7 * h + w)),
    ],
)
def test_where_each_entry_of_the_weight_is(shape: Any, kind: Any, groups: int, entry: Any) -> None:
    weight = torch.arange(math.prod(shape)).reshape(shape)
    unfolding = Unfolding(shape, kind, groups)
    matrix = unfolding.matrix(weight)
    for index in itertools.product(*map(range, shape)):
        assert matrix[entry(*index)] == weight[index]
    assert tuple(matrix.shape[-2:]) == unfolding.matrix_shape
    assert torch.equal(unfolding.weight(matrix), weight)
    left, right = unfolding.factor_shapes(2)
    assert (torch.empty(left) @ torch.empty(right)).shape == matrix.shape


def test_wrong_unfoldings() -> None:
    with pytest.raises(ValueError, match="unfolding must be one of 'output', 'input', 'separable', got 'kernel'"):
        Unfolding((4, 3, 3, 3), "kernel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups must divide the 4 output channels, got 3"):
        Unfolding((4, 3, 3, 3), groups=3)
    with pytest.raises(ValueError, match="weight must be non-empty and have two or more dimensions"):
        Unfolding((4,))
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 3\), got \(3, 4\)"):
        Unfolding((4, 3)).matrix(torch.zeros(3, 4))
