"""A convolution along some of its axes, one of the two that a convolution of low rank is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ._contraction_steps import Geometry, padded
from .factored import _pointwise

__all__ = ["AxisConvolution"]

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class AxisConvolution:
    """A convolution that convolves, pads and strides over some axes, and leaves the others alone."""

    axes: tuple[int, ...]
    #: One number for each axis: 1 along those that it leaves alone.
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    #: Padding of all axes, of which it takes its own.
    geometry: Geometry

    @classmethod
    def of(
        cls,
        axes: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        geometry: Geometry,
    ) -> AxisConvolution:
        """What belongs to some axes of a convolution."""
        kernel, stride, dilation = (
            tuple(value if axis in axes else 1 for axis, value in enumerate(values))
            for values in (kernel, stride, dilation)
        )
        return cls(tuple(axes), kernel, stride, dilation, groups, geometry)

    def __call__(self, images: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """(batch, in, *size) -> (batch, out, *new size), laid out in memory as the images are.

        Args:
            images: contiguous or channels_last.
            rows: the kernel (out, in / groups, *its axes), flattened to (out, -1); contiguous, as a kernel that is laid
                out channels_last would have the output so.
            bias: (out,).
        """
        images, padding = padded(images, self.axes, self.geometry)
        if self._pointwise and not any(padding):
            return _pointwise(images, rows, bias, len(self.kernel))
        weight = rows.reshape(len(rows), -1, *self.kernel)
        convolve = _CONVOLVE[len(self.kernel) - 1]
        return convolve(images, weight, bias, self.stride, padding, self.dilation, self.groups)

    @property
    def _pointwise(self) -> bool:
        return self.groups == 1 and set(self.kernel) == set(self.stride) == {1}
