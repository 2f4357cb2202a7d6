"""Summaries against torch's FLOP counter, dense singular values, and every published compression of papers' tables."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retract.nets.cnn import digitsnet
from retract.nets.compress import decompress, factorize
from retract.nets.summary import summary


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def row(layer):
    (only,) = summary(layer).layers
    return only


# ----------------------------------------------------------------------------------------------------- rows and totals


@pytest.mark.parametrize("form", ["householder", "stiefel"])
@pytest.mark.parametrize("kind", ["svdp", "sttp"])
def test_row_of_a_spectral_layer(kind, form):
    layer = factorize(nn.ConvTranspose2d(6, 8, 3, bias=False).double(), kind, 4, "lipschitz", form=form)
    found = row(layer)
    matrix = layer.weight.detach().transpose(0, 1).flatten(1)
    assert (found.name, found.kind, found.shape, found.rank) == ("", kind, (6, 8, 3, 3), 4)
    assert found.elements == 6 * 8 * 9 == matrix.numel()
    assert found.parameters == sum(p.numel() for p in layer.parameters())
    # less one for the scale; the train, over 2, 2, 2 | 3, 3, 3, 2, has 176 entries and a gauge of 72
    assert found.degrees_of_freedom == {"svdp": 4 * (8 + 54 - 4), "sttp": 176 - 72}[kind] - 1
    assert (found.parameters == found.degrees_of_freedom) == (form == "householder")
    values = torch.linalg.svdvals(matrix)
    assert found.largest == pytest.approx(1, abs=1e-12) == float(values[0])
    assert found.smallest == pytest.approx(float(values[3]), abs=1e-12)
    assert found.bonds == (None if kind == "svdp" else (2, 4, 4, 4, 4, 2))
    assert found.obstacle == ""


def test_singular_values_in_no_order():
    layer = factorize(nn.Linear(6, 5).double(), "svdp", 3)
    with torch.no_grad():
        layer.parametrizations.weight.original1.copy_(torch.tensor([0.5, -3.0, 2.0]))
    assert (row(layer).largest, row(layer).smallest) == (3.0, 0.5)
    with torch.no_grad():
        layer.parametrizations.weight.original1.copy_(torch.tensor([2.0, 0.5, 3.0]))
    assert (row(layer).largest, row(layer).smallest) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("layer", "shape", "flops"),
    [
        (nn.Linear(6, 8), (8, 6), 96),
        (nn.Conv1d(6, 8, 3, groups=2), (8, 3, 3), 144),
        (nn.ConvTranspose3d(6, 8, 2), (6, 8, 2, 2, 2), 768),
        (nn.ConvTranspose2d(6, 8, (1, 3), groups=2), (6, 4, 1, 3), 144),
        (nn.Embedding(6, 8), (6, 8), 0),
    ],
)
def test_row_of_a_dense_layer(layer, shape, flops):
    found = row(layer)
    assert found.shape == tuple(layer.weight.shape) == shape
    assert (found.kind, found.rank, found.bonds, found.largest, found.smallest) == ("dense", None, None, None, None)
    assert found.parameters == found.degrees_of_freedom == found.elements == layer.weight.numel()
    assert found.flops == found.dense_flops == flops
    assert bool(found.obstacle) == (getattr(layer, "groups", 1) > 1)


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (8, 10)),
    "conv2d": (lambda: nn.Conv2d(8, 12, (3, 2), stride=2, padding=1), (8, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 12, 2), (4, 3, 4, 3)),
    "up1d": (lambda: nn.ConvTranspose1d(8, 12, 2, stride=2), (8, 10)),
    "up2d": (lambda: nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1), (8, 5, 6)),
    "up3d": (lambda: nn.ConvTranspose3d(4, 12, 3, padding=1), (4, 3, 4, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("execution", ["weight", "factored"])
def test_flops_of_convolutions_are_what_torch_counts(name, execution):
    build, size = CONVOLUTIONS[name]
    layer = factorize(build(), "svdp", 3, form="stiefel", execution=execution)  # Householder frames are products too
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = layer(torch.randn(2, *size))
    counts = counter.get_flop_counts()["Global"]
    per_position = sum(count for op, count in counts.items() if "conv" in str(op) or "bmm" in str(op))
    positions = 2 * math.prod(size[1:] if name.startswith("up") else output.shape[2:])
    found = row(layer)
    assert found.factored == (execution == "factored")
    assert per_position == positions * found.flops
    assert row(decompress(layer)).flops == found.dense_flops
    assert (found.flops == found.dense_flops) == (execution == "weight")


@pytest.mark.parametrize(("layer", "x"), [(nn.Linear(8, 12), torch.randn(5, 8)), (nn.Embedding(9, 7), torch.arange(5))])
def test_flops_of_products_are_what_torch_counts(layer, x):
    layer = factorize(layer, "svdp", 3, form="stiefel", execution="factored")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 5 * row(layer).flops
    assert row(layer).dense_flops == row(decompress(layer)).flops


def test_layer_that_runs_dense_under_another_parametrization_is_counted_so():
    layer = factorize(nn.Linear(20, 20), "svdp", 2)
    assert row(layer).factored
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.ReLU(), unsafe=True)
    assert not row(layer).factored
    assert row(layer).flops == 800


def test_totals_of_a_plain_model():
    model = digitsnet()
    total = summary(model)
    parameters = sum(p.numel() for p in model.parameters())
    statistics = sum(b.numel() for name, b in model.named_buffers() if "running" in name)
    assert statistics > 0
    assert total.parameters == parameters
    assert total.degrees_of_freedom == total.elements == parameters + statistics
    assert total.compression == 100


@pytest.mark.parametrize("form", ["householder", "stiefel"])
def test_compression_counts_degrees_of_freedom_and_not_what_is_stored(form):
    model = digitsnet()
    before = summary(model)
    factorize(model, "svdp", 4, form=form)
    total = summary(model)
    saved = sum(layer.elements - layer.degrees_of_freedom for layer in total.layers)
    assert total.elements == before.elements
    assert total.degrees_of_freedom == before.elements - saved < before.elements
    assert total.compression == 100 * total.degrees_of_freedom / total.elements
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert (total.parameters + total.running_statistics == total.degrees_of_freedom) == (form == "householder")


def test_tied_weights_count_once():
    model = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    model[1].weight = model[0].weight
    model.append(model[2])
    factorize(model, "svdp", 2)
    total = summary(model)
    assert len(total.layers) == 3
    assert (total.elements, total.degrees_of_freedom) == (72, 36 + 20)


def test_reading_a_summary_changes_nothing():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    summary(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_table():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Linear(2000, 2000))
    factorize(model, "svdp", 4, "lipschitz", skip="2")
    header, rule, first, second, third, reason, last = str(summary(model)).splitlines()
    assert header.split()[:7] == ["layer", "weight", "kind", "rank", "stored", "DOF", "elements"]
    assert set(rule) == {"-"}
    assert first.split()[:11] == ["0", "8x8x3x3", "svdp", "4", "303", "303", "576", "640", "1,152", "factored", "1"]
    assert first.index("303") + len("303") == header.index("stored") + len("stored")
    assert second.split() == ["1", "8x4x3x3", "dense", "288", "288", "288", "576", "576", "dense"]
    assert third.split()[:4] == ["2", "2000x2000", "dense", "4,000,000"]
    assert reason.startswith("1 is dense: ") and "groups" in reason
    assert last.startswith("Z = 99.99 %: 4,002,607 degrees of freedom, where the dense model has 4,002,880 elements")


def test_lazy_model():
    with pytest.raises(ValueError, match=r"model: 0\.weight has no shape yet"):
        summary(nn.Sequential(nn.LazyLinear(3)))
