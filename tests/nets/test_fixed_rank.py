"""Low-rank layers on the manifold of matrices of fixed rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from retract.nets.fixed_rank import fixed_rank_layer
from retract.nets.layers.low_rank import LowRankConv1d, LowRankConv2d, LowRankLinear
from retract.nets.parametrizations import manifold_groups
from retract.optim import RiemannianSGD

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: LowRankLinear(8, 12, 3, dtype=torch.float64), (5, 8)),
    (lambda: LowRankConv2d(6, 8, 3, 3, stride=2, padding=1, bias=False, dtype=torch.float64), (2, 6, 7, 7)),
    (lambda: LowRankConv1d(6, 8, 1, 3, unfolding="separable", dtype=torch.float64), (2, 6, 7)),
]


@pytest.mark.parametrize("execution", ["factored", "weight"])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_it_keeps_the_function(make: Any, shape: tuple[int, ...], execution: Any) -> None:
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():  # singular values that differ
        layer.left.add_(torch.randn_like(layer.left))
    weight = layer.weight.detach().clone()
    point = fixed_rank_layer(layer, execution=execution)
    input = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(point.weight, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(point(input), layer(input), rtol=1e-12, atol=1e-11)
    group = manifold_groups(point)[0]
    assert group["manifold"].rank == 3 and len(group["params"]) == 3
    assert torch.equal(layer.weight, weight)


def test_riemannian_sgd_trains_it() -> None:
    """To a matrix of the rank from measurements of it; the factors it began with would lose their rank or drift."""
    torch.manual_seed(0)
    target = torch.randn(12, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    input = torch.randn(64, 8, dtype=torch.float64)
    model = nn.Sequential(fixed_rank_layer(LowRankLinear(8, 12, 3, dtype=torch.float64)))
    optimizer = RiemannianSGD(manifold_groups(model), lr=0.5, momentum=0.5)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = mse_loss(model(input), input @ target.mT)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-6 * losses[0]
    weight = model[0].weight.detach()
    assert int(torch.linalg.matrix_rank(weight, rtol=1e-10)) == 3
    left, _, right = (parameter.detach() for _, parameter in manifold_groups(model)[0]["params"])
    for frame in (left, right):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Linear(3, 3), TypeError, "layer must be a low-rank layer such as LowRankLinear, got Linear"),
        (LowRankConv2d(6, 8, 3, 3, unfolding="separable"), ValueError, "unfolding 'output', .* got 'separable'"),
        (LowRankConv2d(6, 8, 3, 3, groups=2), ValueError, "groups=2"),
    ],
)
def test_what_has_no_such_point(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fixed_rank_layer(layer)
