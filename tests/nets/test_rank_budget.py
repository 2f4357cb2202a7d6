"""Ranks under one budget: the best product of kept shares by brute force, the threshold, costs, edge cases."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retract.nets._low_rank_cost import multiplications_of, parameters
from retract.nets._rank_budget import RankCost, Spectrum, energy_shares, rank_for_energy, ranks_within_budget
from retract.nets._unfolding import Unfolding
from retract.nets.layers.low_rank import low_rank_layer

COSTS = st.integers(1, 9)


def price(layer, rank):
    return layer.cost.dense if rank is None else rank * layer.cost.per_rank


def total(layers, ranks):
    return sum(price(layers[name], ranks[name]) for name in layers)


def kept(layer, rank):
    return 1.0 if rank is None else math.fsum(layer.shares[:rank])


@st.composite
def models(draw, per_rank=COSTS):
    layers = {}
    for index in range(draw(st.integers(1, 4))):
        entries = sorted(draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=6)), reverse=True)
        shares = [one / math.fsum(entries) for one in entries]
        cost = draw(per_rank)
        layers[f"layer{index}"] = Spectrum(shares, RankCost(draw(st.integers(1, cost * len(shares) + 5)), cost))
    return layers


def least(layers):
    return sum(min(price(layer, 1), layer.cost.dense) for layer in layers.values())


@settings(deadline=None)
@given(models(), st.integers(0, 60))
def test_budget_is_kept_and_used(layers, more):
    allowed = least(layers) + more
    ranks = ranks_within_budget(layers, allowed)
    spent = total(layers, ranks)
    assert spent <= allowed
    for name, rank in ranks.items():  # nothing that is left over pays for another term
        layer = layers[name]
        if rank is None:
            continue
        assert 1 <= rank <= min(layer.cost.most, len(layer.shares))
        if rank < len(layer.shares):
            higher = rank + 1 if rank < layer.cost.most else None
            assert spent + price(layer, higher) - price(layer, rank) > allowed


@settings(deadline=None)
@given(models(per_rank=st.just(3)), st.integers(0, 20))
def test_one_threshold(layers, more):
    """Where terms cost the same, none that was left is worth more than one that was taken."""
    layers = {name: Spectrum(one.shares, RankCost(10**6, 3)) for name, one in layers.items()}
    ranks = ranks_within_budget(layers, 3 * (len(layers) + more))
    taken = [layers[name].worth_of_term_after(rank - 1) for name, rank in ranks.items() if rank > 1]
    left = [layers[name].worth_of_term_after(rank) for name, rank in ranks.items()]
    assert not taken or max(left) <= min(taken)


@settings(deadline=None)
@given(models(per_rank=st.just(3)), st.integers(0, 20))
def test_product_of_kept_shares_is_the_largest(layers, more):
    """By brute force, where all terms cost the same and no layer is cheaper dense."""
    layers = {name: Spectrum(one.shares, RankCost(10**6, 3)) for name, one in layers.items()}
    allowed = 3 * (len(layers) + more)
    choices = itertools.product(*(range(1, len(layer.shares) + 1) for layer in layers.values()))
    best = max(
        math.prod(kept(layer, rank) for layer, rank in zip(layers.values(), ranks, strict=True))
        for ranks in choices
        if 3 * sum(ranks) <= allowed
    )
    ranks = ranks_within_budget(layers, allowed)
    found = math.prod(kept(layer, ranks[name]) for name, layer in layers.items())
    assert found == pytest.approx(best, rel=1e-9)


def test_too_small_a_budget():
    layers = {"a": Spectrum([0.5, 0.5], RankCost(100, 10)), "b": Spectrum([1.0], RankCost(8, 10))}
    assert ranks_within_budget(layers, 18) == {"a": 1, "b": None}
    with pytest.raises(ValueError, match="budget allows 17 elements, but the layers have 18 at rank 1"):
        ranks_within_budget(layers, 17)


def test_layer_becomes_dense_in_the_turn_of_its_last_term():
    layers = {"a": Spectrum([0.4, 0.3, 0.3], RankCost(25, 10))}
    assert [ranks_within_budget(layers, allowed)["a"] for allowed in (10, 19, 20, 24, 25)] == [1, 1, 2, 2, None]


def test_terms_of_rounding_are_not_bought():
    shares = energy_shares(torch.outer(torch.arange(1.0, 5), torch.ones(6)))
    ranks = ranks_within_budget({"a": Spectrum(shares.tolist(), RankCost(10**3, 1))}, 10**3)
    assert ranks == {"a": 1}
    assert ranks_within_budget({"zero": Spectrum([0.0, 0.0], RankCost(100, 1))}, 100) == {"zero": 1}


# --------------------------------------------------------------------------------------------------------------- energy


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.sampled_from([1e-160, 1.0, 1e160]))
def test_shares_are_squared_singular_values(rows, columns, groups, scale):
    matrix = torch.randn(groups, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    squares = torch.linalg.svdvals(matrix).square().sum(0)
    shares = energy_shares(matrix * scale)
    torch.testing.assert_close(shares, squares / squares.sum(), atol=1e-13, rtol=0)
    assert (shares.diff() <= 1e-15).all()


def test_rank_for_energy():
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert [rank_for_energy(shares, energy) for energy in (1e-9, 0.5, 0.51, 0.75, 0.76, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(torch.zeros(3), 0.9) == 1


def test_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="weight must be finite"):
        energy_shares(torch.tensor([[1.0, math.inf], [0.0, 1.0]]))


# ---------------------------------------------------------------------------------------------------------------- costs


CONVOLUTIONS = [
    (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    (nn.Conv2d(6, 8, (3, 5), padding="same"), (2, 6, 7, 6)),
    (nn.Conv2d(6, 8, 3, padding=(1, 2), stride=(2, 1)), (2, 6, 9, 6)),
    (nn.Conv2d(6, 8, 3, groups=2, stride=2), (2, 6, 9, 8)),
    (nn.Conv2d(6, 8, 1, stride=2), (2, 6, 9, 8)),
    (nn.Conv3d(4, 6, 2, stride=2, padding=1), (2, 4, 4, 6, 4)),
]


@pytest.mark.parametrize("kind", ["output", "input", "separable"])
@pytest.mark.parametrize(("dense", "shape"), CONVOLUTIONS)
def test_multiplications_are_those_torch_counts(dense, shape, kind):
    layer = low_rank_layer(dense, 2, unfolding=kind)
    x, counts = torch.randn(shape), []
    for module in (dense, layer):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = module(x)
        counts.append(counter.get_total_flops() // 2)
    cost = multiplications_of(layer.unfolding, [(x.shape, output.shape)])
    assert [cost.dense, 2 * cost.per_rank] == counts
    assert parameters(layer.unfolding) == (dense.weight.numel(), (layer.left.numel() + layer.right.numel()) // 2)


def test_multiplications_of_all_calls_of_a_linear_layer():
    cost = multiplications_of(Unfolding((5, 3)), [((4, 7, 3), (4, 7, 5)), ((3,), (5,))])
    assert cost == (29 * 15, 29 * 8)
    assert RankCost(16, 8).most == 1 and RankCost(17, 8).most == 2 and RankCost(8, 8).most == 0
