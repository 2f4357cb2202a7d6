"""What every data set looks like once it is loaded, and what can go wrong on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DataError", "Dataset", "channel_statistics", "make_dataset"]


class DataError(ValueError):
    """A file of a data set is missing, damaged or not what it should be. The message names the file."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels of one classification task, whole, in memory.

    ``train_images`` and ``test_images`` are uint8 of shape (N, C, H, W); the labels are int64 of shape (N,),
    each one an index into ``classes``. ``mean`` and ``std`` are per channel, of the training images, on the
    scale of uint8. ``flip`` says whether an image and its mirror image belong to the same class.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that tell two data sets apart (a CRC-32 of all images and labels, in
        order).
        """
        crc = 0
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            crc = crc32(tensor.contiguous().numpy().data, crc)
        return f"{crc:08x}"

    def normalizer(self, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
        """The function from uint8 images (N, C, H, W) on ``device`` to float32 of mean 0 and variance 1."""
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return lambda images: images.to(torch.float32).sub_(mean).div_(std)

    def subset(self, size: int, seed: int = 0) -> Dataset:
        """The same task with only ``size`` training images, classes as balanced as the data allow.

        The choice depends on ``seed`` alone, and a smaller subset of a seed lies inside every larger one.
        ``mean``, ``std`` and the test images stay those of the whole set, so that results of different sizes
        compare.
        """
        if not len(self.classes) <= size <= len(self.train_labels):
            limits = f"{len(self.classes)} (one per class) to {len(self.train_labels)} (all)"
            raise ValueError(f"subset must be from {limits} training images of {self.name}, got {size}")
        shuffled = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(seed))
        labels = self.train_labels[shuffled]
        seen_before = F.one_hot(labels, len(self.classes)).cumsum(0).gather(1, labels[:, None])[:, 0]
        chosen = shuffled[seen_before.argsort(stable=True)[:size]].sort().values
        return replace(self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen])

    def resized(self, size: int) -> Dataset:
        """The same task with images of ``size`` x ``size`` pixels (bilinear with anti-aliasing)."""
        if size < 1:
            raise ValueError(f"image size must be at least 1 pixel, got {size}")
        if self.image_shape[1:] == (size, size):
            return self
        train, test = _resize(self.train_images, size), _resize(self.test_images, size)
        mean, std = channel_statistics(train)
        return replace(self, train_images=train, test_images=test, mean=mean, std=std)


def make_dataset(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: Sequence[str],
    *,
    flip: bool = False,
) -> Dataset:
    """The data set of (images, labels) pairs, with the statistics of its training images."""
    for part, (images, labels) in (("training", train), ("test", test)):
        if not len(labels) or len(images) != len(labels):
            raise DataError(f"{name}: {len(images)} {part} images with {len(labels)} labels")
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{tuple(train[0].shape[1:])}, test images {tuple(test[0].shape[1:])}"
        raise DataError(f"{name}: training images have shape {shapes}")
    mean, std = channel_statistics(train[0])
    return Dataset(name, *train, *test, tuple(classes), mean, std, flip)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), from exact counts of the 256
    values.

    A constant channel gets a standard deviation of one, so that normalizing never divides by zero.
    """
    values = torch.arange(256, dtype=torch.float64)
    mean, std = [], []
    for channel in images.unbind(1):
        weights = torch.bincount(channel.flatten(), minlength=256).to(torch.float64) / channel.numel()
        mean.append((weights @ values).item())
        std.append((weights @ (values - mean[-1]).square()).sqrt().item() or 1.0)
    return tuple(mean), tuple(std)


def _resize(images: Tensor, size: int) -> Tensor:
    def resize(chunk: Tensor) -> Tensor:
        resized = F.interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True)
        return resized.round_().clamp_(0, 255).to(torch.uint8)

    return torch.cat([resize(chunk) for chunk in images.split(1000)])
