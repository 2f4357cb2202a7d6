"""What a low-rank layer reads and what a dense one answers, as rows of matrices: one row for each output position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retract.nets.layers._convolution_geometry import padding_amounts
from retract.nets.layers.low_rank import LowRankLayer, LowRankLinear

__all__ = ["input_rows", "output_rows", "positions"]


def positions(layer: LowRankLayer, shape: Sequence[int]) -> int:
    """At how many positions an output of a shape has all channels of the layer."""
    return math.prod(shape) // layer.unfolding.weight_shape[0]


def output_rows(layer: LowRankLayer, output: Tensor, chosen: Tensor) -> Tensor:
    """An output at some positions: (groups, rows, out / groups).

    Args:
        layer: whose geometry is meant.
        output: (..., out) of a linear layer, (batch, out, *size) or (out, *size) of a convolution.
        chosen: (rows,) numbers of the positions, as if channels were last.
    """
    unfolding = layer.unfolding
    if not isinstance(layer, LowRankLinear):
        output = output.movedim(1 - len(unfolding.weight_shape), -1)
    rows = output.reshape(-1, unfolding.weight_shape[0])[chosen]
    return rows.reshape(len(chosen), unfolding.groups, -1).movedim(1, 0)


def input_rows(layer: LowRankLayer, input: Tensor, shape: Sequence[int], chosen: Tensor) -> Tensor:
    """What the layer reads for some positions of its output: (groups, rows, taps * columns).

    The columns of the layer's matrix come once for each tap of the kernel axes that its rows run over.

    Args:
        layer: whose geometry is meant.
        input: of the layer, (..., in) or (batch, in, *size) or (in, *size).
        shape: of the output.
        chosen: (rows,) numbers of the positions, as if channels were last.
    """
    if isinstance(layer, LowRankLinear):
        return input.reshape(-1, input.shape[-1])[None, chosen]
    spatial = len(layer.unfolding.weight_shape) - 2
    images = input if input.ndim == spatial + 2 else input[None]
    places = torch.unravel_index(chosen, (len(images), *shape[-spatial:]))
    return _patches(layer, images, places).reshape(layer.unfolding.groups, len(chosen), -1)


def _patches(layer: Any, images: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """What the kernel covers at some output positions: (groups, rows, *axes of matrix rows, in, *other axes)."""
    kernel, stride, dilation = (getattr(layer, name) for name in ("kernel_size", "stride", "dilation"))
    amounts = padding_amounts(layer.padding, kernel, dilation)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(map(any, amounts)):
        images = F.pad(images, [amount for pair in reversed(amounts) for amount in pair], mode=mode)
    image, *corner = places
    index = [image.reshape(-1, *(1,) * len(kernel))]
    for axis, (place, taps) in enumerate(zip(corner, kernel, strict=True)):
        along = [1] * len(kernel)
        along[axis] = taps
        offsets = dilation[axis] * torch.arange(taps, device=images.device)
        index.append((stride[axis] * place).reshape(-1, *(1,) * len(kernel)) + offsets.reshape(1, *along))
    covered = images.movedim(1, -1)[tuple(index)]  # (rows, *kernel, channels)
    parted = covered.unflatten(-1, (layer.unfolding.groups, -1)).movedim(-2, 0)
    patches: Tensor = parted.movedim(-1, 2 + layer.unfolding.split)
    return patches
