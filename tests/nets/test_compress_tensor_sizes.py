"""How large tensor layers become: ranks, budgets, errors and modes, as one value, by name or by function."""

import copy
import re

import pytest
import torch
from torch import nn

from retract.nets.compress import decompress, factorize
from retract.nets.layers.tensor_formats import FORMATS
from retract.nets.summary import summary
from tests.nets.every_layer import small_convnet, state

formats = pytest.mark.parametrize("kind", FORMATS)


def converted(model):
    kinds = {row.name: row.kind for row in summary(model).layers}
    return [name for name, kind in kinds.items() if kind != "dense"]


@pytest.mark.parametrize(("kind", "init"), [*((kind, "kaiming") for kind in FORMATS), ("tucker2", "fit")])
def test_budget_holds_in_each_layer(kind, init):
    model = factorize(small_convnet(), kind, budget=0.5, init=init)
    rows = [row for row in summary(model).layers if row.kind != "dense"]
    assert len(rows) >= 2
    for row in rows:
        assert row.parameters <= 0.5 * row.elements
        assert row.parameters > 0.25 * row.elements or max(row.bonds) <= 2


def test_budget_as_a_number_of_elements_and_by_name():
    model = factorize(small_convnet(), "cp", budget={"0": 300, "2": 0.2}, init="kaiming")
    first, second, third = summary(model).layers
    assert 300 - 26 < first.parameters <= 300  # a term has 12 + 8 + 3 + 3 elements
    assert 0.2 * 1728 - 34 < second.parameters <= 0.2 * 1728
    assert third.kind == "dense"


def test_layers_that_a_budget_would_not_make_smaller_stay_dense_and_say_why():
    model = factorize(small_convnet(), "cp", budget=0.1, init="kaiming")
    row = summary(model).layers[-1]
    assert (row.name, row.kind) == ("4", "dense")
    assert row.obstacle == "cp with budget=0.1: 6 elements are fewer than the format needs"
    assert f"4 is dense: {row.obstacle}" in str(summary(copy.deepcopy(model)))
    factorize(model, "cp", 1, init="kaiming")
    assert all(row.kind == "cp" and not row.obstacle for row in summary(model).layers)
    assert [vars(m).keys() for m in decompress(model).modules()] == [vars(m).keys() for m in small_convnet().modules()]


@pytest.mark.parametrize("kind", ["tucker2", "tensor_train"])
def test_error_holds_in_each_layer_and_random_weights_stay_dense(kind):
    model = small_convnet()
    with torch.no_grad():  # a weight of low rank in every unfolding, and a little beside it
        weight = torch.einsum("or,ir,hr,wr->oihw", *(torch.randn(n, 2) for n in (16, 12, 3, 3)))
        model[2].weight.copy_(weight + 0.01 * weight.std() * torch.randn_like(weight))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factorize(model, kind, error=0.05)
    assert converted(model) == ["2"]
    change = (model[2].weight.detach() - before["2.weight"]).norm() / before["2.weight"].norm()
    assert 1e-3 < float(change) <= 0.05
    reasons = [row.obstacle for row in summary(model).layers]
    assert re.match(f"{kind} with error=0.05: it would store .* elements, its weight has 864", reasons[0])
    assert re.match(f"{kind} with error=0.05: ", reasons[2])


def test_random_start_may_have_the_ranks_of_an_error():
    torch.manual_seed(0)
    layer = nn.Linear(9, 8).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 2) @ torch.randn(2, 9))
    weight = layer.weight.detach().clone()
    factorize(layer, "tucker2", error=1e-6, init="kaiming")
    assert {layer.network.dims[bond] for bond in layer.network.bonds} == {2}
    assert (layer.weight.detach() - weight).norm() > 0.1 * weight.norm()


def test_error_without_a_layer_to_gain_from():
    model = small_convnet()
    before = state(model)
    with pytest.raises(ValueError, match=r"no layer to factorize\n  0: tucker2 with error=1e-06: it would store"):
        factorize(model, "tucker2", error=1e-6)
    assert state(model) == before


def test_ranks_and_modes_by_name():
    model = factorize(
        small_convnet(), "tensor_ring", rank={"0": 3, "2": 2}, modes={"2": ((4, 4), (3, 4))}, init="kaiming", skip="4"
    )
    first, second, _ = summary(model).layers
    assert set(first.bonds) == {3}
    assert second.bonds == (2,) * 5 and model[2].network.weight_shape == (16, 12, 3, 3)
    assert [model[2].network.dims[label] for label in model[2].network.outputs] == [4, 4]
    assert [model[2].network.dims[label] for label in model[2].network.inputs] == [3, 4]


def test_all_ranks_of_a_layer():
    model = factorize(small_convnet(), "tucker2", rank=lambda name, module: (5, 4) if name == "2" else None)
    assert [row.bonds for row in summary(model).layers] == [None, (5, 4), None]
    assert [tuple(core.shape) for core in model[2].cores] == [(16, 5), (5, 4, 3, 3), (12, 4)]


def test_random_start_is_kaimings_and_takes_its_options():
    torch.manual_seed(0)
    linear, relu = (
        factorize(nn.Conv2d(32, 32, 3), "tucker2", 12, init="kaiming", nonlinearity=name) for name in ("linear", "relu")
    )
    assert float(linear.weight.detach().var()) == pytest.approx(1 / (32 * 9), rel=0.1)
    assert float(relu.weight.detach().var()) == pytest.approx(2 / (32 * 9), rel=0.1)
    wide = factorize(nn.Conv2d(32, 64, 3), "tucker2", 12, init="kaiming", mode="fan_out")
    assert float(wide.weight.detach().var()) == pytest.approx(2 / (64 * 9), rel=0.1)
    draws = [
        factorize(nn.Linear(9, 8), "cp", 3, init="kaiming", generator=torch.Generator().manual_seed(1)).weight
        for _ in range(2)
    ]
    assert torch.equal(*draws)


# ----------------------------------------------------------------------------------------- errors leave the model alone


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"kind": "kruskal"}, "kind must be one of svdp, sttp, canonical, lowrank, cp, .*, got 'kruskal'"),
        (ValueError, {"rank": None}, "exactly one of rank, budget, error must be given for kind 'cp', got none"),
        (ValueError, {"budget": 0.1}, "exactly one of rank, budget, error .*, got rank and budget"),
        (
            ValueError,
            {"spectrum": "free"},
            "kind 'cp' takes no spectrum: it takes rank, budget, error, execution, init",
        ),
        (ValueError, {"form": "stiefel"}, "kind 'cp' takes no form"),
        (ValueError, {"modes": ((2,), (2,))}, "kind 'cp' takes no modes"),
        (ValueError, {"kind": "svdp", "rank": None, "budget": 0.1}, "kind 'svdp' takes no budget"),
        (ValueError, {"kind": "svdp", "rank": None}, "rank must be given for kind 'svdp', got none"),
        (ValueError, {"kind": "sttp", "mode": "fan_in"}, "kind 'sttp' takes no mode"),
        (ValueError, {"init": "spread"}, "layer '0': init must be 'fit' or 'kaiming', got 'spread'"),
        (ValueError, {"init": "fit", "mode": "fan_in"}, "layer '0': mode given with init='fit'"),
        (ValueError, {"mode": "fan_both"}, "layer '0': mode"),
        (ValueError, {"nonlinearity": "cubic"}, "layer '0': nonlinearity"),
        (ValueError, {"execution": "fast"}, "layer '0': execution must be"),
        (ValueError, {"rank": 0}, "layer '0': rank"),
        (TypeError, {"rank": 2.5}, "layer '0': "),
        (TypeError, {"rank": True}, "layer '0': rank"),
        (ValueError, {"rank": {"4": (2, 3)}}, "layer '4': rank"),
        (ValueError, {"rank": {"5": 2}}, "rank: '5' fits no layer"),
        (ValueError, {"rank": None, "budget": {"5": 0.2}}, "budget: '5' fits no layer"),
        (ValueError, {"rank": None, "budget": 1.5}, r"layer '0': budget must be a fraction in \(0, 1\]"),
        (ValueError, {"rank": None, "budget": 0}, "layer '0': budget must be 1 element or more"),
        (TypeError, {"rank": None, "budget": "10 %"}, "layer '0': budget must be a number"),
        (ValueError, {"rank": None, "error": 1.0}, r"layer '0': error must be .* in \(0, 1\)"),
        (TypeError, {"rank": None, "error": "small"}, "layer '0': error must be a number"),
        (ValueError, {"kind": "tensor_ring", "modes": ((2, 2), (2, 4))}, "layer '0': out_modes"),
        (ValueError, {"kind": "tensor_ring", "modes": (3, 4, 2)}, "layer '0': modes must be a pair"),
    ],
)
def test_wrong_arguments(error, arguments, message):
    model = small_convnet()
    before = state(model)
    with pytest.raises(error, match=message):
        factorize(model, **{"kind": "cp", "rank": 2, "init": "kaiming", **arguments})
    assert state(model) == before


@formats
def test_nan_in_the_last_layer_leaves_the_model_alone(kind):
    model = small_convnet()
    with torch.no_grad():
        model[4].weight[2, 3] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match="layer '4': weight"):
        factorize(model, kind, 1)
    assert state(model) == before
