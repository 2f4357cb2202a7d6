"""The Frobenius norm of factored weights, from Gram matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retract.nets.frobenius_decay import factor_pairs, frobenius_groups, frobenius_penalty
from retract.nets.layers import FORMATS, TensorConv2d, tensor_network
from retract.nets.layers.low_rank import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from retract.nets.parametrizations import manifold_groups, sttp, svdp

FACTORED: dict[str, Any] = {
    "linear": lambda: LowRankLinear(8, 12, 3, dtype=torch.float64),
    "separable, groups": lambda: LowRankConv2d(6, 8, 3, 2, groups=2, unfolding="separable", dtype=torch.float64),
    "input": lambda: LowRankConv3d(6, 8, (3, 1, 2), 4, unfolding="input", dtype=torch.float64),
    "svdp, householder": lambda: svdp(nn.Conv2d(6, 8, 3, dtype=torch.float64), 3, "free"),
    "svdp, stiefel": lambda: svdp(nn.Linear(6, 8, dtype=torch.float64), 3, "lipschitz", form="stiefel"),
    "sttp": lambda: sttp(nn.Conv2d(8, 8, 3, dtype=torch.float64), 4, "free"),
    **{
        f"tensor, {format}": lambda format=format: TensorConv2d(
            tensor_network(format, (12, 8, 3, 3), rank=2), dtype=torch.float64
        )
        for format in FORMATS
    },
}


@pytest.mark.parametrize("kind", FACTORED)
def test_penalty_is_that_of_the_weight(kind: str) -> None:
    """Value and gradient."""
    torch.manual_seed(0)
    layer = FACTORED[kind]()
    penalty, expected = frobenius_penalty(layer, 0.3), 0.15 * layer.weight.square().sum()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    for one, other in zip(gradients(layer, penalty), gradients(layer, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def gradients(layer: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    """On the manifold if the factors are on one: off it, frames that are no longer orthonormal change the weight."""
    groups = [group for group in manifold_groups(layer) if "manifold" in group]
    parameters = [parameter for _, parameter in (groups or manifold_groups(layer))[0]["params"]]
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return list(groups[0]["manifold"].egrad2rgrad(tuple(parameters), found)) if groups else list(found)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.floats(1e-6, 1e6), st.randoms())
def test_penalty_of_any_shape_and_scale(groups: int, rows: int, columns: int, scale: float, random: Any) -> None:
    torch.manual_seed(random.randrange(2**31))
    rank = random.randint(1, min(rows, columns))
    layer = LowRankConv1d(groups * columns, groups * rows, 1, rank, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        layer.left.mul_(scale)
    torch.testing.assert_close(frobenius_penalty(layer), layer.weight.square().sum() / 2, rtol=1e-12, atol=0)


def test_layers_add_up_and_count_once() -> None:
    torch.manual_seed(0)
    first, second = LowRankLinear(8, 8, 3), LowRankLinear(8, 8, 2)
    tied = LowRankLinear(8, 8, 3)
    tied.left, tied.right = first.left, first.right
    model = nn.Sequential(first, nn.Linear(8, 8), second, first, tied)
    expected = (first.weight.square().sum() + second.weight.square().sum()) / 2
    torch.testing.assert_close(frobenius_penalty(model), expected)
    pairs = factor_pairs(model)
    assert len(pairs) == 2
    for pair, layer in zip(pairs, (first, second), strict=True):
        assert pair[0] is layer.left and pair[1] is layer.right


class LargestResult(TorchDispatchMode):
    """The most elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(
    "layer",
    [LowRankLinear(64, 48, 4), LowRankConv2d(32, 32, 3, 4), TensorConv2d(tensor_network("cp", (32, 32, 3, 3), rank=8))],
    ids=lambda layer: type(layer).__name__,
)
def test_the_weight_is_never_built(layer: Any) -> None:
    with LargestResult() as largest:
        frobenius_penalty(layer).backward()
    assert largest.elements <= max(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_is_summed_in_half(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(512, 512, 4)
    with torch.no_grad():
        layer.left.mul_(1e3)
    expected = frobenius_penalty(layer)
    penalty = frobenius_penalty(layer.to(dtype))
    assert penalty.dtype == torch.float32 and float(expected.detach()) > 1e6
    torch.testing.assert_close(penalty, expected, rtol=0.02, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frobenius_penalty(layer), penalty)


def test_groups_spare_the_factors() -> None:
    model = nn.Sequential(LowRankConv2d(6, 8, 3, 2), nn.BatchNorm2d(8), LowRankLinear(8, 4, 2, bias=False))
    factors, others = frobenius_groups(model, 1e-4)
    assert (factors["weight_decay"], others["weight_decay"]) == (0.0, 1e-4)
    assert [name for name, _ in factors["params"]] == ["0.left", "0.right", "2.left", "2.right"]
    assert [name for name, _ in others["params"]] == ["0.bias", "1.weight", "1.bias"]
    parameters = {id(parameter) for group in (factors, others) for _, parameter in group["params"]}
    assert parameters == {id(parameter) for parameter in model.parameters()}
    optimizer = torch.optim.AdamW(frobenius_groups(model, 1e-2), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-2]
    assert len(frobenius_groups(model[2], 0.0)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frobenius_penalty(nn.Linear(3, 3)), "model has no factored weight: it needs a low-rank layer"),
        (lambda: frobenius_penalty(LowRankLinear(3, 3, 1), 0.0), r"coefficient must be positive, got 0\.0"),
        (lambda: frobenius_penalty(LowRankLinear(3, 3, 1), float("nan")), "coefficient must be positive, got nan"),
        (lambda: frobenius_groups(nn.Linear(3, 3), 0.1), "model has no low-rank layer"),
        (lambda: frobenius_groups(LowRankLinear(3, 3, 1), -0.1), r"weight_decay must not be negative, got -0\.1"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
