"""Whole models to tensor layers and back: every format, every geometry, and what stays as it was."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from retract.nets.compress import decompress, factorize
from retract.nets.init.decomposition import decompose
from retract.nets.layers.tensor import TensorConv1d, TensorConv2d, TensorConv3d, TensorLinear
from retract.nets.layers.tensor_formats import FORMATS
from retract.nets.summary import summary
from tests.nets.every_layer import INDICES, LAYERS, every_layer, small_convnet

TENSOR = {
    "conv1d": TensorConv1d,
    "linear": TensorLinear,
    "conv2d": TensorConv2d,
    "conv3d": TensorConv3d,
    "first": TensorLinear,
}
formats = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture
def model():
    return every_layer()


def converted(model):
    kinds = {row.name: row.kind for row in summary(model).layers}
    return [name for name, kind in kinds.items() if kind != "dense"]


def fresh(kind):
    """Options with which no decomposition is needed."""
    return {"kind": kind, "rank": 3, "init": "kaiming"}


@formats
def test_round_trip(model, kind):
    dense = copy.deepcopy(model)
    modules = dict(model.named_modules())
    assert factorize(model, **fresh(kind)) is model
    assert {name: type(model.get_submodule(name)) for name in LAYERS if name in TENSOR} == TENSOR
    assert converted(model) == list(TENSOR)
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


CONVOLUTIONS = [
    (lambda: nn.Conv1d(6, 8, 3, stride=2, dilation=2, padding=1, padding_mode="circular"), (2, 6, 11)),
    (lambda: nn.Conv2d(6, 8, (3, 5), padding="same", bias=False), (2, 6, 7, 6)),
    (lambda: nn.Conv2d(6, 8, 3, padding=(1, 2), stride=(2, 1), padding_mode="reflect"), (2, 6, 7, 6)),
    (lambda: nn.Conv2d(6, 8, 3, groups=2, padding="valid"), (2, 6, 7, 6)),
    (lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate"), (2, 4, 3, 4, 3)),
]


@pytest.mark.parametrize("execution", ["auto", "factored", "weight"])
@pytest.mark.parametrize(("build", "shape"), CONVOLUTIONS)
def test_geometry_goes_there_and_back(build, shape, execution):
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    before = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    if layer.groups > 1 and execution == "factored":
        execution = "auto"
    factorize(layer, "tucker2", 4, execution=execution, init="kaiming")
    assert layer.execution == execution
    expected = build().double()
    expected.load_state_dict({"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias})})
    torch.testing.assert_close(layer(x), expected(x), atol=1e-12, rtol=0)
    decompress(layer)
    torch.testing.assert_close(layer(x), expected(x), atol=1e-12, rtol=0)
    assert {name: value for name, value in vars(layer).items() if not name.startswith("_")} == before
    assert repr(layer) == repr(expected)


@pytest.mark.parametrize("kind", ["tucker2", "tucker", "tensor_train", "tt_matrix", "hierarchical_tucker"])
def test_full_rank_keeps_the_function(model, kind):
    expected = model(INDICES)
    factorize(model, kind, 10**6)
    assert converted(model) == list(TENSOR)
    torch.testing.assert_close(model(INDICES), expected, atol=1e-10, rtol=0)


@formats
def test_fit_is_the_decomposition_of_the_weight(kind):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).double()
    weight = layer.weight.detach().clone()
    torch.manual_seed(1)
    found = decompose(weight, kind, rank=2)
    torch.manual_seed(1)
    factorize(layer, kind, 2)
    assert layer.network == found.network
    torch.testing.assert_close(layer.weight, found.network.weight(found.cores), atol=1e-12, rtol=0)
    error = (layer.weight.detach() - weight).norm() / weight.norm()
    assert float(error) == pytest.approx(found.error, abs=1e-8) and 0.1 < found.error < 1


# ----------------------------------------------------------------------------------------------------- layers that stay


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_without_a_tensor_layer_are_named_with_the_reason():
    tied = nn.Linear(6, 6, bias=False)
    layers = {
        "good": nn.Linear(6, 6),
        "grouped": nn.Conv2d(4, 8, 3, groups=2),
        "table": nn.Embedding(9, 6),
        "up": nn.ConvTranspose2d(4, 4, 3),
        "own": type("Own", (nn.Linear,), {})(6, 6),
        "lazy": nn.LazyLinear(3),
        "meta": nn.Linear(6, 6, device="meta"),
        "complex": nn.Linear(6, 6, dtype=torch.complex64),
        "normalized": weight_norm(nn.Linear(6, 6)),
        "older": nn.utils.weight_norm(nn.Linear(6, 6)),
        "tied": tied,
        "twin": nn.Linear(6, 6, bias=False),
    }
    layers["twin"].weight = tied.weight
    model = nn.ModuleDict(layers)
    rest = nn.ModuleDict({name: module for name, module in layers.items() if name not in ("good", "grouped")})
    factorize(model, "cp", 2, init="kaiming")
    assert type(model["good"]) is TensorLinear and type(model["grouped"]) is TensorConv2d
    assert model["tied"].weight is model["twin"].weight
    with pytest.raises(ValueError, match="no layer to factorize") as failure:
        factorize(rest, "cp", 2)
    listed = dict(line.strip().split(": ", 1) for line in str(failure.value).splitlines()[1:])
    expected = {
        "table": "Embedding is not one of torch.nn's own Linear, Conv1d, Conv2d, Conv3d",
        "up": "ConvTranspose2d is not one of",
        "own": "Own is not one of",
        "lazy": "LazyLinear is not one of",
        "meta": "meta device",
        "complex": "floating-point, got dtype torch.complex64",
        "normalized": "parametrized already, by _WeightNorm",
        "older": "no parameter 'weight', it has bias, weight_g, weight_v",
        "tied": "shared",
        "twin": "shared",
    }
    assert listed.keys() == expected.keys()
    assert all(text in listed[name] for name, text in expected.items()), listed


def test_second_call_converts_what_the_first_left(model):
    factorize(model, "cp", 2, skip="linear", init="kaiming")
    factorize(model, "svdp", 2)
    kinds = {row.name: row.kind for row in summary(model).layers}
    assert kinds == dict.fromkeys(LAYERS, "svdp") | dict.fromkeys(TENSOR, "cp") | {"linear": "svdp"}
    with pytest.raises(ValueError, match="conv1d: it is a TensorConv1d already"):
        factorize(model, "cp", 2)
    assert {row.kind for row in summary(decompress(model)).layers} == {"dense"}


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layer(training):
    """Attention reads the weight of its output layer past the layer: that one stays; others have a weight to read."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    factorize(model, "cp", 3, init="kaiming")
    assert converted(model) == ["linear1", "linear2"]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(decompress(model)(x), expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------- what stays as it was


def test_hooks_mode_bias_and_what_users_set_stay(model):
    calls = []
    layer, bias = model.conv2d, model.conv2d.bias
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    layer.register_buffer("mask", torch.ones(2))
    layer.register_module("gate", nn.Dropout())
    layer.note = "kept"
    model.train()
    layer.eval()
    for change in (lambda: factorize(model, **fresh("cp")), lambda: decompress(model)):
        change()
        model(INDICES)
        assert model.conv2d is layer and layer.bias is bias and layer.note == "kept" and not layer.training
        assert list(layer.mask) == [1, 1] and type(layer.gate) is nn.Dropout and model.linear.training
    handle.remove()
    model(INDICES)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["tucker2", "cp"])
def test_half_precision_stays(kind):
    layer = factorize(nn.Conv2d(6, 8, 3).bfloat16(), kind, 4)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(1, 6, 4, 4).bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in decompress(layer).parameters()} == {torch.bfloat16}


def test_requires_grad_follows_the_cores():
    model = small_convnet()
    model[0].weight.requires_grad_(False)
    factorize(model, "cp", 2, init="kaiming")
    assert [p.requires_grad for p in model[0].cores] == [False] * 4 and model[0].bias.requires_grad
    assert all(p.requires_grad for p in model[2].parameters())
    decompress(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]


def test_module_under_two_names_is_converted_once(model):
    factorize(model, **fresh("cp"))
    assert model.first is model.again["same"] and type(model.first) is TensorLinear


def test_copies_and_files(model):
    factorize(model, **fresh("tensor_train"))
    expected = model(INDICES)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(decompress(copied)(INDICES), expected, atol=1e-12, rtol=0)
    assert converted(model) == list(TENSOR)
    torch.testing.assert_close(model(INDICES), expected, atol=0, rtol=0)


def test_training_after_conversion_and_back(model):
    factorize(model.train(), **fresh("cp"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [core.detach().clone() for core in model.conv2d.cores]
    for _ in range(2):
        optimizer.zero_grad()
        model(INDICES).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.conv2d.cores, strict=True))
    expected = model.eval()(INDICES)
    torch.testing.assert_close(decompress(model)(INDICES), expected, atol=1e-12, rtol=0)


def test_other_parametrizations_stay():
    layer = factorize(small_convnet()[0].double(), "cp", 3, init="kaiming")
    weight_norm(layer, "bias", dim=None)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    expected = layer(x)
    decompress(layer)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    assert parametrize.is_parametrized(layer, "bias") and not parametrize.is_parametrized(layer, "weight")
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Conv2d


def test_derived_tensor_layers_stay():
    """Their forward may do anything."""
    layer = factorize(nn.Linear(6, 5), "cp", 2, init="kaiming")
    layer.__class__ = type("Own", (TensorLinear,), {})
    assert isinstance(decompress(layer), TensorLinear)
    assert converted(layer) == [""]
