"""Every published compression of spectral weights, of discriminators, generators and wide residual networks.

Obukhov et al., AISTATS 2021, eq. (11). Three things to know. (1) Published counts take a signed spectrum with its
scale, "free" here, where mode L fixes the scale: our "lipschitz" has one degree of freedom less per layer. (2) The
published tensor trains read fan_in as the channels' primes, from the singular values outwards, and the kernel as
one mode of kh * kw on the outside: `published_modes`. The default of `sttp` splits the kernel too. (3) The published
WRN-28-10 has biases on its convolutions.
"""

import math

import pytest
import torch
from torch import nn

from retract.manifolds.tensor_train import capped_ranks, prime_modes
from retract.nets.cnn import wrn28_10
from retract.nets.compress import factorize
from retract.nets.gan import SNGANDiscriminator, SNGANGenerator
from retract.nets.parametrizations import STTP, SVDP
from retract.nets.summary import summary


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
