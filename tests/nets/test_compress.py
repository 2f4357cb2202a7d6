"""Whole models to spectral layers and back: what is converted, what stays, and that nothing else changes."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from retract.manifolds.spectrum import Bounded, Lipschitz
from retract.nets import register_scale_invariant
from retract.nets.compress import decompress, factorize
from retract.nets.parametrizations import STTP, SVDP
from retract.nets.parametrizations.models import spectral_weights
from retract.nets.summary import summary


class EveryLayer(nn.Module):
    """One layer of each kind, a module used twice under two names, and a subclass of a layer of torch."""

    class Own(nn.Linear):
        pass

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 12, padding_idx=3)
        self.conv1d = nn.Conv1d(12, 8, 3, padding=1, padding_mode="circular")
        self.up1d = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
        self.linear = nn.Linear(6, 16, bias=False)
        self.conv2d = nn.Conv2d(1, 8, (3, 2), stride=2, dilation=2, padding=2)
        self.bn = nn.BatchNorm2d(8)
        self.up2d = nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1)
        self.conv3d = nn.Conv3d(1, 4, 2)
        self.up3d = nn.ConvTranspose3d(4, 6, 2)
        self.first = nn.Linear(6, 6)
        self.again = nn.ModuleDict({"same": self.first})
        self.own = self.Own(6, 5)

    def forward(self, indices):
        x = self.up1d(self.conv1d(self.embedding(indices).mT))
        x = F.relu(self.bn(self.conv2d(self.linear(x.mT).unsqueeze(1))))
        x = self.up3d(self.conv3d(self.up2d(x).unsqueeze(1))).mean((2, 3, 4))
        return self.own(self.again["same"](torch.tanh(self.first(x))))


LAYERS = ["embedding", "conv1d", "up1d", "linear", "conv2d", "up2d", "conv3d", "up3d", "first", "own"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = EveryLayer().double()
    model.bn.running_mean.normal_()
    return model.eval()


@pytest.fixture
def indices():
    return torch.tensor([[1, 5, 3, 0], [7, 2, 2, 9]])


def state(model):
    """Everything that a failed call must leave alone, by identity."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(name, id(t), t._version, t.requires_grad) for name, t in tensors]


def converted(model):
    return [name.rpartition(".")[0] for name, *_ in spectral_weights(model)]


CASES = [
    ("svdp", "free", "householder", "auto"),
    ("svdp", "identity", "stiefel", "weight"),
    ("sttp", "lipschitz", "householder", "auto"),
    ("sttp", Bounded(0.2, 2.0), "stiefel", "auto"),
    ("sttp", Lipschitz(1.0, of="operator"), "householder", "weight"),
]


@pytest.mark.parametrize(("kind", "spectrum", "form", "execution"), CASES)
def test_round_trip(model, indices, kind, spectrum, form, execution):
    dense = copy.deepcopy(model)
    assert factorize(model, kind, 3, spectrum, form=form, execution=execution) is model
    assert converted(model) == LAYERS
    expected = model(indices)
    assert (expected - dense(indices)).abs().max() > 1e-3
    assert decompress(model) is model
    torch.testing.assert_close(model(indices), expected, atol=1e-12, rtol=0)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert type(parameter) is nn.Parameter
        assert parameter.shape == before.shape and parameter.dtype == before.dtype
        assert parameter.requires_grad and parameter.is_leaf and parameter.is_contiguous()
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(dense(indices), expected, atol=1e-12, rtol=0)
    torch.save(model, "/dev/null")  # a parametrized model cannot be pickled, a plain one can


def test_full_rank_keeps_the_function(model, indices):
    expected = model(indices)
    factorize(model, "svdp", 10**6)
    torch.testing.assert_close(model(indices), expected, atol=1e-12, rtol=0)


def test_shared_module_is_converted_once(model):
    factorize(model, "svdp", 3)
    assert model.first is model.again["same"]
    assert isinstance(model.first.parametrizations.weight[0], SVDP)
    assert sum(name.startswith("first") for name in converted(model)) == 1


def test_training_after_conversion_and_back(model, indices):
    model.train()
    factorize(model, "sttp", 3, "lipschitz")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(indices).square().sum().backward()
        optimizer.step()
    model.eval()
    expected = model(indices)
    torch.testing.assert_close(decompress(model)(indices), expected, atol=1e-12, rtol=0)
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), 2) for m in (model.linear, model.conv3d, model.conv2d)]
    torch.testing.assert_close(torch.stack(norms), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_mode_device_and_dtype_stay(training):
    model = factorize(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).train(training).bfloat16(), "svdp", 2)
    assert all(module.training == training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in decompress(model).parameters()} == {torch.bfloat16}


def test_hooks_stay(model, indices):
    calls = []
    handle = model.linear.register_forward_hook(lambda *_: calls.append(1))
    factorize(model, "svdp", 3)
    model(indices)
    decompress(model)(indices)
    assert len(calls) == 2
    handle.remove()
    model(indices)
    assert len(calls) == 2


# --------------------------------------------------------------------------------------------- which layers, which rank


def test_single_layer():
    layer = nn.Conv2d(8, 8, 3)
    assert factorize(layer, "sttp", 3) is layer
    assert isinstance(layer.parametrizations.weight[0], STTP)
    assert type(decompress(layer)) is nn.Conv2d
    with pytest.raises(ValueError, match=r"^rank must be"):
        factorize(layer, "svdp", 0)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layer(training):
    """Attention reads the weight of its output layer past the layer, and the whole has a path for inference."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    factorize(model, "svdp", 3)
    assert converted(model) == ["self_attn.out_proj", "linear1", "linear2"]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = model(x)
    if training:
        expected.sum().backward()
        assert all(p.grad is not None for p in model.self_attn.out_proj.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(decompress(model)(x), expected, atol=1e-12, rtol=0)


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


# ----------------------------------------------------------------------------------------- errors leave the model alone


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"kind": "cp"}, "kind must be 'svdp' or 'sttp', got 'cp'"),
        (ValueError, {"spectrum": "flat"}, "^spectrum must be one of"),
        (TypeError, {"spectrum": 3}, "spectrum must be a name or a Spectrum"),
        (ValueError, {"form": "polar"}, "form must be 'householder' or 'stiefel'"),
        (ValueError, {"execution": "fast"}, "execution must be"),
        (ValueError, {"execution": "factored"}, "layer 'own': execution='factored' is not possible"),
        (ValueError, {"init": "zero"}, "init must be"),
        (ValueError, {"rank": 0}, "layer 'embedding': rank must be"),
        (TypeError, {"rank": 2.5}, "layer 'embedding': rank must be"),
        (TypeError, {"rank": True}, "layer 'embedding': rank must be"),
        (TypeError, {"rank": True, "kind": "sttp"}, "layer 'embedding': rank must be"),
        (TypeError, {"rank": lambda name, module: module}, "layer 'embedding': rank must be"),
        (
            ValueError,
            {"rank": {"*": 2, "owm": 3}},
            r"rank: 'owm' fits no layer of the model, which has embedding, .*, \.\.\.$",
        ),
        (ValueError, {"skip": "conv4d"}, "skip: 'conv4d' fits no layer"),
        (ValueError, {"modes": {"conv4d": ((2,), (2,))}, "kind": "sttp"}, "modes: 'conv4d' fits no layer"),
        (ValueError, {"modes": {"own": ((5,), (6,))}}, "modes must be None for kind 'svdp'"),
        (ValueError, {"modes": {"own": ((5,), (7,))}, "kind": "sttp"}, "layer 'own': modes of fan_in"),
        (ValueError, {"rank": lambda name, _: (6, 2) if name == "own" else 2, "kind": "sttp"}, "layer 'own': "),
    ],
)
def test_wrong_arguments(model, error, arguments, message):
    before = state(model)
    with pytest.raises(error, match=message):
        factorize(model, **{"kind": "svdp", "rank": 2, **arguments})
    assert state(model) == before


@pytest.mark.parametrize("kind", ["svdp", "sttp"])
def test_nan_in_the_last_layer_leaves_the_model_alone(model, indices, kind):
    with torch.no_grad():
        model.own.weight[2, 3] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match="layer 'own': weight has NaN"):
        factorize(model, kind, 2)
    assert state(model) == before
    factorize(model, kind, 2, skip="own")
    assert converted(model) == LAYERS[:-1]


# ----------------------------------------------------------------------------------------------------------- decompress


def test_plain_model_decompresses_to_itself(model):
    before = state(model)
    assert decompress(model) is model
    assert state(model) == before


def test_copy_is_decompressed_alone(model, indices):
    """torch's remove_parametrizations breaks the original: a deep copy shares its class."""
    factorize(model, "svdp", 3)
    expected = model(indices)
    for _ in range(2):
        exported = decompress(copy.deepcopy(model))
        torch.testing.assert_close(exported(indices), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(model(indices), expected, atol=0, rtol=0)
    assert converted(model) == LAYERS
    decompress(model)
    assert converted(model) == []


@pytest.mark.parametrize("grad", [True, False])
def test_requires_grad_follows_the_factors(grad):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[0].weight.requires_grad_(False)
    factorize(model, "svdp", 2)
    with torch.set_grad_enabled(grad):
        decompress(model)
    assert not list(model.buffers())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        "0.weight": False,
        "0.bias": True,
        "1.weight": True,
        "1.bias": True,
    }


def test_other_parametrizations_stay(indices):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), spectral_norm(nn.Linear(5, 4)))
    factorize(model, "svdp", 2)
    weight_norm(model[0], "bias", dim=None)
    x = torch.randn(3, 6)
    model.eval()
    expected = model(x)
    decompress(model)
    torch.testing.assert_close(model(x), expected)
    assert parametrize.is_parametrized(model[0], "bias") and not parametrize.is_parametrized(model[0], "weight")
    assert parametrize.is_parametrized(model[1], "weight")
    assert parametrize.type_before_parametrizations(model[0]) is nn.Linear
    parametrize.remove_parametrizations(model[0], "bias")
    assert type(model[0]) is nn.Linear


def test_parametrization_on_top_is_part_of_the_weight():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = factorize(nn.Linear(6, 5).double(), "svdp", 2)
    parametrize.register_parametrization(layer, "weight", Doubled())
    expected = layer.weight.detach().clone()
    decompress(layer)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer.weight.detach(), expected, atol=0, rtol=0)
