"""Whole models to canonical layers and back: every way to say how large, what is warned of, and what stays."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from retract.nets.compress import decompress, factorize
from retract.nets.parametrizations.canonical import canonical_weight
from retract.nets.parametrizations.models import manifold_groups
from retract.nets.summary import summary
from tests.nets.every_layer import INDICES, LAYERS, every_layer, small_convnet, state

CANONICAL = [name for name in LAYERS if name != "embedding"]


@pytest.fixture
def model():
    return every_layer()


def converted(model):
    return [name for name, module in model.named_modules() if canonical_weight(module)]


def low_rank(*shape, rank=3):
    """Orthogonal terms, which the power method finds exactly."""
    factors = [torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))[0].mT for size in shape]
    factors[0] = factors[0] * torch.arange(1, rank + 1).unsqueeze(1)
    letters = "abcde"[: len(shape)]
    return torch.einsum(",".join("r" + letter for letter in letters) + "->" + letters, *factors)


@pytest.mark.parametrize(
    ("form", "execution", "init"),
    [("euclidean", "auto", "fit"), ("oblique", "weight", "normal"), ("oblique", "auto", "uniform")],
)
def test_round_trip(model, form, execution, init):
    dense = copy.deepcopy(model)
    modules = dict(model.named_modules())
    assert factorize(model, "canonical", 2, form=form, execution=execution, init=init) is model
    assert converted(model) == CANONICAL
    expected = model(INDICES)
    assert (expected - dense(INDICES)).abs().max() > 1e-3
    assert decompress(model) is model
    torch.testing.assert_close(model(INDICES), expected, atol=1e-12, rtol=0)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in dense.modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert type(parameter) is nn.Parameter
        assert parameter.shape == before.shape and parameter.dtype == before.dtype
        assert parameter.requires_grad and parameter.is_leaf and parameter.is_contiguous()
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(dense(INDICES), expected, atol=1e-12, rtol=0)
    torch.save(model, "/dev/null")


# ----------------------------------------------------------------------------------------------------- how large, where


def test_int_rank_is_cut_to_what_a_tensor_can_need_and_then_keeps_the_function(model):
    expected = model(INDICES)
    with pytest.warns(UserWarning, match="rank: more terms than can be told apart in .*conv2d"):
        factorize(model, "canonical", 10**6)
    ranks = {row.name: row.rank for row in summary(model).layers if row.kind == "canonical"}
    for name in CANONICAL:
        shape = model.get_submodule(name).weight.shape
        assert ranks[name] == shape.numel() // max(shape)
    torch.testing.assert_close(model(INDICES), expected, atol=1e-10, rtol=0)


def test_warning_names_layers_and_terms_and_points_to_the_caller():
    with pytest.warns(UserWarning, match=r"told apart in 0 \(5\), 2 \(5\): they") as caught:
        factorize(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2)), "canonical", 5)
    assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorize(nn.Conv2d(8, 8, 3), "canonical", 4)


def test_error_holds_and_takes_no_more_terms_than_there_are(model):
    with torch.no_grad():
        model.up2d.weight.copy_(low_rank(*model.up2d.weight.shape))
        model.linear.weight.copy_(low_rank(16, 6, rank=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    errors = {"up2d": 1e-6, "linear": 1e-9, "own": 1e-6}
    factorize(model, "canonical", error=errors, form="oblique", execution="weight")
    assert converted(model) == ["linear", "up2d"]
    for name, rank, error in (("linear", 2, 1e-9), ("up2d", 3, 1e-6)):
        weight = model.get_submodule(name).weight.detach()
        assert (weight - before[f"{name}.weight"]).norm() <= error * before[f"{name}.weight"].norm()
        found, _ = canonical_weight(model.get_submodule(name))
        assert (found.rank, found.form, found.execution) == (rank, "oblique", "weight")
    (reason,) = [row.obstacle for row in summary(model).layers if row.name == "own"]
    assert re.fullmatch(
        r"canonical with error=1e-06: 2 terms, as many as save elements, leave an error of 0\.\d+", reason
    )


def test_budget_holds_in_each_layer_and_small_layers_stay_dense_and_say_why():
    model = factorize(small_convnet(), "canonical", budget=0.3, init="normal")
    first, second, third = summary(model).layers
    for row, a_term in ((first, 27), (second, 35)):
        assert row.parameters == row.rank * a_term
        assert 0.3 * row.elements - a_term < row.parameters <= 0.3 * row.elements
    assert third.kind == "dense"
    assert third.obstacle == "canonical with budget=0.3: one term has 21 elements, its budget is 19"
    assert f"4 is dense: {third.obstacle}" in str(summary(copy.deepcopy(model)))
    factorize(model, "canonical", budget={"4": 63})
    assert [row.obstacle for row in summary(model).layers] == ["", "", ""]
    assert [row.rank for row in summary(model).layers][2] == 3
    assert [vars(m).keys() for m in decompress(model).modules()] == [vars(m).keys() for m in small_convnet().modules()]


def test_zero_weights_have_no_relative_error_but_terms():
    model = small_convnet()
    nn.init.zeros_(model[2].weight)
    before = state(model)
    with pytest.raises(ValueError, match="layer '2': weight is zero, of which there is no relative error"):
        factorize(model, "canonical", error=0.9)
    assert state(model) == before
    factorize(model, "canonical", 2)
    assert converted(model) == ["0", "2", "4"] and not model[2].weight.any()


def test_rank_by_name_and_function(model):
    factorize(model, "canonical", {"conv*": 2, "conv2d": 1, "linear": 3}, skip="conv1d")
    assert {row.name: row.rank for row in summary(model).layers if row.rank} == {"linear": 3, "conv2d": 2, "conv3d": 2}
    factorize(model, "canonical", lambda name, module: 1 if isinstance(module, nn.Conv1d) else None)
    assert {row.name for row in summary(model).layers if row.rank} == {"linear", "conv1d", "conv2d", "conv3d"}


@pytest.mark.parametrize(
    ("options", "variance"), [({}, 2 / 288), ({"nonlinearity": "linear"}, 1 / 288), ({"mode": "fan_out"}, 2 / 576)]
)
@pytest.mark.parametrize("init", ["kaiming", "normal", "uniform"])
def test_random_start_has_its_gain(init, options, variance):
    generator = torch.Generator().manual_seed(0)
    layer = factorize(nn.Conv2d(32, 64, 3), "canonical", 100, init=init, generator=generator, **options)
    assert float(layer.weight.detach().square().mean()) == pytest.approx(variance, rel=0.05)


def test_als_is_another_fit():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3).double()
    fits = [factorize(copy.deepcopy(layer), "canonical", 5, init=init) for init in ("fit", "power", "als")]
    errors = [float((fit.weight - layer.weight).detach().norm() / layer.weight.detach().norm()) for fit in fits]
    assert errors[0] == pytest.approx(errors[1], abs=0.05)
    assert 0.3 < errors[2] < errors[0] + 0.02 and max(errors) < 0.95
    assert errors[2] != errors[1]


# ------------------------------------------------------------------------------------------------------ stays as it was


def test_oblique_factors_are_points_of_a_manifold():
    model = factorize(small_convnet(), "canonical", 3, form="oblique")
    (on_manifold,) = [group["params"] for group in manifold_groups(model) if "manifold" in group]
    assert len(on_manifold) == 4 + 4 + 2
    for _, factor in on_manifold:
        torch.testing.assert_close(factor.detach().norm(dim=1), torch.ones(3))


def test_layers_that_cannot_be_canonical_are_named_with_the_reason():
    rest = nn.ModuleDict({"grouped": nn.Conv2d(4, 4, 3, groups=2), "table": nn.Embedding(9, 6)})
    with pytest.raises(ValueError, match="no layer to factorize") as failure:
        factorize(rest, "canonical", 2)
    listed = dict(line.strip().split(": ", 1) for line in str(failure.value).splitlines()[1:])
    assert "groups" in listed["grouped"] and "Embedding" in listed["table"]
    model = nn.ModuleDict({"good": nn.Linear(6, 6), **rest})
    assert converted(factorize(model, "canonical", 2)) == ["good"]


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layer(training):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    factorize(model, "canonical", 3)
    assert converted(model) == ["self_attn.out_proj", "linear1", "linear2"]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(decompress(model)(x), expected, atol=1e-12, rtol=0)


def test_hooks_mode_and_bias_stay(model):
    calls = []
    layer, bias = model.conv2d, model.conv2d.bias
    layer.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    layer.eval()
    for change in (lambda: factorize(model, "canonical", 2), lambda: decompress(model)):
        change()
        model(INDICES)
        assert model.conv2d is layer and layer.bias is bias and not layer.training and model.linear.training
    assert len(calls) == 2


def test_half_precision_stays():
    layer = factorize(nn.Conv2d(6, 8, 3).bfloat16(), "canonical", 4)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    layer = factorize(decompress(layer), "canonical", error=0.1)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} and canonical_weight(layer)[0].rank <= 8
    assert {p.dtype for p in decompress(layer).parameters()} == {torch.bfloat16}


def test_requires_grad_follows_the_factors():
    model = small_convnet()
    model[0].weight.requires_grad_(False)
    factorize(model, "canonical", 2)
    assert not any(p.requires_grad for p in model[0].parametrizations.parameters())
    decompress(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]


def test_copy_is_decompressed_alone(model):
    factorize(model, "canonical", 2)
    expected = model(INDICES)
    for _ in range(2):
        exported = decompress(copy.deepcopy(model))
        torch.testing.assert_close(exported(INDICES), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(model(INDICES), expected, atol=0, rtol=0)
    assert converted(model) == CANONICAL


def test_training_after_conversion_and_back(model):
    factorize(model.train(), "canonical", 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(INDICES).square().sum().backward()
        optimizer.step()
    expected = model.eval()(INDICES)
    torch.testing.assert_close(decompress(model)(INDICES), expected, atol=1e-12, rtol=0)


# ----------------------------------------------------------------------------------------- errors leave the model alone


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"rank": None}, "exactly one of rank, budget, error must be given for kind 'canonical', got none"),
        (ValueError, {"error": 0.1}, "exactly one of rank, budget, error .*, got rank and error"),
        (ValueError, {"spectrum": "free"}, "kind 'canonical' takes no spectrum: it takes rank, budget, error, "),
        (ValueError, {"modes": ((2,), (2,))}, "kind 'canonical' takes no modes"),
        (ValueError, {"form": "stiefel"}, "layer '0': form must be 'euclidean' or 'oblique', got 'stiefel'"),
        (ValueError, {"execution": "fast"}, "layer '0': execution must be"),
        (ValueError, {"init": "spread"}, "layer '0': init must be"),
        (ValueError, {"init": "fit", "mode": "fan_in"}, "layer '0': mode given with init='fit'"),
        (ValueError, {"init": "als", "nonlinearity": "relu"}, "layer '0': nonlinearity given with init='als'"),
        (ValueError, {"mode": "fan_both"}, "layer '0': mode must be"),
        (ValueError, {"rank": 0}, "layer '0': rank must be 1 or more, got 0"),
        (TypeError, {"rank": 2.5}, "layer '0': rank must be an int"),
        (TypeError, {"rank": True}, "layer '0': rank must be an int"),
        (ValueError, {"rank": {"5": 2}}, "rank: '5' fits no layer"),
        (ValueError, {"rank": None, "budget": -0.5}, r"layer '0': budget must be a fraction in \(0, 1\]"),
        (ValueError, {"rank": None, "budget": float("nan")}, "layer '0': budget must be a fraction"),
        (TypeError, {"rank": None, "budget": True}, "layer '0': budget must be a number"),
        (ValueError, {"rank": None, "error": 0.1}, "layer '0': error needs init='fit'"),
        (ValueError, {"rank": None, "error": 1.5, "init": "fit"}, r"layer '0': error must be .* in \(0, 1\)"),
        (TypeError, {"rank": None, "error": "small", "init": "fit"}, "layer '0': error must be a number"),
        (
            ValueError,
            {"rank": None, "error": 1e-9, "init": "fit"},
            r"no layer to factorize\n  0: canonical with error=",
        ),
        (ValueError, {"rank": None, "budget": 10}, r"no layer to factorize\n  0: canonical with budget=10: one term"),
    ],
)
def test_wrong_arguments(error, arguments, message):
    model = small_convnet()
    before = state(model)
    with pytest.raises(error, match=message):
        factorize(model, **{"kind": "canonical", "rank": 2, "init": "normal", **arguments})
    assert state(model) == before


@pytest.mark.parametrize("size", [{"rank": 2}, {"budget": 0.5}, {"error": 0.9}])
def test_nan_in_the_last_layer_leaves_the_model_alone(size):
    model = small_convnet()
    with torch.no_grad():
        model[4].weight[2, 3] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match="layer '4': weight has NaN"):
        factorize(model, "canonical", **size)
    assert state(model) == before
