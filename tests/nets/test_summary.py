"""Summaries against torch's FLOP counter, dense singular values, and every published compression of papers' tables."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retract.manifolds.tensor_train import capped_ranks, prime_modes
from retract.nets.cnn import digitsnet, wrn28_10
from retract.nets.compress import decompress, factorize
from retract.nets.gan import SNGANDiscriminator, SNGANGenerator
from retract.nets.parametrizations import STTP, SVDP
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


# ---------------------------------------------------------------------------------------------- published compressions
#
# Obukhov et al., AISTATS 2021, eq. (11). Three things to know. (1) Published counts take a signed spectrum with its
# scale, "free" here, where mode L fixes the scale: our "lipschitz" has one degree of freedom less per layer. (2) The
# published tensor trains read fan_in as the channels' primes, from the singular values outwards, and the kernel as
# one mode of kh * kw on the outside: `published_modes`. The default of `sttp` splits the kernel too. (3) The published
# WRN-28-10 has biases on its convolutions.


def published_modes(name, module):
    weight = module.weight
    kernel = math.prod(weight.shape[2:])
    fan_in = (*([kernel] if kernel > 1 else []), *prime_modes(weight.shape[1])[::-1])
    return prime_modes(weight.shape[0]), fan_in


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def z_from_shapes(model, kind, rank, spectrum="free", skip=()):
    """Z of a model without values, from the dimensions alone; `summary` is held to it on the smaller models."""
    total = summary(model)
    saved = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in skip:
            shape = module.weight.shape
            if kind == "svdp":
                parametrization = SVDP(shape, min(rank, shape[0], math.prod(shape[1:])), spectrum)
            else:
                modes = published_modes(name, module)
                parametrization = STTP(shape, capped_ranks(*modes, rank), spectrum, modes=modes)
            saved += module.weight.numel() - parametrization.degrees_of_freedom
    return round(100 * (total.elements - saved) / total.elements, 2)


def published_wrn():
    model = on_meta(wrn28_10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.empty(module.out_channels, device="meta"))
    return model


# (size, width, kind, rank, spectrum): tables 1, 2 and 3, discriminators, with two more decimals than printed
DISCRIMINATORS = {
    (32, 128, "svdp", 64, "identity"): 51.74,
    (32, 128, "sttp", 64, "identity"): 16.71,
    (32, 128, "svdp", 64, "free"): 53.36,
    (32, 128, "sttp", 64, "free"): 18.33,
    (32, 128, "svdp", 32, "free"): 27.71,
    (32, 128, "sttp", 32, "free"): 6.44,
    (32, 32, "svdp", 64, "identity"): 93.11,
    (32, 32, "sttp", 64, "identity"): 87.74,
    (48, 64, "svdp", 64, "identity"): 89.45,
    (48, 64, "sttp", 64, "identity"): 74.12,
    (48, 1024, "svdp", 64, "identity"): 14.23,
    (48, 1024, "sttp", 64, "identity"): 3.25,
    (48, 1024, "svdp", 64, "free"): 14.50,
    (48, 1024, "sttp", 64, "free"): 3.52,
}


@pytest.mark.parametrize("case", DISCRIMINATORS)
def test_published_compression_of_discriminators(case):
    size, width, *arguments = case
    assert z_from_shapes(on_meta(SNGANDiscriminator, size, width), *arguments) == DISCRIMINATORS[case]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case[1] == 1024 else []) for case in DISCRIMINATORS]
)
def test_published_compression_of_discriminators_by_summary(case):
    size, width, kind, rank, spectrum = case
    model = SNGANDiscriminator(size, width)
    factorize(model, kind, rank, spectrum, modes=published_modes if kind == "sttp" else None)
    total = summary(model)
    assert round(total.compression, 2) == DISCRIMINATORS[case]
    assert total.parameters == total.degrees_of_freedom


@pytest.mark.parametrize("kind", ["svdp", "sttp"])
def test_fixed_scale_counts_one_less_per_layer(kind):
    free, fixed = (SNGANDiscriminator(32, 32) for _ in range(2))
    modes = published_modes if kind == "sttp" else None
    factorize(free, kind, 8, modes=modes)
    factorize(fixed, kind, 8, "lipschitz", modes=modes)
    assert summary(free).degrees_of_freedom - summary(fixed).degrees_of_freedom == 11


# figure 6: generator, its linear layer dense
GENERATORS = {
    "svdp": {4: 14.30, 8: 15.87, 16: 18.99, 24: 22.08, 32: 25.14, 48: 31.19, 64: 37.13},
    "sttp": {16: 13.20, 24: 13.81, 32: 14.61, 48: 16.47, 64: 18.82, 96: 23.92, 128: 30.24},
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_published_compression_of_generators(kind):
    model = on_meta(SNGANGenerator, 32, 256)
    found = {rank: z_from_shapes(model, kind, rank, skip=("linear",)) for rank in GENERATORS[kind]}
    assert found == GENERATORS[kind]


@pytest.mark.parametrize(("kind", "rank"), [("svdp", 16), pytest.param("sttp", 64, marks=pytest.mark.slow)])
def test_published_compression_of_generators_by_summary(kind, rank):
    model = factorize(
        SNGANGenerator(32, 256), kind, rank, skip="linear", modes=published_modes if kind == "sttp" else None
    )
    assert round(summary(model).compression, 2) == GENERATORS[kind][rank]
    assert summary(model).running_statistics == 7 * 2 * 256


# figure 7
WIDE_RESNETS = {
    "svdp": {4: 1.07, 8: 2.01, 16: 3.88, 32: 7.57, 64: 14.84, 128: 28.94},
    "sttp": {8: 0.21, 16: 0.40, 32: 1.02, 64: 2.92, 128: 8.21, 256: 20.43},
}


@pytest.mark.parametrize("kind", WIDE_RESNETS)
def test_published_compression_of_wide_resnets(kind):
    model = published_wrn()
    assert summary(model).elements == 36_507_242
    assert {rank: z_from_shapes(model, kind, rank) for rank in WIDE_RESNETS[kind]} == WIDE_RESNETS[kind]
