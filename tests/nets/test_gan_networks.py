"""Pairs of generator and discriminator: shapes, sizes, what they are made of, and their parameter groups."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retract.manifolds.spectral import SVDSpectral
from retract.nets.gan.constraints import constrain
from retract.nets.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from retract.nets.gan.networks import GANS, gan_pair

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
SMALL = {"digits": 4, "dcgan28": 4, "dcgan32": 4, "sngan32": 4, "sngan48": 16}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", GANS)
@pytest.mark.parametrize("channels", [None, 2])
def test_pairs_fit_together(name, channels):
    generator, discriminator = gan_pair(name, width=SMALL[name], generator_width=SMALL[name], channels=channels)
    z = 3 * torch.randn(5, GANS[name].latent)
    images = generator(z)
    shape = GANS[name].image_shape if channels is None else (channels, *GANS[name].image_shape[1:])
    assert images.shape == (5, *shape)
    assert float(images.detach().abs().amax()) < 1
    assert images.detach().std(0).mean() > 1e-3
    scores = discriminator(images)
    assert scores.shape == (5,)
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert discriminator(images[:1].detach()).shape == (1,)


@pytest.mark.parametrize("name", GANS)
def test_only_generators_normalise(name):
    generator, discriminator = gan_pair(name, width=SMALL[name], generator_width=SMALL[name])
    assert any(isinstance(module, NORMALISATIONS) for module in generator.modules())
    assert not any(isinstance(module, NORMALISATIONS) for module in discriminator.modules())


@pytest.mark.parametrize("name", GANS)
def test_widths_are_those_of_one_network_each(name):
    small, large = SMALL[name], 2 * SMALL[name]
    narrow, wide, mixed = (
        [count(model) for model in gan_pair(name, width=width, generator_width=generator_width)]
        for width, generator_width in ((small, small), (large, large), (small, large))
    )
    assert narrow[0] < wide[0]
    assert narrow[1] < wide[1]
    assert mixed == [wide[0], narrow[1]]


def test_default_widths():
    assert [count(model) for model in gan_pair("sngan32")] == [4_276_739, 1_053_824]


def dcgan_sizes(widths, channels, smallest, latent):
    """Elements of generator and discriminator, from the widths of the discriminator's maps."""
    kernels = sum(16 * a * b for a, b in pairwise(widths))
    image, last = 16 * widths[0] * channels, widths[-1] * smallest**2
    generator = latent * last + kernels + image + channels + 2 * sum(widths)
    discriminator = image + kernels + sum(widths) + last + 1
    return generator, discriminator


@pytest.mark.parametrize(
    ("name", "widths", "smallest"),
    [("digits", (32, 64), 2), ("dcgan28", (64, 128), 7), ("dcgan32", (64, 128, 256), 4)],
)
def test_sizes_of_dcgan(name, widths, smallest):
    pair = gan_pair(name)
    expected = dcgan_sizes(widths, GANS[name].image_shape[0], smallest, GANS[name].latent)
    assert tuple(count(model) for model in pair) == expected


def test_dcgan_generator_step_by_step():
    model = DCGANGenerator(28, 3, latent=5, channels=1).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    z = torch.randn(2, 5, dtype=torch.float64)
    maps = (z @ model.linear.weight.T).reshape(2, 6, 7, 7)
    relu = F.relu(model.bn(maps))
    _, up, bn, _ = model.maps
    maps = F.relu(bn(F.conv_transpose2d(relu, up.weight, stride=2, padding=1)))
    expected = torch.tanh(F.conv_transpose2d(maps, model.image.weight, model.image.bias, stride=2, padding=1))
    torch.testing.assert_close(model(z), expected)


def test_dcgan_discriminator_step_by_step():
    model = DCGANDiscriminator(8, 3, channels=2).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    maps = x
    for layer in (model.maps[0], model.maps[2]):
        maps = F.conv2d(maps, layer.weight, layer.bias, stride=2, padding=1)
        maps = torch.where(maps > 0, maps, 0.2 * maps)
    expected = maps.flatten(1) @ model.linear.weight[0] + model.linear.bias
    torch.testing.assert_close(model(x), expected)


def test_initialisation_of_dcgan():
    generator, discriminator = gan_pair("dcgan32")
    for module in (generator.linear, generator.maps[1], generator.image):
        assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(generator.bn.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(generator.bn.weight.detach().mean()) == pytest.approx(1, abs=0.01)
    for module in (discriminator.maps[2], discriminator.maps[4]):
        fan_in = module.weight[0].numel()
        assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / 1.04 / fan_in), rel=0.01)
        assert not module.bias.any()
    assert not generator.image.bias.any()


@pytest.mark.parametrize("name", GANS)
def test_groups_of_an_unconstrained_network_are_euclidean(name):
    for model in gan_pair(name, width=SMALL[name], generator_width=SMALL[name]):
        (group,) = model.manifold_groups()
        assert group == {"params": list(model.named_parameters())}
        assert model.manifold_groups(euclidean_lr=0.5)[0]["lr"] == 0.5


@pytest.mark.parametrize("name", GANS)
def test_groups_of_a_constrained_network_have_its_manifolds(name):
    for model in gan_pair(name, width=SMALL[name], generator_width=SMALL[name]):
        constrain(model, "svdp-l", rank=3, form="stiefel")
        *points, rest = model.manifold_groups()
        parametrized = [module for module in model.modules() if hasattr(module, "parametrizations")]
        assert len(points) == len(parametrized) > 0
        for group in points:
            assert isinstance(group["manifold"], SVDSpectral)
            assert group["manifold"].check_point_on_manifold(tuple(p for _, p in group["params"]), atol=1e-5)
        assert "manifold" not in rest
        names = [name for group in (*points, rest) for name, _ in group["params"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gan_pair("dcgan"), "name must be one of digits, dcgan28, dcgan32, sngan32, sngan48, got 'dcgan'"),
        (lambda: gan_pair("digits", width=0), "width must be positive, got 0"),
        (lambda: gan_pair("digits", generator_width=-1), "width must be positive, got -1"),
        (lambda: gan_pair("dcgan28", channels=0), "channels must be positive, got 0"),
        (lambda: DCGANGenerator(28, latent=0), "latent must be positive, got 0"),
        (lambda: DCGANGenerator(64), "size must be one of 8, 28, 32, got 64"),
        (lambda: DCGANDiscriminator(16), "size must be one of 8, 28, 32, got 16"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
