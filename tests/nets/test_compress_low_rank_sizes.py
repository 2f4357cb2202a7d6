"""Ranks of the layers of whole models, by hand, by energy and by budget, and layers that stay dense."""

import copy

import pytest
import torch
from torch import nn

from retract.nets.compress import factorize
from retract.nets.layers.low_rank import LowRankLayer
from retract.nets.summary import summary
from tests.nets.low_rank_models import low_rank, ranks, stack


def cost(model):
    return sum(layer.left.numel() + layer.right.numel() for _, layer in low_rank(model))


def with_spectrum(layer, spectrum):
    """The layer, its matrix of the given singular values and random singular vectors."""
    rows, columns = layer.weight.shape
    left, right = (nn.init.orthogonal_(torch.empty(n, len(spectrum), dtype=torch.float64)) for n in (rows, columns))
    layer.weight.data = left * torch.tensor(spectrum, dtype=torch.float64) @ right.mT
    return layer


def test_rank_by_hand_is_cut_and_by_layer():
    model = factorize(stack(8, 8, 3, 8), "lowrank", {"0": 2, "*": 100})
    assert ranks(model) == {"0": 2, "1": 3, "2": 3}
    model = factorize(stack(8, 8, 3, 8), "lowrank", {"0": 2})
    assert ranks(model) == {"0": 2}
    assert summary(model).layers[1].kind == "dense"


def test_energy_is_what_singular_values_keep():
    layer = with_spectrum(nn.Linear(9, 12), [3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1
    for energy, rank in ((0.6, 1), (0.61, 2), (13 / 15, 2), (0.87, 3), (0.99, 4), (1.0, 4)):
        assert factorize(copy.deepcopy(layer), "lowrank", energy=energy).rank == rank
    model = nn.Sequential(layer, nn.Linear(12, 12).double())
    factorize(model, "lowrank", energy=1.0)
    assert ranks(model) == {"0": 4}
    (_, row) = summary(model).layers
    assert row.obstacle == "lowrank with energy=1.0: at rank 12 it would have 288 elements, dense it has 144"
    flat = nn.Sequential(with_spectrum(nn.Linear(12, 12), [1.0] * 12))
    assert ranks(factorize(copy.deepcopy(flat), "lowrank", energy=5 / 12)) == {"0": 5}
    with pytest.raises(ValueError, match="at rank 6 it would have 144 elements, dense it has 144"):
        factorize(flat, "lowrank", energy=6 / 12)


def test_one_budget_for_all_layers():
    model = stack(32, 24, 16, 16)
    with_spectrum(model[0], [1.0] * 16)
    with_spectrum(model[1], [1.0] + [1e-3] * 7)
    for budget in (0.2, 0.35, 0.5):
        copied = copy.deepcopy(model)
        whole = sum(layer.weight.numel() for layer in model)
        factorize(copied, "lowrank", budget=budget)
        dense = sum(layer.weight.numel() for layer in copied if isinstance(layer, nn.Linear))
        assert budget * whole - 56 < cost(copied) + dense <= budget * whole
        assert ranks(copied)["1"] == 1 < ranks(copied)["0"]  # its other terms are worth little
    as_number = factorize(copy.deepcopy(model), "lowrank", budget=int(0.5 * whole))
    assert ranks(as_number) == ranks(copied)


def test_scale_of_a_layer_does_not_matter_to_the_budget():
    model = stack(32, 24, 16, 16)
    other = copy.deepcopy(model)
    other[1].weight.data *= 1e6
    assert ranks(factorize(model, "lowrank", budget=0.4)) == ranks(factorize(other, "lowrank", budget=0.4))


def test_a_budget_by_layer_is_each_layers_own():
    model = factorize(stack(32, 24, 16, 8), "lowrank", budget={"0": 0.5, "1": 120, "2": 10})
    assert ranks(model) == {"0": 384 // 56, "1": 3}
    reason = "lowrank with budget=10: a single term has 24 elements, its budget is 10"
    assert summary(model).layers[2].obstacle == reason


def test_layers_that_no_rank_makes_smaller_stay_dense_and_count():
    model = stack(32, 24, 1, 24)
    whole = sum(layer.weight.numel() for layer in model)
    factorize(model, "lowrank", budget=0.5)
    assert list(ranks(model)) == ["0"]
    assert cost(model) + 48 <= whole / 2 < cost(model) + 48 + 56
    assert (
        summary(model).layers[1].obstacle == "lowrank with budget=0.5: a single term has 25 elements, dense it has 24"
    )
    whole_model = stack(32, 24, 16)
    with pytest.raises(ValueError, match="the threshold that meets the budget is at a rank that would save nothing"):
        factorize(whole_model, "lowrank", budget=1.0)


def test_skipped_layers_are_outside_of_the_budget():
    model = stack(32, 24, 16)
    factorize(model, "lowrank", budget=0.5, skip="1")
    assert ranks(model) == {"0": 384 // 56}


def test_budget_of_multiplications():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(16, 16, 3), nn.ReLU())
    x = torch.randn(2, 8, 12, 12)
    by_parameters = ranks(factorize(copy.deepcopy(model), "lowrank", budget=0.5, example_input=x))
    factorize(model, "lowrank", budget=0.5, cost="multiplications", example_input=x)
    spent = 2 * (ranks(model)["0"] * 144 * (72 + 16))
    whole = 2 * (144 * 16 * 72 + 16 * 144)
    second = model[2]
    spent += 2 * (second.rank * (144 + 16) if isinstance(second, LowRankLayer) else 16 * 144)
    assert whole / 2 - 2 * 144 * 88 < spent <= whole / 2
    assert ranks(model)["0"] < by_parameters["0"]  # all the positions are there
