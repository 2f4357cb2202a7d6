"""Augmentation of whole batches: no loop over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["pad_crop_flip"]


def pad_crop_flip(
    images: Tensor, *, padding: int, flip: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Every image padded with zeros, cropped back to its size at a random place, and mirrored with
    probability 1/2.

    All is one ``gather``: an output pixel looks up the padded pixel that it comes from. The random numbers
    are drawn on the CPU, in the same order whether ``flip`` or not, so that a generator gives the same crops
    on every device.

    Args:
        images: any dtype, shape (N, C, H, W).
        padding: pixels added on each of the four sides; a crop shifts the image by up to as many.
        flip: mirror left-right with probability 1/2.
        generator: CPU generator of the random numbers.

    Returns:
        A new tensor of the same shape, dtype and device.
    """
    if padding < 0:
        raise ValueError(f"padding must be at least 0 pixels, got {padding}")
    n, channels, height, width = images.shape
    shift = torch.randint(2 * padding + 1, (2, n, 1), generator=generator).to(images.device, non_blocking=True)
    mirrored = torch.rand(n, 1, generator=generator).to(images.device, non_blocking=True) < 0.5

    rows = torch.arange(height, device=images.device) + shift[0]
    columns = torch.arange(width, device=images.device).expand(n, width)
    if flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + shift[1]

    source = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, source.view(n, 1, -1).expand(n, channels, -1)).view_as(images)
