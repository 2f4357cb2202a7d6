"""Which layers of a model are converted: names, patterns, functions, and the layers that cannot be."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from retract.nets import register_scale_invariant
from retract.nets.compress import factorize
from retract.nets.summary import summary
from tests.nets.every_layer import LAYERS, converted, every_layer


@pytest.fixture
def model():
    return every_layer()


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        ("own", ["own"]),
        (["up1d", "embedding"], ["embedding", "up1d"]),
        ("up*", ["up1d", "up2d", "up3d"]),
        ("again.same", ["first"]),
        ("again", ["first"]),
        (("*2d", "own"), ["conv2d", "up2d", "own"]),
        (lambda name, module: name == "own" or isinstance(module, nn.Embedding), ["embedding", "own"]),
    ],
)
def test_skip(model, skip, left):
    factorize(model, "svdp", 2, skip=skip)
    assert converted(model) == [name for name in LAYERS if name not in left]
    assert [row.name for row in summary(model).layers if row.kind == "dense"] == left


def test_pattern_names_a_module_and_not_the_beginning_of_a_name():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "ab": nn.Linear(4, 4)})
    factorize(model, "svdp", 2, skip="a")
    assert converted(model) == ["ab"]


def test_int_rank_is_cut_to_each_layer(model):
    factorize(model, "svdp", 5)
    ranks = {row.name: row.rank for row in summary(model).layers}
    assert ranks["linear"] == 5
    assert ranks["conv3d"] == 4
    assert ranks["embedding"] == 5


def test_int_rank_is_a_cap_for_every_bond_of_a_tensor_train():
    """Bonds beside the middle one may be larger than it: three rows and 2 * 2 * 3 * 3 columns."""
    (row,) = summary(factorize(nn.Conv2d(4, 3, 3), "sttp", 5)).layers
    assert (row.rank, row.bonds) == (3, (3, 5, 4, 2))


def test_rank_by_pattern_takes_the_first_that_fits(model):
    factorize(model, "sttp", {"linear": 2, "conv*": 4, "up*": 3, "conv1d": 1})
    ranks = {row.name: row.rank for row in summary(model).layers}
    expected = {"linear": 2, "conv1d": 4, "conv2d": 4, "conv3d": 4, "up1d": 3, "up2d": 3, "up3d": 3}
    assert ranks == dict.fromkeys(LAYERS) | expected


def test_rank_by_function(model):
    def half(name, module):
        return min(module.weight.shape[:2]) // 2 if isinstance(module, nn.Linear) and name != "own" else None

    factorize(model, "svdp", half)
    assert {row.name: row.rank for row in summary(model).layers if row.rank} == {"linear": 3, "first": 3}


def test_all_ranks_and_modes_of_one_layer():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))
    factorize(model, "sttp", {"0": (2, 3, 4, 4)}, modes={"0": ((2, 2, 2), (4, 3))})
    (row, _) = summary(model).layers
    assert row.bonds == (2, 3, 4, 4) and row.rank == 4
    assert model[0].parametrizations.weight[0].modes == ((2, 2, 2), (4, 3))


def test_modes_default_to_primes_and_may_be_given_by_a_function():
    model = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(8, 12, 3))
    factorize(model, "sttp", 3, modes=lambda name, _: ((4, 2), (12,)) if name == "0" else None)
    assert [m.parametrizations.weight[0].modes for m in model] == [((4, 2), (12,)), ((2, 2, 3), (2, 2, 2, 3, 3))]


# ----------------------------------------------------------------------------------------------------- layers that stay


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_that_cannot_be_factorized_are_named_with_the_reason():
    torch.manual_seed(0)
    tied = nn.Linear(6, 9, bias=False)
    model = nn.ModuleDict(
        {
            "good": nn.Linear(6, 6),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "sparse": nn.Embedding(9, 6, sparse=True),
            "tied": tied,
            "table": nn.Embedding(9, 6),
            "lazy": nn.LazyLinear(3),
            "normalized": spectral_norm(nn.Linear(6, 6)),
            "older": nn.utils.weight_norm(nn.Linear(6, 6)),
            "bias": weight_norm(nn.Linear(6, 6), "bias", dim=None),
            "psi": register_scale_invariant(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), torch.randn(4, 6)),
            "norm": nn.BatchNorm1d(6),
        }
    )
    model["table"].weight = tied.weight
    before = {name: id(module) for name, module in model.named_modules()}
    factorize(model, "svdp", 3)
    assert converted(model) == ["good"]
    assert model["table"].weight is model["tied"].weight
    assert {name: id(module) for name, module in model.named_modules() if "good." not in name} == before
    model["lazy"](torch.zeros(1, 4))
    reasons = {row.name: row.obstacle for row in summary(model).layers}
    expected = {
        "good": "^$",
        "grouped": "groups",
        "sparse": "sparse",
        "tied": "shared",
        "table": "shared",
        "lazy": "^$",
        "normalized": "parametrized already, by _SpectralNorm",
        "older": "parameter",
        "bias": "bias is parametrized already, by _WeightNorm",
        "psi.0": "ManifoldParameter",
    }
    assert reasons.keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.search(pattern, reasons[name]), (name, reasons[name])


def test_weight_held_by_a_module_of_another_kind_is_shared_too():
    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Linear(4, 4), Head(layer.weight))
    factorize(model, "svdp", 2)
    assert converted(model) == ["1"]


def test_second_call_converts_what_the_first_left(model):
    factorize(model, "svdp", 2, skip=lambda name, _: name != "own")
    factorize(model, "sttp", 3, skip="linear")
    kinds = {row.name: row.kind for row in summary(model).layers}
    assert kinds == dict.fromkeys(LAYERS, "sttp") | {"own": "svdp", "linear": "dense"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), "no linear layer, embedding or convolution"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, groups=4)), r"no layer to factorize\n  0: .*groups"),
        (nn.Linear(3, 3, device="meta"), r"\n  the layer itself: .*meta"),
    ],
)
def test_nothing_to_convert(model, message):
    with pytest.raises(ValueError, match=message):
        factorize(model, "svdp", 2)


def test_everything_skipped_says_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"\n  0: rank has none for it\n  1: skip names it"):
        factorize(model, "svdp", {"1": 1}, skip="1")
