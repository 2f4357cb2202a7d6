"""The spatial dimensions of a convolution, one by one: which inputs an output sees, and which of these are padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["Axis", "Padding", "convolution_axes", "one_each"]

Padding = int | str | Sequence[int]
_Value = TypeVar("_Value")


class Axis(NamedTuple):
    """One spatial dimension: output j' sees with tap q the input at stride j' + dilation q - padding before."""

    kernel: int
    stride: int = 1
    #: Zeros before and after the input.
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

    @property
    def reach(self) -> int:
        """From the first to the last input that one output sees."""
        return self.dilation * (self.kernel - 1)

    def steps(self, size: int) -> int:
        """How far the first tap can move over the padded input."""
        steps = size + sum(self.padding) - self.reach - 1
        if size < 1 or steps < 0:
            raise ValueError(f"size must be positive and, with padding, no less than the kernel: got {size} for {self}")
        return steps

    def outputs(self, size: int) -> int:
        """Number of outputs."""
        return self.steps(size) // self.stride + 1

    def seen(self, size: int) -> Tensor:
        """(outputs, kernel) positions of the input that each output sees; below 0 and from ``size`` on is padding."""
        starts = self.stride * torch.arange(self.outputs(size)) - self.padding[0]
        return starts[:, None] + self.dilation * torch.arange(self.kernel)

    def taps(self, size: int) -> int:
        """Pairs of an output and a tap that see an input, and no padding."""
        seen = self.seen(size)
        return int(((seen >= 0) & (seen < size)).sum())


def one_each(name: str, value: _Value | Sequence[_Value], count: int) -> tuple[_Value, ...]:
    """One value for each of ``count`` dimensions, from one for all or as many.

    Raises:
        ValueError: another number of values.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count:
        raise ValueError(f"{name} must be one value or {count}, got {value}")
    return values


def convolution_axes(
    kernel_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
) -> tuple[Axis, ...]:
    """The dimensions of a convolution, from the arguments of torch's (also ``"same"`` and ``"valid"``).

    Raises:
        ValueError: a wrong number of values, or a stride or dilation below 1, or a padding below 0.
    """
    count = len(kernel_size)
    strides, dilations = one_each("stride", stride, count), one_each("dilation", dilation, count)
    if padding == "same":
        reaches = [e * (k - 1) for k, e in zip(kernel_size, dilations, strict=True)]
        paddings = [(reach // 2, reach - reach // 2) for reach in reaches]
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
        paddings = [(0, 0)] * count
    else:
        paddings = [(zeros, zeros) for zeros in one_each("padding", padding, count)]
    axes = tuple(map(Axis, kernel_size, strides, paddings, dilations))
    for axis in axes:
        if min(axis.kernel, axis.stride, axis.dilation) < 1 or min(axis.padding) < 0:
            raise ValueError(f"kernel, stride and dilation must be at least 1 and padding at least 0, got {axis}")
    return axes
