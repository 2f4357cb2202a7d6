"""Losses by closed forms, the gradient penalty of functions whose gradients are known, and the stream of images."""

import math

import pytest
import torch

from retract.benchmarks.gan.images import ImageStream
from retract.benchmarks.gan.losses import LOSSES, gradient_penalty


def test_hinge():
    real, generated = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-3.0, 1.0])
    assert LOSSES["hinge"].discriminator(real, generated).item() == pytest.approx((0 + 1 + 2) / 3 + (0 + 2) / 2)
    assert LOSSES["hinge"].generator(generated).item() == pytest.approx(1.0)


def test_non_saturating():
    real, generated = torch.tensor([0.0, 1.0]), torch.tensor([-2.0])
    probability = torch.sigmoid
    expected = -(math.log(0.5) + math.log(probability(real[1]))) / 2 - math.log(1 - probability(generated[0]))
    assert LOSSES["non-saturating"].discriminator(real, generated).item() == pytest.approx(expected, rel=1e-6)
    assert LOSSES["non-saturating"].generator(generated).item() == pytest.approx(-math.log(probability(generated[0])))
    assert LOSSES["non-saturating"].generator(torch.tensor([-1e4])).item() == 1e4  # saturates nowhere


def test_the_gradient_penalty_of_a_quadratic():
    """score(x) = sum_i w_i x_i^2 / 2: the gradient is w x."""
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty((w * x.square()).sum(1) / 2, x)
    assert penalty.item() == pytest.approx(((1 + 9) + (4 + 4 + 2.25)) / 4)
    penalty.backward()
    expected = (w * x.square()).mean(0)
    torch.testing.assert_close(w.grad, expected.detach(), rtol=1e-6, atol=0)  # the penalty is float32


def stream(images, batch_size, seed=0):
    return ImageStream(images, batch_size, torch.Generator().manual_seed(seed), torch.device("cpu"))


def test_every_pass_shows_every_image_once():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1) * 25
    batches = stream(images, 5)
    passes = [torch.cat([batches.next(), batches.next()]).flatten() for _ in range(3)]
    for shown in passes:
        torch.testing.assert_close(shown.sort().values, torch.arange(10) * 25 / 127.5 - 1)
    assert not torch.equal(passes[0], passes[1])


def test_the_ends_of_the_range():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert stream(images, 1).next().flatten().tolist() == [-1.0, 1.0]


def test_an_incomplete_batch_is_left_out_and_a_large_one_is_all():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    batches = stream(images, 3)
    assert [len(batches.next().unique()) for _ in range(8)] == [3] * 8
    assert len(stream(images, 100).next().unique()) == 7


def test_a_stream_goes_on_from_a_state():
    images = torch.randint(256, (11, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, other = stream(images, 4), stream(images, 4, seed=9)
    one.next()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.next(), other.next())
    with pytest.raises(ValueError, match=f"fingerprint .*, expected {one.fingerprint}"):
        stream(images.flip(0), 4).load_state_dict(one.state_dict())
