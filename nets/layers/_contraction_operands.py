"""A tensor network as a contraction with a map of features sees it: groups, unit sizes and sequences resolved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import opt_einsum

from .tensor_network import TensorNetwork

__all__ = ["Operands", "operands", "parted_outputs"]


@dataclass(frozen=True)
class Operands:
    """A tensor network as a contraction sees it: no index of size 1, the index of groups by itself.

    ``kernel`` has the indices that convolve, one for each spatial axis, or None where the kernel's size is 1. There are
    two axes at least: a sequence is an image of height 1.
    """

    cores: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    inputs: str  # of the map, groups first
    outputs: str
    kernel: tuple[str | None, ...]
    stride: tuple[int, ...]  # for each spatial axis
    dilation: tuple[int, ...]

    @property
    def dims(self) -> dict[str, int]:
        """The size of each index."""
        return dict(self.sizes)


def parted_outputs(network: TensorNetwork, groups: int) -> tuple[str, str, int] | None:
    """How the output indices begin with the group: the whole indices of it, and one that it divides, by how much.

    None where they do not: 6 groups of output indices of sizes 4 and 3, for example. The divided index is empty where
    whole indices do.
    """
    whole = ""
    for label in network.outputs:
        if groups == 1:
            break
        size = network.dims[label]
        if groups % size:
            return (whole, label, groups) if size % groups == 0 else None
        groups //= size
        whole += label
    return (whole, "", 1) if groups == 1 else None


def operands(network: TensorNetwork, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Operands:
    """Operands of a convolution of ``groups`` groups, or of a linear layer.

    Raises:
        ValueError: the output indices do not begin with the group.
    """
    parts = parted_outputs(network, groups)
    if parts is None:
        sizes = [network.dims[label] for label in network.outputs]
        raise ValueError(f"groups must part the outputs, of sizes {sizes}, into whole or divided indices, got {groups}")
    group, divided, parts_of_it = parts
    dims, cores, outputs = dict(network.dims), list(network.cores), network.outputs
    if divided:
        new = _unused_label(dims)
        dims[new], dims[divided] = parts_of_it, dims[divided] // parts_of_it
        cores = [core.replace(divided, new + divided) for core in cores]
        outputs = outputs.replace(divided, new + divided)
        group += new
    cores = [_without_units(core, dims) for core in cores]
    height = 1 if len(network.kernel) == 1 else 0
    return Operands(
        cores=tuple(cores),
        sizes=tuple((label, size) for label, size in dims.items() if size > 1),
        inputs=_without_units(group + network.inputs, dims),
        outputs=_without_units(outputs, dims),
        kernel=(None,) * height + tuple(label if dims[label] > 1 else None for label in network.kernel),
        stride=(1,) * height + stride,
        dilation=(1,) * height + dilation,
    )


def _unused_label(dims: Mapping[str, int]) -> str:
    symbols: Iterator[str] = map(opt_einsum.get_symbol, itertools.count())
    return next(symbol for symbol in symbols if symbol not in dims)


def _without_units(labels: str, dims: Mapping[str, int]) -> str:
    return "".join(label for label in labels if dims[label] > 1)
