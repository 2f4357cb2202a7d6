"""Interpolation on arcs, pictures pixel by pixel, images of a generator that stays as it was."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial import geometric_slerp

from retract.benchmarks.gan.samples import (
    fixed_latents,
    generate,
    interpolated,
    picture,
    random_images,
    save_picture,
)
from retract.benchmarks.training import DivergedError
from retract.nets.gan.networks import gan_pair


@settings(max_examples=30, deadline=None)
@given(dimension=st.integers(2, 20), count=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_interpolation_is_scipys_on_the_unit_sphere(dimension, count, seed):
    ends = torch.randn(2, 3, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ends /= ends.norm(dim=2, keepdim=True)
    points = interpolated(*ends, count)
    for i in range(3):
        expected = geometric_slerp(ends[0, i].numpy(), ends[1, i].numpy(), np.linspace(0, 1, count))
        np.testing.assert_allclose(points[i].numpy(), expected, atol=1e-12)


def test_lengths_go_evenly_from_one_to_the_other():
    points = interpolated(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 5)[0]
    torch.testing.assert_close(points.norm(dim=1), torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0]))
    torch.testing.assert_close(points[2], torch.tensor([1.0, 1.0]) * math.sqrt(2))


def test_vectors_that_coincide_or_nearly():
    a = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpolated(a, a, 4), a[:, None].expand(1, 4, 8))
    near = a + 1e-6
    points = interpolated(a, near, 3)[0]
    torch.testing.assert_close(points[1], (a + near)[0] / 2)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        interpolated(a, a, 1)


def test_fixed_latents_depend_on_the_seed_alone():
    one, same, other = (fixed_latents(5, seed) for seed in (0, 0, 1))
    assert one["grid"].shape == (64, 5) and one["ends"].shape == (2, 8, 5)
    assert all(torch.equal(one[key], same[key]) and not torch.equal(one[key], other[key]) for key in one)


def test_a_picture_has_every_image_in_its_place():
    images = torch.randint(1, 256, (5, 3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = picture(images, 3)
    assert whole.shape == (3, 81, 110)
    for i in range(5):
        top, left = 41 * (i // 3), 37 * (i % 3)
        assert torch.equal(whole[:, top : top + 40, left : left + 36], images[i])
    assert whole.count_nonzero() == images.numel()  # the rest is black


def test_small_images_are_enlarged_pixel_by_pixel():
    image = torch.tensor([[[[10, 20], [30, 40]]]], dtype=torch.uint8)
    whole = picture(image, 1)
    assert whole.shape == (1, 32, 32)
    assert whole[0, ::16, ::16].tolist() == [[10, 20], [30, 40]]
    assert whole[0, 15, 16] == 20 and whole[0, 16, 15] == 30


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_picture_is_the_same_when_read(tmp_path, channels):
    image = torch.randint(256, (channels, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_picture(image, tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as read:
        pixels = torch.from_numpy(np.array(read)).view(7, 5, channels)
    assert torch.equal(pixels.permute(2, 0, 1), image)


def test_generating_changes_nothing_and_takes_evaluation_mode():
    torch.manual_seed(0)
    generator, _ = gan_pair("digits", generator_width=4)
    generator.train()
    generator.bn.eval()  # a mode of its own
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    random = torch.get_rng_state()
    latents = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    images = generate(generator, latents)
    assert images.shape == (300, 1, 8, 8) and images.dtype == torch.uint8
    assert generator.training and generator.maps.training and not generator.bn.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())
    with torch.no_grad():
        expected = (generator.eval()(latents) + 1) * 127.5
    assert (images - expected).abs().max() <= 0.51
    assert torch.equal(random_images(generator, 16, 7, seed=1), generate(generator, latents[:7]))
    assert not torch.equal(random_images(generator, 16, 7, seed=2), generate(generator, latents[:7]))
    assert torch.equal(torch.get_rng_state(), random)


def test_images_that_are_not_finite():
    generator, _ = gan_pair("digits", generator_width=4)
    torch.nn.init.constant_(generator.linear.weight, float("nan"))
    with pytest.raises(DivergedError, match="generated images are not finite"):
        generate(generator, torch.ones(2, 16))
