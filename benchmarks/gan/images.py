"""The images that a GAN learns: batches in random order, pass after pass."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

__all__ = ["ImageStream"]


class ImageStream:
    """Batches of images without end. Each pass has an order of its own, and leaves out its last, incomplete batch.

    Args:
        images: uint8 of shape (N, C, H, W).
        batch_size: more than there are images means all of them.
        random: draws the orders, on the CPU. Its state is not part of the stream's.
        device: of the images.

    Raises:
        ValueError: images of another dtype or shape, or none.
    """

    def __init__(self, images: Tensor, batch_size: int, random: torch.Generator, device: torch.device) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"images must be uint8 of shape (N, C, H, W), at least one, got {images.dtype} of {tuple(images.shape)}"
            )
        self.fingerprint = f"{crc32(images.cpu().contiguous().numpy().data):08x}"
        self.batch_size = min(batch_size, len(images))
        self._images, self._random = images.to(device), random
        self._begin_pass()

    def next(self) -> Tensor:
        """The next batch, float32 of shape (batch_size, C, H, W): 0 has become -1, and 255 has become 1."""
        if self._used + self.batch_size > len(self._order):
            self._begin_pass()
        batch = self._order[self._used : self._used + self.batch_size]
        self._used += self.batch_size
        return self._images[batch].float().div_(127.5).sub_(1)

    def _begin_pass(self) -> None:
        order = torch.randperm(len(self._images), generator=self._random)
        self._order, self._used = order.to(self._images.device), 0

    def state_dict(self) -> dict[str, Any]:
        """The order under way and how far it is, and which images they are."""
        return {"order": self._order, "used": self._used, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same images stood.

        Raises:
            ValueError: it had other images.
        """
        if state["fingerprint"] != self.fingerprint:
            fingerprints = f"fingerprint {self.fingerprint}, expected {state['fingerprint']}"
            raise ValueError(f"the images are not those of the checkpoint: {fingerprints}")
        self._order, self._used = state["order"].to(self._images.device), state["used"]
