"""The steps of a contraction: products of cores, and the ways in which a map absorbs one.

A map is a tensor (batch, *positions, channels), the channels laid out over some indices, the first the slowest: what
torch calls channels_last. There a product over channels is one matrix product whatever the number of axes, and a
depthwise convolution needs no conversion of layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from opt_einsum.parser import convert_to_valid_einsum_chars
from torch import Tensor

__all__ = [
    "Convolution",
    "Core",
    "CoreProduct",
    "Geometry",
    "Grouped",
    "Linear",
    "Pair",
    "Scaling",
    "Step",
    "batched_product",
]

_CONVOLVE = {2: F.conv2d, 3: F.conv3d}


# ------------------------------------------------------------------------------------------------ products of cores


@dataclass(frozen=True)
class Core:
    """One core with some order of its indices, those that nothing else has summed."""

    position: int
    shape: tuple[int, ...]
    equation: str | None  # None: as it is

    @classmethod
    def of(cls, position: int, labels: str, wanted: str, dims: Mapping[str, int]) -> Core:
        """The core at a position, of indices ``labels``, laid out as ``wanted``."""
        equation = None if labels == wanted else convert_to_valid_einsum_chars(f"{labels}->{wanted}")
        return cls(position, tuple(dims[label] for label in labels), equation)

    def __call__(self, cores: Sequence[Tensor]) -> Tensor:
        """The core among all cores."""
        core = cores[self.position].reshape(self.shape)
        return core if self.equation is None else torch.einsum(self.equation, core)


@dataclass(frozen=True)
class Pair:
    """The product of two products of cores."""

    left: CoreProduct
    right: CoreProduct
    equation: str

    @classmethod
    def of(cls, left: CoreProduct, right: CoreProduct, labels: tuple[str, str], wanted: str) -> Pair:
        """The product of tensors of indices ``labels``, laid out as ``wanted``."""
        return cls(left, right, convert_to_valid_einsum_chars(f"{','.join(labels)}->{wanted}"))

    def __call__(self, cores: Sequence[Tensor]) -> Tensor:
        """The product from all cores."""
        return torch.einsum(self.equation, self.left(cores), self.right(cores))


CoreProduct: TypeAlias = Core | Pair


# ------------------------------------------------------------------------------------------------------------ steps


@dataclass(frozen=True)
class Geometry:
    """How a call pads: numbers before and after each axis, and with what."""

    padding: tuple[tuple[int, int], ...]
    mode: str = "zeros"


@dataclass(frozen=True)
class Ordering:
    """Channels laid out anew, if they must be: sizes of their indices, and the order these shall have."""

    sizes: tuple[int, ...]
    order: tuple[int, ...] | None

    @classmethod
    def of(cls, labels: str, wanted: str, dims: Mapping[str, int]) -> Ordering:
        """From channels over ``labels`` to channels over ``wanted``, the same indices in another order."""
        order = None if labels == wanted else tuple(labels.index(label) for label in wanted)
        return cls(tuple(dims[label] for label in labels), order)

    def __call__(self, map: Tensor) -> Tensor:
        """(*lead, channels) -> the same shape."""
        if self.order is None:
            return map
        lead = map.shape[:-1]
        order = (*range(len(lead)), *(len(lead) + axis for axis in self.order))
        return map.reshape(*lead, *self.sizes).permute(order).reshape(map.shape)


@dataclass(frozen=True)
class Linear:
    """A matrix product: the last indices of the channels are summed, others take their place."""

    ordering: Ordering
    factor: CoreProduct
    kept: int  # channels of indices that stay, before the summed ones
    shape: tuple[int, int]  # of the matrix

    def __call__(self, map: Tensor, cores: Sequence[Tensor], geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        """(*lead, kept * in) -> (*lead, kept * out)."""
        matrix = self.factor(cores).reshape(self.shape)
        map = self.ordering(map)
        if self.kept == 1:
            return pointwise(map, matrix, bias)
        lead = map.shape[:-1]
        product = F.linear(map.reshape(*lead, self.kept, self.shape[1]), matrix)
        return _biased(product.reshape(*lead, self.kept * self.shape[0]), bias)

    def channels_first(self, map: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """(batch, *positions, in) -> (batch, out, *positions), contiguous, where nothing is kept."""
        matrix = self.factor(cores).reshape(self.shape)
        weight, rows = matrix.expand(len(map), -1, -1), self.ordering(map).flatten(1, -2).mT
        product = torch.bmm(weight, rows) if bias is None else torch.baddbmm(bias.unsqueeze(-1), weight, rows)
        return product.reshape(len(map), self.shape[0], *map.shape[1:-1])


@dataclass(frozen=True)
class Scaling:
    """An elementwise product: every index of the factor is on the map and stays."""

    sizes: tuple[int, ...]  # of the map's indices
    factor: CoreProduct
    shape: tuple[int, ...]  # of the factor, 1 for indices that it has not

    def __call__(self, map: Tensor, cores: Sequence[Tensor], geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        """(*lead, channels) -> the same shape."""
        factor = self.factor(cores).reshape(self.shape).expand(self.sizes).reshape(math.prod(self.sizes))
        return _biased(map * factor.to(map.dtype), bias)


@dataclass(frozen=True)
class Grouped:
    """A matrix product for each value of the indices that map and factor share and keep."""

    ordering: Ordering  # to kept, shared, summed
    factor: CoreProduct
    sizes: tuple[int, int, int, int]  # kept, shared, out, in

    def __call__(self, map: Tensor, cores: Sequence[Tensor], geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        """(*lead, kept * shared * in) -> (*lead, kept * shared * out)."""
        kept, shared, out_features, in_features = self.sizes
        lead = map.shape[:-1]
        rows = self.ordering(map).reshape(*lead, kept, shared, in_features)
        factor = self.factor(cores).reshape(shared, out_features, in_features)
        product = torch.einsum("...gi,goi->...go", rows, factor)
        return _biased(product.reshape(*lead, kept * shared * out_features), bias)


@dataclass(frozen=True)
class Convolution:
    """A convolution along some axes, its groups the indices that stay: a depthwise one if nothing is summed.

    Indices that the factor has not stay, too: groups with one kernel.
    """

    ordering: Ordering  # to indices that stay, then summed
    factor: CoreProduct
    staying: tuple[int, ...]  # sizes of the factor's view on them: 1 for indices that it has not
    groups: tuple[int, ...]  # their sizes
    features: tuple[int, int]  # out and in of a group
    kernel: tuple[int, ...]  # for each axis, 1 where this step does not convolve
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    axes: tuple[int, ...]  # that it convolves

    def __call__(self, map: Tensor, cores: Sequence[Tensor], geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        """(batch, *positions, groups * in) -> (batch, *new positions, groups * out)."""
        tail = (*self.features, *self.kernel)
        weight = self.factor(cores).reshape(*self.staying, *tail)
        if self.staying != self.groups:
            weight = weight.expand(*self.groups, *tail)
        groups = math.prod(self.groups)
        # Contiguous: torch's own convolution, that of float64, has no backward for other kernels.
        weight = weight.reshape(groups * self.features[0], *tail[1:]).contiguous()
        image, padding = padded(self.ordering(map).movedim(-1, 1), self.axes, geometry)
        convolve = _CONVOLVE[len(self.kernel)]
        return convolve(image, weight, bias, self.stride, padding, self.dilation, groups).movedim(1, -1)


Step: TypeAlias = Linear | Scaling | Grouped | Convolution


# -------------------------------------------------------------------------------------------------------- operations


def pointwise(map: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """(*lead, in) -> (*lead, out): a 1 x 1 convolution, for a map in any layout."""
    if map.ndim < 4:
        return F.linear(map, matrix, bias)
    image = map.movedim(-1, 1)
    if bias is None and batched_product(matrix.shape, map) and image.is_contiguous() and not map.is_contiguous():
        product = torch.bmm(matrix.expand(len(map), -1, -1), image.flatten(2))
        return product.reshape(len(map), len(matrix), *map.shape[1:-1]).movedim(1, -1).contiguous()
    # On CPUs oneDNN's convolution is faster than a product of matrices, most of all to few channels.
    if map.device.type == "cpu" and map.dtype in (torch.float32, torch.bfloat16):
        weight = matrix.reshape(*matrix.shape, *(1,) * (map.ndim - 2))
        return _CONVOLVE[map.ndim - 2](image, weight, bias).movedim(1, -1)
    return F.linear(map, matrix, bias)


def batched_product(shape: Sequence[int], map: Tensor) -> bool:
    """Whether a matrix should be multiplied with a map (batch, *positions, in) image by image.

    That reads or writes channels first without a copy, but its backward pass holds the matrix's gradient of each
    image: that must not be larger than the map.
    """
    return min(shape) <= math.prod(map.shape[1:-1])


def _biased(map: Tensor, bias: Tensor | None) -> Tensor:
    return map if bias is None else map + bias.to(map.dtype)


def padded(image: Tensor, axes: Sequence[int], geometry: Geometry) -> tuple[Tensor, list[int]]:
    """An image (batch, channels, *positions) padded along some axes, and the zeros that a convolution is to add."""
    amounts = [geometry.padding[axis] if axis in axes else (0, 0) for axis in range(image.ndim - 2)]
    if geometry.mode == "zeros" and all(before == after for before, after in amounts):
        return image, [before for before, _ in amounts]
    nothing = [0] * len(amounts)
    if any(amount != (0, 0) for amount in amounts):
        flat = [number for pair in reversed(amounts) for number in pair]  # torch counts from the last axis
        image = F.pad(image, flat, "constant" if geometry.mode == "zeros" else geometry.mode)
    return image, nothing
