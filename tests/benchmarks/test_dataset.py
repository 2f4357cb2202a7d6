"""What a loaded data set offers: statistics, subsets, sizes."""

import pytest
import torch

from retract.benchmarks.data import dataset, load
from tests.benchmarks.data_files import write_svhn

pytestmark = pytest.mark.usefixtures("own_cache")


def test_statistics_are_those_of_the_training_pixels(tmp_path):
    write_svhn(tmp_path)
    data = load("svhn", tmp_path)
    pixels = data.train_images.double()
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    normalized = data.normalizer()(data.train_images)
    assert normalized.dtype == torch.float32
    assert normalized.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normalized.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_a_constant_channel_can_be_normalized():
    assert dataset.channel_statistics(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8)) == ((7.0,), (1.0,))


def test_subset_is_balanced_seeded_and_nested():
    data = load("digits")
    small, large = data.subset(103, seed=1), data.subset(500, seed=1)
    counts = torch.bincount(small.train_labels)
    assert counts.sum() == 103
    assert counts.max() - counts.min() <= 1
    assert torch.equal(small.train_images, data.subset(103, seed=1).train_images)
    assert not torch.equal(small.train_images, data.subset(103, seed=2).train_images)
    inside = {image.numpy().tobytes() for image in large.train_images}
    assert all(image.numpy().tobytes() in inside for image in small.train_images)
    assert (small.mean, small.std) == (data.mean, data.std)
    assert torch.equal(small.test_images, data.test_images)
    assert load("digits", subset=103, seed=1).fingerprint == small.fingerprint


def test_subset_of_everything_is_everything():
    data = load("digits")
    assert torch.equal(data.subset(1347).train_images, data.train_images)


@pytest.mark.parametrize("size", [9, 1348, -1])
def test_subset_out_of_range(size):
    with pytest.raises(ValueError, match="subset must be from 10"):
        load("digits", subset=size)


def test_resizing():
    data = load("digits")
    resized = load("digits", image_size=16)
    assert resized.train_images.shape == (1347, 1, 16, 16)
    assert resized.train_images.dtype == torch.uint8
    assert resized.mean[0] == pytest.approx(data.mean[0], abs=1)
    assert data.resized(8) is data
    with pytest.raises(ValueError, match="at least 1 pixel"):
        data.resized(0)
