"""Whole models to low-rank layers and back: functions, what stays, sizes, batch normalization, optimizers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from retract.nets.cnn import resnet20
from retract.nets.compress import decompress, factorize
from retract.nets.frobenius_decay import factor_pairs, frobenius_groups, frobenius_penalty
from retract.nets.init import function_error, lowrank_factors, lowrank_factors_with_bias
from retract.nets.invariance import find_scale_invariant
from retract.nets.layers.low_rank import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from retract.nets.summary import summary
from retract.optim import FrobeniusDecay
from tests.nets.every_layer import INDICES, every_layer, state
from tests.nets.low_rank_models import low_rank, ranks, stack
from tests.nets.test_compress_tensor import CONVOLUTIONS

LOW_RANK = {"conv1d": LowRankConv1d, "linear": LowRankLinear, "conv2d": LowRankConv2d, "conv3d": LowRankConv3d}
LOW_RANK |= {"first": LowRankLinear}


@pytest.fixture
def model():
    return every_layer()


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("unfolding", ["output", "input", "separable"])
def test_round_trip(model, unfolding):
    dense = copy.deepcopy(model)
    objects = list(model.modules())
    assert factorize(model, "lowrank", 3, unfolding=unfolding) is model
    assert {name: type(model.get_submodule(name)) for name in ranks(model)} == LOW_RANK
    assert [id(one) for one in model.modules()] == [id(one) for one in objects]
    expected = model(INDICES)
    assert (expected - dense(INDICES)).abs().max() > 1e-4
    assert decompress(model) is model
    torch.testing.assert_close(model(INDICES), expected, atol=1e-12, rtol=0)
    assert [type(one) for one in model.modules()] == [type(one) for one in dense.modules()]
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert type(parameter) is nn.Parameter and parameter.is_leaf and parameter.is_contiguous()
        assert parameter.shape == before.shape and parameter.requires_grad == before.requires_grad


@pytest.mark.parametrize("unfolding", ["output", "input", "separable"])
@pytest.mark.parametrize(("build", "shape"), CONVOLUTIONS)
def test_geometry_goes_there_and_back(build, shape, unfolding):
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    before = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    dense = copy.deepcopy(layer)
    factorize(layer, "lowrank", 2, unfolding=unfolding)
    left, right = lowrank_factors(dense.weight, rank=2, method="spectral", unfolding=unfolding, groups=dense.groups)
    torch.testing.assert_close(layer.unfolding.matrix(layer.weight), left @ right, atol=1e-12, rtol=0)
    dense.weight.data = layer.weight.data
    torch.testing.assert_close(layer(x), dense(x), atol=1e-12, rtol=0)
    decompress(layer)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-12, rtol=0)
    assert {name: value for name, value in vars(layer).items() if not name.startswith("_")} == before
    assert repr(layer) == repr(dense)


def test_full_rank_keeps_the_function(model):
    expected = model(INDICES)
    factorize(model, "lowrank", 10**6, init="relu_dc")
    torch.testing.assert_close(model(INDICES), expected, atol=1e-10, rtol=0)


def test_hooks_modes_gradients_and_what_users_have_set_remain():
    layer, seen = nn.Linear(6, 8), []
    layer.weight.requires_grad_(False)
    layer.mark = "mine"
    layer.register_forward_hook(lambda module, _, output: seen.append((module, output.shape)))
    layer.train(False)
    bias = layer.bias
    factorize(layer, "lowrank", 2)
    layer(torch.ones(3, 6))
    assert seen == [(layer, (3, 8))] and layer.mark == "mine" and not layer.training
    assert layer.bias is bias and not layer.left.requires_grad and not layer.right.requires_grad
    decompress(layer)
    layer(torch.ones(3, 6))
    assert len(seen) == 2 and layer.mark == "mine" and not layer.training
    assert layer.bias is bias and not layer.weight.requires_grad


def test_factors_that_are_parametrized_become_a_weight():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = factorize(nn.Linear(6, 8).double(), "lowrank", 2)
    for name in ("left", "bias"):
        parametrize.register_parametrization(layer, name, Twice())
    other, x = copy.deepcopy(layer), torch.randn(3, 6, dtype=torch.float64)
    expected = layer(x)
    for one in (layer, other):
        decompress(one)
        torch.testing.assert_close(one(x), expected, atol=1e-12, rtol=0)
        assert isinstance(one, nn.Linear) and list(one.parametrizations) == ["bias"]
        assert one.weight.requires_grad and next(iter(dict(one.named_parameters()))) == "weight"


def test_layers_that_stay_are_named_with_the_reason():
    layers = {
        "good": nn.Linear(6, 6),
        "grouped": nn.Conv2d(4, 8, 3, groups=2),
        "table": nn.Embedding(9, 6),
        "up": nn.ConvTranspose2d(4, 4, 3),
        "own": type("Own", (nn.Linear,), {})(6, 6),
        "meta": nn.Linear(6, 6, device="meta"),
        "complex": nn.Linear(6, 6, dtype=torch.complex64),
        "normalized": weight_norm(nn.Linear(6, 6)),
        "tied": nn.Linear(6, 6, bias=False),
        "twin": nn.Linear(6, 6, bias=False),
        "already": LowRankLinear(6, 6, 2),
    }
    layers["twin"].weight = layers["tied"].weight
    model = nn.ModuleDict(layers)
    rest = nn.ModuleDict({name: module for name, module in layers.items() if name not in ("good", "grouped")})
    with pytest.raises(ValueError, match="no layer to factorize") as raised:
        factorize(rest, "lowrank", 2)
    lines = dict(line.strip().split(": ", 1) for line in str(raised.value).splitlines()[1:])
    parts = {"table": "Embedding is not one of", "up": "ConvTranspose2d is not", "own": "Own is not", "meta": "meta"}
    parts |= {"complex": "complex64", "normalized": "parametrized already", "tied": "shared", "twin": "shared"}
    parts |= {"already": "it is a LowRankLinear already"}
    assert lines.keys() == parts.keys()
    assert all(part in lines[name] for name, part in parts.items())
    factorize(model, "lowrank", 2)
    assert ranks(model) == {"good": 2, "grouped": 2, "already": 2}


def test_nothing_changes_when_a_layer_cannot_be_converted(model):
    model.conv3d.weight.data[0, 0, 0, 0, 0] = math.nan
    before = state(model)
    for sizes in ({"rank": 2}, {"budget": 0.9}, {"energy": 0.9}):
        with pytest.raises(ValueError, match="layer 'conv3d': weight must be finite"):
            factorize(model, "lowrank", **sizes)
        assert state(model) == before


# --------------------------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("init", ["spectral", "scaled", "norm", "row_norm", "relu", "relu_dc", "relu_varpro"])
def test_starts_are_those_of_lowrank_factors(init):
    model = stack(12, 10, 8)
    slopes = {"0": 0.1, "1": 1.0}
    expected = [lowrank_factors(model[int(i)].weight, rank=3, method=init, slope=a) for i, a in slopes.items()]
    factorize(model, "lowrank", 3, init=init, slope=slopes)
    for layer, (left, right) in zip(model, expected, strict=True):
        assert torch.equal(layer.left, left) and torch.equal(layer.right, right)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_corrected(bias):
    torch.manual_seed(0)
    layer = nn.Linear(12, 10, bias=bias).double()
    dense = copy.deepcopy(layer)
    factorize(layer, "lowrank", 3, init="relu", correct_bias=True)
    expected = lowrank_factors_with_bias(dense.weight, dense.bias, rank=3)
    for name in ("left", "right", "bias"):
        torch.testing.assert_close(getattr(layer, name), getattr(expected, name), atol=1e-14, rtol=0)
    assert [name for name, _ in layer.named_parameters()] == ["left", "right", "bias"]
    assert function_error(layer, dense) < function_error(
        factorize(copy.deepcopy(dense), "lowrank", 3, init="relu"), dense
    )
    assert list(decompress(layer).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("bias", "frozen"), [(True, "weight"), (True, "bias"), (False, "weight")])
def test_what_is_frozen_stays_so_where_a_bias_is_corrected(bias, frozen):
    layer = nn.Linear(12, 10, bias=bias)
    layer.get_parameter(frozen).requires_grad_(False)
    factorize(layer, "lowrank", 3, init="relu", correct_bias=True)
    assert layer.left.requires_grad == (frozen != "weight")
    assert layer.bias.requires_grad == (frozen != "bias" and bias)  # a new one goes with the weight


def test_random_start():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    before = layer.weight.detach().clone()
    factorize(layer, "lowrank", 16, init="kaiming", generator=torch.Generator().manual_seed(1))
    again = factorize(
        nn.Linear(64, 64, bias=False), "lowrank", 16, init="kaiming", generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(layer.left, again.left) and torch.equal(layer.right, again.right)
    assert abs(torch.cosine_similarity(layer.weight.flatten(), before.flatten(), dim=0)) < 0.1
    assert float(layer.weight.detach().square().sum()) == pytest.approx(2 * 64, rel=1e-4)  # gain² out


def test_filters_before_a_batch_normalization_have_the_norms_that_it_gives():
    """Fits and shares are those of the weight times |gamma| / norm; the left factor is scaled back."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.LeakyReLU(0.2), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(150, 8)).double()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[0].weight[:2], std=30.0)
    model[1].weight.data[3] = 0.0
    dense = copy.deepcopy(model)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    factorize(model, "lowrank", 3, init="relu_dc", unfolding={"0": "separable"}, example_input=x)
    assert torch.equal(model[1].running_mean, dense[1].running_mean) and model.training and model[1].training
    weight, gamma = dense[0].weight, dense[1].weight.abs()
    scales = (gamma.clamp(min=1e-3 * gamma.max()) / weight.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    left, right = lowrank_factors(weight * scales, rank=3, method="relu_dc", unfolding="separable")
    torch.testing.assert_close(model[0].unfolding.matrix(model[0].weight * scales), left @ right, atol=1e-12, rtol=0)
    left, _ = lowrank_factors(dense[3].weight, rank=3, method="relu_dc", slope=0.2)
    assert torch.equal(model[3].left, left)
    left, right = lowrank_factors(dense[6].weight, rank=3, method="spectral")
    torch.testing.assert_close(model[6].weight, left @ right, atol=1e-12, rtol=0)  # nothing follows


def test_a_batch_normalization_of_another_axis_does_not_scale_filters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).double()  # of sequences: positions, not channels
    left, right = lowrank_factors(model[0].weight, rank=2, method="spectral")
    factorize(model, "lowrank", 2, example_input=torch.randn(3, 6, 8, dtype=torch.float64))
    torch.testing.assert_close(model[0].weight, left @ right, atol=1e-12, rtol=0)


def test_scales_of_filters_before_a_batch_normalization_do_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12)).double()
    x, other = torch.randn(5, 16, dtype=torch.float64), copy.deepcopy(model)
    factors = torch.logspace(-3, 3, 12, dtype=torch.float64)
    other[0].weight.data *= factors[:, None]
    other[0].weight.data[4] = model[0].weight.data[4] = 0.0
    for one in (model, other):
        factorize(one, "lowrank", budget=0.5, correct_bias=True, example_input=x)
    assert ranks(model) == ranks(other)
    torch.testing.assert_close(model[0].weight * factors[:, None], other[0].weight, atol=1e-12, rtol=1e-9)
    assert torch.equal(model[0].bias, other[0].bias)  # none is fitted that would be removed


def test_half_precision_and_frozen_statistics():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).half()
    factorize(model, "lowrank", 3, init="relu", example_input=torch.randn(4, 8).half())
    assert model[0].left.dtype == torch.float16 and model(torch.randn(4, 8).half()).isfinite().all()
    assert decompress(model)[0].weight.dtype == torch.float16


# -------------------------------------------------------------------------------------------------------- wrong options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of rank, budget, energy must be given"),
        ({"rank": 2, "energy": 0.5}, ValueError, "got rank and energy"),
        ({"rank": 0}, ValueError, "layer '0': rank must be from 1 to 24"),
        ({"rank": 2.0}, TypeError, "layer '0': rank must be an int"),
        ({"rank": True}, TypeError, "layer '0': rank must be an int"),
        ({"energy": 1.5}, ValueError, "layer '0': energy must be a fraction"),
        ({"energy": "0.5"}, TypeError, "layer '0': energy must be a number"),
        (
            {"budget": 1.5},
            ValueError,
            r"budget must be a fraction in \(0, 1\], or an int, a number of elements, got 1.5",
        ),
        ({"budget": "half"}, TypeError, "budget must be a number"),
        ({"budget": 90}, ValueError, "budget allows 90 elements, but the layers have 96 at rank 1"),
        ({"budget": {"0": -1}}, ValueError, "layer '0': budget must be 1 element or more"),
        ({"rank": 2, "unfolding": "rows"}, ValueError, "layer '0': unfolding must be one of 'output', 'input'"),
        ({"rank": 2, "init": "fit"}, ValueError, "layer '0': init must be one of 'spectral', .*'kaiming', got 'fit'"),
        ({"rank": 2, "slope": math.nan}, ValueError, "layer '0': slope must be a finite number"),
        ({"rank": 2, "mode": "fan_in"}, ValueError, "layer '0': mode given with init='spectral'"),
        ({"rank": 2, "init": "kaiming", "slope": 0.1}, ValueError, "layer '0': slope given with init='kaiming'"),
        ({"rank": 2, "init": "kaiming", "correct_bias": True}, ValueError, "correct_bias given with init='kaiming'"),
        ({"rank": 2, "cost": "parameters"}, ValueError, "cost='parameters' is what a budget counts"),
        (
            {"budget": 0.5, "cost": "flops"},
            ValueError,
            "cost must be one of 'parameters', 'multiplications', got 'flops'",
        ),
        ({"budget": 0.5, "cost": "multiplications"}, ValueError, "needs an example_input"),
        ({"rank": 2, "example_input": torch.ones(2, 3)}, ValueError, "example_input: the model's forward pass failed"),
        ({"rank": 2, "execution": "auto"}, ValueError, "kind 'lowrank' takes no execution"),
    ],
)
def test_wrong_options(options, error, message):
    model = stack(32, 24, 16)
    before = state(model)
    with pytest.raises(error, match=message):
        factorize(model, "lowrank", **options)
    assert state(model) == before


def test_layer_that_the_forward_pass_does_not_call():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(input=x)

    with pytest.raises(ValueError, match="the forward pass on it does not call unused"):
        factorize(Partial(), "lowrank", 1, example_input=torch.ones(2, 4))
    model = factorize(Partial(), "lowrank", 1, example_input=(torch.ones(2, 4),), skip="unused")
    assert ranks(model) == {"used": 1} and not model.used._forward_hooks


# -------------------------------------------------------------------------------------------------- summary, optimizers


@pytest.mark.parametrize("unfolding", ["output", "input", "separable"])
def test_rows_of_the_summary(unfolding):
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, bias=False)
    factorize(layer, "lowrank", 2, unfolding=unfolding)
    (row,) = summary(layer).layers
    rows, columns = layer.unfolding.matrix_shape
    assert (row.kind, row.rank, row.shape, row.factored) == ("lowrank", 2, (12, 4, 3, 3), True)
    assert row.parameters == layer.left.numel() + layer.right.numel()
    assert row.degrees_of_freedom == 2 * 2 * (rows + columns - 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 8, 8, 8))
    assert 16 * row.flops == counter.get_total_flops() and row.dense_flops == 2 * 12 * 4 * 9


def test_summary_of_a_model(model):
    dense = summary(model)
    factorize(model, "lowrank", 2)
    found = summary(model)
    saved = sum(row.elements - row.degrees_of_freedom for row in found.layers)
    assert found.elements == dense.elements and found.degrees_of_freedom == found.elements - saved
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(row.kind == "lowrank" for row in found.layers) == len(LOW_RANK)
    assert any(line.split()[2:4] == ["lowrank", "2"] for line in str(found).splitlines())


def test_optimizers_find_the_factors():
    torch.manual_seed(0)
    model = factorize(resnet20(), "lowrank", budget=0.3, skip="fc")
    pairs = factor_pairs(model)
    assert len(pairs) == len(ranks(model)) > 9
    optimizer = torch.optim.SGD(frobenius_groups(model, 1e-2), lr=0.1)
    FrobeniusDecay(optimizer, pairs, 1e-2)
    values = torch.cat([torch.linalg.svdvals((layer.left @ layer.right).detach()) for _, layer in low_rank(model)])
    assert frobenius_penalty(model).item() == pytest.approx(float(values.square().sum()) / 2, rel=1e-4)
    model(torch.randn(2, 3, 32, 32)).sum().mul(0).backward()
    optimizer.step()  # of balanced factors, a singular value is multiplied by (1 - rate decay value)²
    expected = float((values * (1 - 1e-3 * values) ** 2).square().sum()) / 2
    assert frobenius_penalty(model).item() == pytest.approx(expected, rel=1e-4)


def test_scale_invariance_of_factors_is_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 3, 6, 6)
    model(x)
    factorize(model, "lowrank", 2, skip="4")
    found = find_scale_invariant(model, x)
    assert found["0.left"].kind == "filter" and found["0.right"].kind != "none" and found["4.weight"].kind == "none"
