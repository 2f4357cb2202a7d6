"""SNGAN's residual networks: published sizes, shapes, and forward passes against the published order of layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from retract.nets.gan import SNGANDiscriminator, SNGANGenerator


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


def count(model):
    return sum(p.numel() for p in model.parameters())


def with_running_statistics(model):
    return count(model) + sum(b.numel() for b in model.buffers() if b.ndim)


# Obukhov et al., AISTATS 2021: the discriminators of tables 2 and 1.
@pytest.mark.parametrize(
    ("size", "width", "parameters"),
    [(32, None, 1_053_824), (32, 128, 1_053_824), (48, None, 10_141_440), (32, 32, 66_848), (48, 64, 40_080)],
)
def test_published_size_of_the_discriminators(size, width, parameters):
    assert count(on_meta(SNGANDiscriminator, size, width)) == parameters


def test_published_size_of_the_generator():
    model = on_meta(SNGANGenerator, 32, 256)
    assert with_running_statistics(model) == 4_280_323
    assert count(model) == 4_276_739


@pytest.mark.parametrize(("size", "width"), [(32, 8), (32, None), (48, 16), (48, None)])
def test_shapes(size, width):
    images = on_meta(SNGANGenerator, size, width, latent=5, channels=2)(torch.empty(3, 5, device="meta"))
    assert images.shape == (3, 2, size, size)
    assert on_meta(SNGANDiscriminator, size, width, channels=2)(images).shape == (3,)


def widths_of(blocks):
    return [block.conv2.out_channels for block in blocks]


def test_widths_and_map_sizes_of_the_published_tables():
    assert widths_of(on_meta(SNGANGenerator, 32).blocks) == [256] * 3
    assert widths_of(on_meta(SNGANGenerator, 48).blocks) == [256, 128, 64]
    for size, widths, maps in ((32, [128] * 4, [16, 8, 8, 8]), (48, [64, 128, 256, 512, 1024], [24, 12, 6, 3, 3])):
        blocks = on_meta(SNGANDiscriminator, size).blocks
        assert widths_of(blocks) == widths
        x, sizes = torch.empty(1, 3, size, size, device="meta"), []
        for block in blocks:
            x = block(x)
            sizes.append(x.shape[-1])
        assert sizes == maps


def perturbed(module):
    """BatchNorm and biases start at values that hide what they do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.3)
    return module.double()


@pytest.mark.parametrize("halves", [True, False])
def test_discriminator_block_in_the_published_order(halves):
    block = perturbed(SNGANDiscriminator(48, 64)).blocks[1 if halves else 4]
    channels = block.conv1.in_channels
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    out, skipped = block.conv2(F.relu(block.conv1(F.relu(x)))), block.shortcut(x)
    expected = F.avg_pool2d(out, 2) + F.avg_pool2d(skipped, 2) if halves else out + skipped
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


def test_block_of_equal_size_has_an_identity_shortcut():
    kinds = [type(block.shortcut) for block in SNGANDiscriminator(32, 4).blocks]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.Identity, nn.Identity]


def test_first_block_sees_negative_pixels():
    block = perturbed(SNGANDiscriminator(32, 4)).blocks[0]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = F.avg_pool2d(block.conv2(F.relu(block.conv1(x))) + block.shortcut(x), 2)
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


def test_generator_block_in_the_published_order():
    block = perturbed(SNGANGenerator(48, 16)).blocks[0]
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64)

    def up(t):
        return t.repeat_interleave(2, 2).repeat_interleave(2, 3)

    out = block.conv2(F.relu(block.bn2(block.conv1(up(F.relu(block.bn1(x)))))))
    torch.testing.assert_close(block(x), out + block.shortcut(up(x)), atol=1e-12, rtol=0)


def test_score_is_linear_in_the_sum_over_positions():
    model = perturbed(SNGANDiscriminator(32, 4))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = F.relu(model.blocks(x)).sum((2, 3))
    torch.testing.assert_close(model(x), features @ model.linear.weight[0])


def test_images_lie_between_minus_one_and_one():
    torch.manual_seed(0)
    images = SNGANGenerator(32, 8)(10 * torch.randn(4, 128))
    assert float(images.detach().abs().amax()) <= 1
    assert images.detach().std(0).mean() > 0


def test_initialisation():
    torch.manual_seed(0)
    model = SNGANGenerator(32, 64)
    for name, gain in (("blocks.0.conv1", math.sqrt(2)), ("blocks.1.shortcut", 1), ("linear", 1)):
        layer = model.get_submodule(name)
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        assert float(layer.weight.detach().std()) == pytest.approx(gain * math.sqrt(2 / (fan_in + fan_out)), rel=0.05)
        assert not layer.bias.any()


def test_constraint_from_outside():
    torch.manual_seed(0)
    model = SNGANDiscriminator(32, 8)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            spectral_norm(module, n_power_iterations=50)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    weight = model.blocks[1].conv1.weight.detach().flatten(1)
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (SNGANDiscriminator, {"size": 64}, "size must be 32 or 48, got 64"),
        (SNGANDiscriminator, {"size": 48, "width": 40}, "width must be a positive multiple of 16 at size 48, got 40"),
        (SNGANDiscriminator, {"width": 0}, "width must be positive, got 0"),
        (SNGANGenerator, {"size": 48, "width": 4}, "width must be a positive multiple of 8 at size 48, got 4"),
        (SNGANGenerator, {"latent": 0}, "latent must be positive, got 0"),
        (SNGANGenerator, {"channels": -1}, "channels must be positive, got -1"),
    ],
)
def test_bad_arguments(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
