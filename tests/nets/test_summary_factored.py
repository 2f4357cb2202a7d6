"""Rows of tensor and canonical layers: counts against torch's, formats by name, degeneracy, and the table."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retract.nets.cnn import resnet20
from retract.nets.compress import decompress, factorize
from retract.nets.layers.tensor import TensorConv2d
from retract.nets.layers.tensor_formats import FORMATS, tensor_network
from retract.nets.layers.tensor_network import TensorNetwork
from retract.nets.summary import summary


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def row(layer):
    (only,) = summary(layer).layers
    return only


def counted(layer, *size):
    """Operations that torch counts for a position of the output, without those of cores with cores.

    Torch counts none for entrywise products, such as those of the cores of CP.
    """
    x = torch.randn(2, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = layer(x)
    once = layer.contraction.products if row(layer).kind not in ("cp", "canonical") and row(layer).equation else 0
    return (counter.get_total_flops() - 2 * once) / (output.numel() // layer.weight.shape[0])


def tensor(build, kind, rank, execution="factored"):
    return factorize(build(), kind, rank, init="kaiming", execution=execution)


# -------------------------------------------------------------------------------------------------------- tensor layers


def test_row_of_a_tensor_layer():
    layer = tensor(lambda: nn.Conv2d(8, 12, (3, 2), bias=False), "tucker2", (5, 4))
    found = row(layer)
    assert (found.name, found.kind, found.shape) == ("", "tucker2", (12, 8, 3, 2))
    assert (found.bonds, found.equation, found.rank) == ((5, 4), "op,pqhw,iq->oihw", None)
    assert found.elements == 12 * 8 * 6
    assert found.parameters == found.degrees_of_freedom == sum(p.numel() for p in layer.parameters()) == 212
    assert found.factored and found.flops == 2 * layer.contraction.multiplications < found.dense_flops
    assert found.dense_flops == 2 * found.elements
    assert (found.largest, found.smallest, found.degeneracy, found.obstacle) == (None, None, None, "")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3), (12, 8, 3, 2), (12, 8, 3, 2, 2)])
def test_kind_is_the_name_of_the_format(kind, shape):
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    dense = layers[len(shape) - 2](shape[1], shape[0], *([shape[2:]] if shape[2:] else []))
    found = row(factorize(dense, kind, 2, init="kaiming"))
    same_cores = {name for name in FORMATS if tensor_network(name, shape, rank=2).equation == found.equation}
    assert found.kind in same_cores and kind in same_cores
    assert len(shape) == 2 or found.kind == kind


def test_cores_of_no_format():
    network = TensorNetwork(
        ["xir", "yhr", "wr"], {**dict.fromkeys("xyihw", 2), "r": 3}, inputs="i", outputs="xy", kernel="hw"
    )
    found = row(TensorConv2d(network))
    assert (found.kind, found.bonds, found.equation) == ("tensor", (3,), "xir,yhr,wr->xyihw")
    many = "abcdefghijklmnopqrstuvw"  # more indices than any format has letters for
    network = TensorNetwork([many + "xyz"], dict.fromkeys(many + "xyz", 1), inputs=many, outputs="x", kernel="yz")
    assert row(TensorConv2d(network)).kind == "tensor"


@pytest.mark.parametrize("kind", ["cp", "tucker2", "tucker", "tensor_train", "hierarchical_tucker"])
@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_tensor_layers_are_what_torch_counts(kind, stride):
    layer = tensor(lambda: nn.Conv2d(16, 24, 3, padding=1, stride=stride), kind, 3)
    found = row(layer)
    assert counted(layer, 16, 8, 8) == found.flops
    layer.execution = "weight"
    assert row(layer).flops == row(layer).dense_flops == row(decompress(layer)).flops


def test_flops_of_a_tensor_linear_layer_are_what_torch_counts():
    layer = tensor(lambda: nn.Linear(16, 24), "cp", 3)
    assert counted(layer, 16) == row(layer).flops == 2 * 3 * 40


# ----------------------------------------------------------------------------------------------------- canonical layers


def test_row_of_a_canonical_layer():
    layer = factorize(nn.ConvTranspose2d(6, 8, 3, bias=False).double(), "canonical", 4, init="normal")
    found = row(layer)
    assert (found.kind, found.shape, found.rank, found.bonds) == ("canonical", (6, 8, 3, 3), 4, None)
    assert found.parameters == sum(p.numel() for p in layer.parameters()) == 4 * (6 + 8 + 3 + 3 + 1)
    assert found.degrees_of_freedom == 4 * (6 + 8 + 3 + 3 - 3)
    assert found.elements == 6 * 8 * 9
    parametrization = layer.parametrizations.weight[0]
    weights, _ = parametrization.terms(*(getattr(layer.parametrizations.weight, f"original{i}") for i in range(5)))
    assert found.degeneracy == pytest.approx(float((weights.abs().sum() / layer.weight.norm()).detach()), rel=1e-9)
    assert (found.largest, found.smallest, found.equation) == (None, None, None)


def test_degrees_of_freedom_are_no_more_than_the_weight_has():
    with pytest.warns(UserWarning, match="told apart"):
        found = row(factorize(nn.Conv2d(4, 4, 3), "canonical", 36, init="normal"))
    assert found.parameters == 36 * 15 > found.elements == found.degrees_of_freedom == 144


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: nn.Conv2d(16, 24, 3, padding=1), (16, 8, 8)),
        (lambda: nn.Conv2d(16, 24, 3, padding=1, stride=2), (16, 8, 8)),
        (lambda: nn.Linear(16, 24), (16,)),
    ],
)
def test_flops_of_canonical_layers_are_what_torch_counts(build, size):
    layer = factorize(build(), "canonical", 5, execution="factored")
    found = row(layer)
    assert found.factored and counted(layer, *size) == found.flops
    found = row(factorize(build(), "canonical", 5, execution="weight"))
    assert not found.factored and found.flops == found.dense_flops == 2 * found.elements


def test_canonical_layer_that_runs_dense_under_another_parametrization_is_counted_so():
    layer = factorize(nn.Linear(20, 20), "canonical", 2)
    assert row(layer).factored
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.ReLU(), unsafe=True)
    assert not row(layer).factored and row(layer).flops == 800


# --------------------------------------------------------------------------------------------------------------- totals


def test_totals_of_all_kinds_together():
    model = resnet20()
    dense = summary(model)
    factorize(model, "cp", budget={"layer1": 0.5}, init="kaiming")
    factorize(model, "canonical", {"layer2": 8}, init="normal")
    factorize(model, "svdp", {"layer3": 8})
    total = summary(model)
    assert {layer.kind for layer in total.layers} == {"dense", "cp", "canonical", "svdp"}
    assert total.elements == dense.elements
    assert total.dense_parameters == dense.parameters == dense.dense_parameters
    assert total.parameters == sum(p.numel() for p in model.parameters())
    saved = sum(layer.elements - layer.parameters for layer in total.layers)
    assert dense.parameters - total.parameters == saved
    freed = sum(layer.elements - layer.degrees_of_freedom for layer in total.layers)
    assert total.compression == 100 * (dense.elements - freed) / dense.elements


def test_table_of_tensor_layers():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.Linear(2, 2))
    factorize(model, "tensor_train", budget=0.8, init="kaiming")
    header, _, first, second, third, *networks, reason, last = str(summary(model)).splitlines()
    assert header.split()[-2:] == ["dense", "runs"]  # no columns of singular values or degeneracy
    bonds = ",".join(map(str, summary(model).layers[0].bonds))
    assert first.split()[:4] == ["0", "8x8x3x3", "tensor_train", bonds]
    assert second.split()[:4] == ["1", "8x8", "tensor_train", "3"]
    assert third.split()[:3] == ["2", "2x2", "dense"]
    assert networks == ["tensor_train: ia,ahb,bwc,co->oihw, ranks a,b,c", "tensor_train: ia,ao->oi, ranks a"]
    assert reason == "2 is dense: tensor_train with budget=0.8: 3 elements are fewer than the format needs"
    assert last.startswith("Z = ")


@pytest.mark.parametrize("kind", ["cp", "tensor_train", "canonical"])
def test_table_fits_a_wide_terminal(kind):
    model = factorize(resnet20(), kind, budget=0.3, init="normal" if kind == "canonical" else "kaiming")
    assert max(map(len, str(summary(model)).splitlines())) <= 120


def test_table_of_canonical_layers():
    model = factorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "canonical", 2, skip="1")
    header, _, first, second, _ = str(summary(model)).splitlines()
    assert header.split()[-1] == "degeneracy"
    assert first.split()[:4] == ["0", "8x8", "canonical", "2"]
    assert first.split()[-1] == f"{summary(model).layers[0].degeneracy:.4g}"
    assert second.endswith("dense")


def test_reading_a_summary_of_factored_layers_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    factorize(model, "cp", {"0": 2}, init="kaiming")
    factorize(model, "canonical", 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert math.isfinite(summary(model).compression)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
