"""Whole models to spectral layers and back: what changes, what stays, and that a failed call changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from retract.manifolds.spectrum import Bounded, Lipschitz
from retract.nets.compress import decompress, factorize
from retract.nets.parametrizations import STTP, SVDP
from tests.nets.every_layer import INDICES, LAYERS, converted, every_layer, state


@pytest.fixture
def model():
    return every_layer()


CASES = [
    ("svdp", "free", "householder", "auto"),
    ("svdp", "identity", "stiefel", "weight"),
    ("sttp", "lipschitz", "householder", "auto"),
    ("sttp", Bounded(0.2, 2.0), "stiefel", "auto"),
    ("sttp", Lipschitz(1.0, of="operator"), "householder", "weight"),
]


@pytest.mark.parametrize(("kind", "spectrum", "form", "execution"), CASES)
def test_round_trip(model, kind, spectrum, form, execution):
    dense = copy.deepcopy(model)
    assert factorize(model, kind, 3, spectrum, form=form, execution=execution) is model
    assert converted(model) == LAYERS
    expected = model(INDICES)
    assert (expected - dense(INDICES)).abs().max() > 1e-3
    assert decompress(model) is model
    torch.testing.assert_close(model(INDICES), expected, atol=1e-12, rtol=0)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert type(parameter) is nn.Parameter
        assert parameter.shape == before.shape and parameter.dtype == before.dtype
        assert parameter.requires_grad and parameter.is_leaf and parameter.is_contiguous()
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(dense(INDICES), expected, atol=1e-12, rtol=0)
    torch.save(model, "/dev/null")  # a parametrized model cannot be pickled, a plain one can


def test_full_rank_keeps_the_function(model):
    expected = model(INDICES)
    factorize(model, "svdp", 10**6)
    torch.testing.assert_close(model(INDICES), expected, atol=1e-12, rtol=0)


def test_shared_module_is_converted_once(model):
    factorize(model, "svdp", 3)
    assert model.first is model.again["same"]
    assert isinstance(model.first.parametrizations.weight[0], SVDP)
    assert sum(name.startswith("first") for name in converted(model)) == 1


def test_training_after_conversion_and_back(model):
    model.train()
    factorize(model, "sttp", 3, "lipschitz")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(INDICES).square().sum().backward()
        optimizer.step()
    model.eval()
    expected = model(INDICES)
    torch.testing.assert_close(decompress(model)(INDICES), expected, atol=1e-12, rtol=0)
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), 2) for m in (model.linear, model.conv3d, model.conv2d)]
    torch.testing.assert_close(torch.stack(norms), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_mode_device_and_dtype_stay(training):
    model = factorize(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).train(training).bfloat16(), "svdp", 2)
    assert all(module.training == training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in decompress(model).parameters()} == {torch.bfloat16}


def test_hooks_stay(model):
    calls = []
    handle = model.linear.register_forward_hook(lambda *_: calls.append(1))
    factorize(model, "svdp", 3)
    model(INDICES)
    decompress(model)(INDICES)
    assert len(calls) == 2
    handle.remove()
    model(INDICES)
    assert len(calls) == 2


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


# ----------------------------------------------------------------------------------------- errors leave the model alone


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"kind": "svd"}, "kind must be one of svdp, sttp, canonical, lowrank, cp, .*, got 'svd'"),
        (ValueError, {"rank": None}, "rank must be given for kind 'svdp', got none"),
        (ValueError, {"error": 0.1}, "kind 'svdp' takes no error: it takes rank, spectrum, form, execution, init"),
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
        (
            ValueError,
            {"modes": {"own": ((5,), (6,))}},
            "kind 'svdp' takes no modes: it takes rank, spectrum, form, execution, init",
        ),
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
def test_nan_in_the_last_layer_leaves_the_model_alone(model, kind):
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


def test_copy_is_decompressed_alone(model):
    """torch's remove_parametrizations breaks the original: a deep copy shares its class."""
    factorize(model, "svdp", 3)
    expected = model(INDICES)
    for _ in range(2):
        exported = decompress(copy.deepcopy(model))
        torch.testing.assert_close(exported(INDICES), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(model(INDICES), expected, atol=0, rtol=0)
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


def test_other_parametrizations_stay():
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
