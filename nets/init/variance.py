"""How large the entries of the cores of a tensor network must be, so that its layer keeps signals at their size.

The variance rule of Pan et al., "A unified weight initialization paradigm for tensorial convolutional neural networks",
ICML 2022. Cores whose entries are uncorrelated, of mean zero and variance v_i, give a weight with

    Var(W) = B prod_i v_i,    B = product of the sizes of the bonds, each bond once.

A bond that many cores share (a hyperedge) and one that a single core has are counted once like any other. A layer with
fan F keeps the second moment of what passes it if Var(W) = gain² / F, exactly in expectation over the cores, whatever
the network. The rule fixes the product of the v_i alone; how it is split over the cores changes their gradients and
the intermediate results, but neither the output's nor the input gradient's second moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from ._axes import Padding, convolution_axes, one_each

if TYPE_CHECKING:
    from retract.nets.layers.tensor_network import TensorNetwork

__all__ = ["Fans", "Mode", "Split", "Stage", "core_variances", "stages", "tensor_fans"]

Mode = Literal["fan_in", "fan_out", "fan_avg"]
Split = Literal["equal_norm", "equal_variance", "staged"]


class Fans(NamedTuple):
    """Over how many products one entry sums: of the output (fan_in), and of the input gradient (fan_out, a mean)."""

    fan_in: float
    fan_out: float

    def select(self, mode: Mode) -> float:
        """The fan that an initialization divides by; ``"fan_avg"`` is the mean of both (Glorot and Bengio, 2010)."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")
        return {"fan_in": self.fan_in, "fan_out": self.fan_out, "fan_avg": sum(self) / 2}[mode]


def tensor_fans(
    network: TensorNetwork,
    *,
    groups: int = 1,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    input_size: int | Sequence[int] | None = None,
) -> Fans:
    """The fans of a layer, without bonds: those of the dense layer whose weight the network is.

    ``fan_in`` is in/groups times the positions of the kernel. ``fan_out`` is out/groups times the positions of the
    kernel, divided by the strides: so many taps an input position has on average. (Single positions differ: with
    kernel 1 and stride 2, three of four have none.)

    With ``input_size`` the taps that fall on padding are left out, and both fans are means over the positions: with
    kernel 3 and padding 1 on N positions, fan_in is (3N - 2)/(3N) of the above for each dimension.

    Args:
        network: of the weight (out, in/groups, *kernel).
        groups: of the convolution.
        stride: of the convolution, one for all spatial dimensions or one for each.
        padding: zeros around the input; matters with ``input_size`` alone.
        dilation: of the convolution; matters with ``input_size`` alone.
        input_size: spatial size of the input.

    Raises:
        ValueError: groups that do not divide the output channels; a stride, padding, dilation or size out of range; or
            sizes of which every tap falls on padding.
    """
    if groups < 1 or network.out_features % groups:
        raise ValueError(f"groups must divide the {network.out_features} output channels of {network}, got {groups}")
    axes = convolution_axes(network.kernel_size, stride=stride, padding=padding, dilation=dilation)
    fan_in, fan_out = float(network.in_features), network.out_features / groups
    if input_size is None:
        taps = math.prod(network.kernel_size)
        return Fans(fan_in * taps, fan_out * taps / math.prod(axis.stride for axis in axes))
    for axis, size in zip(axes, one_each("input_size", input_size, len(axes)), strict=True):
        if axis.taps(size) == 0:
            raise ValueError(f"input_size {size}: every tap falls on padding, of {axis}")
        fan_in *= axis.taps(size) / axis.outputs(size)
        fan_out *= axis.taps(size) / size
    return Fans(fan_in, fan_out)


def core_variances(
    network: TensorNetwork,
    *,
    gain: float = math.sqrt(2.0),
    mode: Mode = "fan_in",
    groups: int = 1,
    stride: int | Sequence[int] = 1,
    split: Split = "equal_norm",
) -> tuple[float, ...]:
    """Variance of the entries of each core; their product is gain² / (F B), with the fan F and the bonds B.

    Args:
        network: whose cores are independent, with uncorrelated entries of mean zero, each core used once.
        gain: ratio of standard deviations that the layer is to have, once for the whole layer: sqrt(2) before a ReLU,
            1 for a linear network, or for the first layer.
        mode: ``"fan_in"`` keeps signals forward, ``"fan_out"`` gradients backward, ``"fan_avg"`` compromises.
        groups: of the convolution.
        stride: of the convolution.
        split: ``"equal_norm"`` gives all cores the same expected norm. Gradient flow keeps the differences of the
            squared norms of the cores, so that cores which start balanced stay so. ``"equal_variance"`` gives all
            entries the same variance. ``"staged"`` charges each core for the indices that are summed when the input
            absorbs it, in the order of `stages`: every intermediate result has the second moment of the input, which
            keeps half precision from overflowing, and the last core has the gain.

    Returns:
        One variance a core, in the network's order.

    Raises:
        ValueError: an unknown mode or split, a gain that is not positive and finite, or as `tensor_fans`.
    """
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be positive and finite, got {gain}")
    fans = tensor_fans(network, groups=groups, stride=stride)
    product = gain**2 / (fans.select(mode) * network.bond_product)
    count = len(network.cores)
    if split == "equal_variance":
        return (product ** (1 / count),) * count
    if split == "equal_norm":
        sizes = [network.size(core) for core in network.cores]
        log_norm = (math.log(product) + sum(map(math.log, sizes))) / count
        return tuple(math.exp(log_norm) / size for size in sizes)
    if split == "staged":
        order = stages(network)
        variances = {stage.core: 1 / network.size(stage.summed + stage.dangling) for stage in order}
        variances[order[-1].core] *= product * fans.fan_in * network.bond_product
        return tuple(variances[core] for core in range(count))
    raise ValueError(f"split must be one of {', '.join(map(repr, get_args(Split)))}, got {split!r}")


class Stage(NamedTuple):
    """A core as the linear map that it is when the input absorbs it: from the summed to the new indices.

    There is one such map for each value of the passing indices, which the result so far has and keeps, and of the
    dangling ones, which are summed with nothing. The four have together all indices of the core.
    """

    core: int
    summed: str
    passing: str
    new: str
    dangling: str


def stages(network: TensorNetwork) -> tuple[Stage, ...]:
    """The order in which the input absorbs the cores, nearest first, and what each sums.

    Next is the core that adds the fewest indices; among those, the one that sums the most; among those, the first. It
    orders a canonical form as in, height, width, out, and a tensor train along itself. An index is summed once: with
    the last core that has it.
    """
    present = set(network.inputs + network.kernel)
    remaining = list(range(len(network.cores)))
    order: list[Stage] = []
    while remaining:
        candidates = [_stage(network, core, remaining, present) for core in remaining]
        stage = min(candidates, key=lambda stage: (len(stage.new), -network.size(stage.summed), stage.core))
        order.append(stage)
        remaining.remove(stage.core)
        present = (present | set(stage.new)) - set(stage.summed)
    return tuple(order)


def _stage(network: TensorNetwork, core: int, remaining: Sequence[int], present: set[str]) -> Stage:
    needed = set(network.outputs).union(*(network.cores[other] for other in remaining if other != core))
    parts = {(False, True): "", (True, True): "", (True, False): "", (False, False): ""}
    for label in network.cores[core]:
        parts[label in needed, label in present] += label
    return Stage(core, *parts.values())
