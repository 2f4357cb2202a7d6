"""How low-rank layers start: fresh ones, ones from dense layers, arguments that make none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from retract.nets.init import tensor_kaiming_
from retract.nets.init.low_rank import lowrank_factors, lowrank_factors_with_bias
from retract.nets.layers.low_rank import LowRankConv2d, LowRankLinear, low_rank_layer
from tests.nets.low_rank_cases import CONVOLUTIONS, randomized, unfoldings

# --------------------------------------------------------------------------------------------------------- first values


@pytest.mark.parametrize("groups", [1, 2])
@unfoldings
def test_fresh_layers_keep_the_second_moment(unfolding: Any, groups: int) -> None:
    """That of He et al., 2 / fan_in an entry: exactly, by semi-orthogonal factors, if groups are not drawn jointly."""
    torch.manual_seed(0)
    layer = LowRankConv2d(16, 24, 3, 8, groups=groups, unfolding=unfolding)
    weight = layer.weight.detach()
    assert float(weight.square().sum()) == pytest.approx(2 * 24, rel=1e-5 if groups == 1 else 0.03)
    assert float(layer.left.detach().norm()) == pytest.approx(float(layer.right.detach().norm()), rel=1e-3)
    assert not layer.bias.any()
    before = layer.left.detach().clone()
    layer.reset_parameters()
    assert bool((layer.left != before).any())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@unfoldings
def test_factors_are_cores_of_a_network_of_the_weight(unfolding: Any, spatial: int, groups: int) -> None:
    kernel = (3, 2, 3)[:spatial]
    layer = randomized(CONVOLUTIONS[spatial](4, 6, kernel, 2, groups=groups, unfolding=unfolding, dtype=torch.float64))
    torch.testing.assert_close(layer.network.weight(layer.cores), layer.weight, rtol=1e-12, atol=1e-12)
    assert [core.data_ptr() for core in layer.cores] == [layer.left.data_ptr(), layer.right.data_ptr()]


@pytest.mark.parametrize("distribution", ["normal", "uniform", "orthogonal"])
def test_variances_are_those_of_the_layers_fans(distribution: Any) -> None:
    torch.manual_seed(0)
    layer = LowRankConv2d(8, 12, 3, 6, stride=2, unfolding="separable", bias=False)
    squares = []
    for _ in range(200):
        tensor_kaiming_(layer, mode="fan_out", nonlinearity="tanh", distribution=distribution)
        squares.append(float(layer.weight.detach().square().mean()))
    expected = (5 / 3) ** 2 / (12 * 9 / 4)
    assert sum(squares) / 200 == pytest.approx(expected, rel=0.06)


# ---------------------------------------------------------------------------------------------------- from dense layers


@unfoldings
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 12, dtype=torch.float64),
        nn.Linear(8, 12, bias=False),
        nn.Conv1d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(16, 12, (3, 2), padding="same", dilation=(1, 2), groups=2, padding_mode="reflect"),
        nn.Conv3d(8, 12, 3, padding=(0, 1, 2), bias=False).eval(),
    ],
    ids=str,
)
def test_low_rank_layer_is_the_nearest(module: Any, unfolding: Any) -> None:
    torch.manual_seed(0)
    before = copy.deepcopy(module)
    layer = low_rank_layer(module, 3, unfolding=unfolding)
    matrix = layer.unfolding.matrix(module.weight.detach())
    tail = torch.linalg.svdvals(matrix)[..., 3:]
    error = (layer.weight - module.weight).detach().norm()
    torch.testing.assert_close(error, tail.norm(), rtol=1e-4, atol=0)
    assert layer.training == module.training
    if module.bias is not None:
        assert torch.equal(layer.bias, module.bias) and layer.bias is not module.bias
    channels = getattr(module, "in_channels", 8)
    input = torch.randn(2, channels, *(5,) * (module.weight.ndim - 2), dtype=module.weight.dtype)
    dense = layer.to_dense()
    torch.testing.assert_close(layer(input), dense(input), rtol=1e-4, atol=1e-5)
    assert dense.training == module.training and repr(dense) == repr(module)
    for name, value in before.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_factors_are_copied() -> None:
    left, right = torch.randn(2, 12, 3), torch.randn(2, 3, 24)
    dense = nn.Conv2d(8, 8, (3, 3), groups=2)
    layer = low_rank_layer(dense, 3, unfolding="separable", factors=(left, right[..., :12]))
    assert torch.equal(layer.left, left) and torch.equal(layer.right, right[..., :12])
    with torch.no_grad():
        layer.left.zero_()
    assert bool(left.any())
    with pytest.raises(ValueError, match=r"factors: right must have shape \(2, 3, 12\), got \(2, 3, 24\)"):
        low_rank_layer(dense, 3, unfolding="separable", factors=(left, right))


@unfoldings
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_bias", [True, False])
def test_methods_reach_the_layer(unfolding: Any, groups: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, 3, groups=groups, bias=with_bias, dtype=torch.float64)
    sizes: dict[str, Any] = {"rank": 3, "unfolding": unfolding, "groups": groups, "slope": 0.1}
    state = torch.get_rng_state()
    layer = low_rank_layer(dense, 3, unfolding=unfolding, method="relu_dc", slope=0.1, iterations=2)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    left, right = lowrank_factors(dense.weight, method="relu_dc", iterations=2, **sizes)
    assert torch.equal(layer.left, left) and torch.equal(layer.right, right)
    assert (layer.bias is not None) == with_bias
    layer = low_rank_layer(dense, 3, unfolding=unfolding, method="relu", slope=0.1, correct_bias=True)
    left, right, bias = lowrank_factors_with_bias(dense.weight, dense.bias, method="relu", **sizes)
    for own, value in ((layer.left, left), (layer.right, right), (layer.bias, bias)):
        assert torch.equal(own, value) and own.requires_grad


PAIR = (torch.zeros(8, 2), torch.zeros(2, 6))


def with_nan() -> nn.Linear:
    linear = nn.Linear(6, 8)
    with torch.no_grad():
        linear.weight[3, 2] = torch.nan
    return linear


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LowRankLinear(8, 12, 9), ValueError, r"rank must be from 1 to 8 for a weight of shape \(12, 8\)"),
        (lambda: LowRankLinear(8, 12, 0), ValueError, "rank must be from 1 to 8 .* got 0"),
        (lambda: LowRankLinear(8, 12, 2.0), TypeError, r"rank must be an int, got 2\.0"),
        (lambda: LowRankLinear(8, 12, True), TypeError, "rank must be an int, got True"),
        (lambda: LowRankLinear(0, 12, 1), ValueError, "in_features must be a positive integer"),
        (lambda: LowRankConv2d(6, 8, 3, 7, unfolding="input"), ValueError, r"'input' is \(72, 6\), got 7"),
        (lambda: LowRankConv2d(6, 8, 3, 5, groups=2), ValueError, "rank must be from 1 to 4 .* in each of 2 groups"),
        (lambda: LowRankConv2d(6, 8, 3, 2, groups=4), ValueError, "groups must divide 6 input and 8 output channels"),
        (lambda: LowRankConv2d(6, 8, 3, 2, groups=0), ValueError, "groups must be a positive integer"),
        (lambda: LowRankConv2d(6, 8, (3, 3, 3), 2), ValueError, "kernel_size must be a positive integer, or 2 of them"),
        (lambda: LowRankConv2d(6, 8, 3, 2, stride=0), ValueError, "stride must be a positive integer"),
        (lambda: LowRankConv2d(6, 8, 3, 2, padding="full"), ValueError, "padding must be 'same', 'valid'"),
        (lambda: LowRankConv2d(6, 8, 3, 2, padding="same", stride=2), ValueError, "padding must not be 'same' for a"),
        (lambda: LowRankConv2d(6, 8, 3, 2, padding_mode="mirror"), ValueError, "padding_mode must be one of .* got 'm"),
        (lambda: LowRankConv2d(6, 8, 3, 2, unfolding="rows"), ValueError, "unfolding must be one of .* got 'rows'"),
        (lambda: LowRankConv2d(6, 8, 3, 2)(torch.zeros(2, 8, 6, 6)), ValueError, "input must have 6 channels"),
        (lambda: LowRankConv2d(6, 8, 3, 2)(torch.zeros(6, 6)), ValueError, "input must have 3 or 4 dimensions"),
        (lambda: low_rank_layer(nn.ConvTranspose2d(6, 8, 3), 2), TypeError, "got ConvTranspose2d"),
        (lambda: low_rank_layer(nn.ReLU(), 2), TypeError, r"module must be a torch\.nn\.Linear, Conv1d, .* got ReLU"),
        (lambda: low_rank_layer(nn.Linear(6, 8), 7), ValueError, "rank must be from 1 to 6"),
        (lambda: low_rank_layer(nn.Linear(6, 8), 2, method="best"), ValueError, "method must be one of 'spectral'"),
        (lambda: low_rank_layer(nn.Linear(6, 8), 2, groups=2), TypeError, "multiple values for .* 'groups'"),
        (lambda: low_rank_layer(nn.Linear(6, 8), 2, method="relu", factors=PAIR), ValueError, "factors are given"),
        (lambda: low_rank_layer(with_nan(), 2), ValueError, "weight must be finite"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
