"""From the input of a layer through the cores of its tensor network to the output, without building the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._contraction_operands import operands
from ._contraction_path import Cost, building_products, cheapest_chain
from ._contraction_plan import compiled
from ._contraction_steps import Geometry, Linear, batched_product, padded
from ._convolution_geometry import PaddingMode, padding_amounts, positive
from .tensor_network import TensorNetwork

__all__ = ["Contraction"]


class Contraction:
    """The cheapest way from a map through the cores of a network to the output of the layer.

    The map absorbs a product of cores at a time: by a matrix product, or, if a core of it has a kernel index, by a
    convolution, depthwise where nothing is summed. Inside, maps are channels_last; the output is contiguous for a
    contiguous input, and else channels_last.

    Args:
        network: what the cores are.
        stride: of the convolution, one number or one for each spatial dimension.
        dilation: likewise.
        groups: of the convolution. The output indices must begin with the group: whole indices, the slowest first,
            or a divisor of the next.

    Attributes:
        multiplications: of the steps, for one position of the output.
        products: multiplications of cores with cores, once for all positions.
        dense_multiplications: of the layer with its weight, for one position of the output.
        building: multiplications that build the weight from the cores.
        cheaper: whether this costs less than to build the weight and use it: multiplications and memory traffic, the
            products of cores shared by a nominal 4096 positions (128 rows of a linear layer).

    Raises:
        ValueError: stride, dilation or groups are not positive, or do not suit the network.
    """

    def __init__(
        self,
        network: TensorNetwork,
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        spatial = len(network.kernel)
        self.network = network
        self.stride = positive("stride", stride, spatial)
        self.dilation = positive("dilation", dilation, spatial)
        (self.groups,) = positive("groups", groups, 1)
        problem = operands(network, self.stride, self.dilation, self.groups)
        chain, cost = cheapest_chain(problem)
        self._steps, self._ordering = compiled(problem, chain)
        self._strides = problem.stride
        # Axes that no step convolves: they are padded, and strided over, at once.
        self._pointwise = tuple(axis for axis, label in enumerate(problem.kernel) if label is None)
        self.in_channels = self.groups * network.in_features
        self.multiplications, self.products = cost.multiplications, cost.products
        self.dense_multiplications = math.prod(network.weight_shape)
        self.building = building_products(problem)
        elements = self.in_channels * math.prod(self.stride) + network.out_features
        self.cheaper = cost.total < Cost(self.dense_multiplications, elements, self.building, cost.positions).total

    def __call__(
        self,
        input: Tensor,
        cores: Sequence[Tensor],
        padding: str | int | Sequence[int] = 0,
        *,
        padding_mode: PaddingMode = "zeros",
        bias: Tensor | None = None,
    ) -> Tensor:
        """The output of the layer.

        Args:
            input: (batch, in, *size), (in, *size), or for a linear layer (..., in).
            cores: of the network's shapes.
            padding: numbers on both sides of each spatial dimension, "same" or "valid".
            padding_mode: what to pad with, as `torch.nn.Conv2d` names it.
            bias: (out,).

        Raises:
            ValueError: the input has another number of channels or dimensions.
        """
        spatial = len(self.network.kernel)
        if spatial and input.ndim not in (spatial + 1, spatial + 2):
            raise ValueError(f"input must have {spatial + 1} or {spatial + 2} dimensions, got {tuple(input.shape)}")
        if input.shape[-spatial - 1] != self.in_channels:
            raise ValueError(f"input must have {self.in_channels} channels, got shape {tuple(input.shape)}")
        if not spatial:
            rows = input.reshape(math.prod(input.shape[:-1]), self.in_channels)
            output = self._absorb(rows, cores, Geometry(()), bias)
            return output.reshape(*input.shape[:-1], self.network.out_features).contiguous()
        images = input if input.ndim == spatial + 2 else input.unsqueeze(0)
        amounts = padding_amounts(padding, self.network.kernel_size, self.dilation)
        if spatial == 1:  # sequences are images of height 1: torch knows channels_last for those
            output = self._convolve(images.unsqueeze(2), cores, Geometry(((0, 0), *amounts), padding_mode), bias)
            output = output.squeeze(2)
        else:
            output = self._convolve(images, cores, Geometry(amounts, padding_mode), bias)
        return output if input.ndim == spatial + 2 else output.squeeze(0)

    def _convolve(self, images: Tensor, cores: Sequence[Tensor], geometry: Geometry, bias: Tensor | None) -> Tensor:
        """(batch, in, *size) -> (batch, out, *new size), contiguous or channels_last as the images are."""
        channels_first = images.is_contiguous()
        map = self._at_strides(images, geometry).movedim(1, -1)
        output = self._absorb(map, cores, geometry, bias, channels_first=channels_first).movedim(-1, 1)
        if channels_first:
            return output.contiguous()
        return output.contiguous(memory_format=torch.channels_last if images.ndim == 4 else torch.channels_last_3d)

    def _at_strides(self, images: Tensor, geometry: Geometry) -> Tensor:
        """The positions that an axis with a kernel of size 1 needs."""
        if not self._pointwise:
            return images
        mode = "constant" if geometry.mode == "zeros" else geometry.mode  # no convolution is there to add zeros
        images, _ = padded(images, self._pointwise, Geometry(geometry.padding, mode))
        for axis in self._pointwise:
            if self._strides[axis] > 1:
                images = images[(slice(None),) * (2 + axis) + (slice(None, None, self._strides[axis]),)]
        return images

    def _absorb(
        self,
        map: Tensor,
        cores: Sequence[Tensor],
        geometry: Geometry,
        bias: Tensor | None,
        *,
        channels_first: bool = False,
    ) -> Tensor:
        """(batch, *positions, in) -> (batch, *new positions, out), if it costs nothing with the channels first."""
        *steps, last = self._steps
        for step in steps:
            map = step(map, cores, geometry)
        if self._ordering.order is not None:
            map = self._ordering(last(map, cores, geometry))
            return map if bias is None else map + bias.to(map.dtype)
        if channels_first and isinstance(last, Linear) and last.kept == 1 and batched_product(last.shape, map):
            return last.channels_first(map, cores, bias).movedim(1, -1)
        return last(map, cores, geometry, bias)
