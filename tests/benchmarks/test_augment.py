"""The batched augmentation against one that goes image by image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from retract.benchmarks.data import pad_crop_flip


def naive(images, padding, flip, generator):
    """The same random numbers in the same order, then plain slicing of each image."""
    n, _, height, width = images.shape
    down, right = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)[..., 0].tolist()
    mirrored = (torch.rand(n, 1, generator=generator)[:, 0] < 0.5).tolist()
    results = []
    for image, y, x, mirror in zip(images, down, right, mirrored, strict=True):
        crop = F.pad(image, (padding,) * 4)[:, y : y + height, x : x + width]
        results.append(crop.flip(-1) if mirror and flip else crop)
    return torch.stack(results)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    padding=st.integers(0, 5),
    flip=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_naive_form(shape, padding, flip, dtype, seed):
    images = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = images.clone()
    result = pad_crop_flip(images, padding=padding, flip=flip, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(result, naive(images, padding, flip, torch.Generator().manual_seed(seed)))
    assert result.dtype == dtype
    assert torch.equal(images, before)


def test_a_generator_decides_everything():
    images = torch.rand(64, 3, 8, 8)
    twice = [pad_crop_flip(images, padding=1, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*twice)
    other = pad_crop_flip(images, padding=1, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(twice[0], other)


def test_every_shift_and_both_mirror_images_occur_equally_often():
    """A single bright pixel in the middle of 3x3: where it ends up counts shifts; a corner pixel counts
    mirrors.
    """
    n = 18000
    images = torch.zeros(n, 1, 3, 3)
    images[:, :, 1, 1] = 1
    generator = torch.Generator().manual_seed(0)
    counts = pad_crop_flip(images, padding=1, flip=False, generator=generator).sum((0, 1))
    assert ((counts - n / 9).abs() < 5 * (n / 9) ** 0.5).all()
    edge = torch.zeros(n, 1, 1, 2)
    edge[..., 0] = 1
    left = pad_crop_flip(edge, padding=0, generator=generator)[..., 0].sum()
    assert abs(left - n / 2) < 5 * (n / 4) ** 0.5


def test_shifting_does_not_depend_on_flipping():
    images = torch.rand(16, 1, 5, 1).expand(-1, -1, -1, 5)  # rows of one value: only vertical shifts show
    rows = [
        pad_crop_flip(images, padding=2, flip=flip, generator=torch.Generator().manual_seed(1)).amax(-1)
        for flip in (True, False)
    ]
    assert torch.equal(*rows)
    assert not torch.equal(rows[0], images.amax(-1))


def test_negative_padding():
    with pytest.raises(ValueError, match="padding must be at least 0 pixels, got -1"):
        pad_crop_flip(torch.zeros(1, 1, 2, 2), padding=-1)
