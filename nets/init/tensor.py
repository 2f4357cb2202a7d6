"""Kaiming and Xavier initialization of tensorial layers: `torch.nn.init` for layers whose weight is a tensor network.

The variances of the cores are those of `retract.nets.init.variance`. Semi-orthogonal cores are the default. Independent
entries meet the rule in expectation only: the squared norm of a weight of Gaussian cores spreads over draws by 20 % (CP
of rank 48) to 100 % (hierarchical Tucker), anew in each layer of a deep network. Semi-orthogonal cores have the same
second moments, and the norm is that of the rule to a few percent (tensor rings) or exactly (CP, Tucker, block-term and
hierarchical Tucker, tensor trains, while no rank exceeds the sizes that it joins).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from .variance import Mode, Split, Stage, core_variances, stages, tensor_fans

if TYPE_CHECKING:
    from retract.nets.layers.tensor_network import TensorNetwork

__all__ = ["Distribution", "tensor_kaiming_", "tensor_xavier_"]

Distribution = Literal["orthogonal", "normal", "uniform"]
Layer = TypeVar("Layer", bound=nn.Module)
_Empty = Callable[..., Tensor]  # torch.empty, in the right place


def tensor_kaiming_(
    layer: Layer,
    *,
    mode: Mode = "fan_in",
    nonlinearity: str = "relu",
    a: float = 0.0,
    distribution: Distribution = "orthogonal",
    split: Split = "equal_norm",
    input_size: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Layer:
    """Draw the cores of a layer so that the layers of a deep network with this nonlinearity keep their second moments.

    E[y²] of the layer is gain² E[x²] for ``mode="fan_in"``; for ``"fan_out"`` the same holds of the gradients. The
    gain enters once a layer, whatever the number of cores (He et al., ICCV 2015; Pan et al., ICML 2022). The rule
    counts all positions of the kernel, so that a convolution with zero padding loses a little at the borders: give
    ``input_size`` to make up for it. The backward counts are means over the input positions.

    Args:
        layer: `TensorConv2d`, `TensorLinear` or another module with a `TensorNetwork` as ``network`` and ``cores``.
        mode: ``"fan_in"``, ``"fan_out"`` or ``"fan_avg"``.
        nonlinearity: that comes before the layer, as for `torch.nn.init.calculate_gain`. A layer that sees the
            network's input itself has ``"linear"``.
        a: slope of ``"leaky_relu"``.
        distribution: ``"orthogonal"`` draws each core as linear maps, one for each value of the indices that pass it
            by (`retract.nets.init.variance.stages`), uniformly from the semi-orthogonal ones, scaled: a rotation, or
            a unit vector for a single row or column, or a random sign for a single number. ``"normal"`` and
            ``"uniform"`` draw independent entries. The variances are the same.
        split: of the variance over the cores: ``"equal_norm"``, ``"equal_variance"`` or ``"staged"``, see
            `core_variances`.
        input_size: height, width, ... of the layer's input, to correct for zeros around it. Without effect on layers
            that pad with something else.
        generator: of random numbers, on the device of the cores.

    Returns:
        The layer. Its cores are drawn in float32 (float64 for those in float64) and then cast; its bias is left.

    Raises:
        TypeError: a layer without network and cores.
        ValueError: an argument that is not allowed.
    """
    return _draw_(layer, _gain(nonlinearity, a), mode, distribution, split, input_size, generator)


def tensor_xavier_(
    layer: Layer,
    *,
    gain: float | str = 1.0,
    mode: Mode = "fan_avg",
    distribution: Distribution = "orthogonal",
    split: Split = "equal_norm",
    input_size: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Layer:
    """Draw the cores of a layer for the mean of both fans, as Glorot and Bengio, AISTATS 2010.

    Args:
        layer: as for `tensor_kaiming_`, as are the arguments that are not named here.
        gain: a number, or the name of a nonlinearity (`torch.nn.init.calculate_gain`).
        mode: ``"fan_avg"``, or another to scale by ``gain`` along one direction.
        distribution: ``"orthogonal"``, ``"normal"`` or ``"uniform"``.
        split: of the variance over the cores.
        input_size: to correct for zero padding.
        generator: of random numbers.

    Returns:
        The layer.

    Raises:
        TypeError, ValueError: as `tensor_kaiming_`.
    """
    value = _gain(gain) if isinstance(gain, str) else gain
    return _draw_(layer, value, mode, distribution, split, input_size, generator)


def _gain(nonlinearity: str, a: float = 0.0) -> float:
    try:
        return float(nn.init.calculate_gain(nonlinearity, a))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"nonlinearity must be one that torch.nn.init.calculate_gain knows: {error}") from error


def _draw_(
    layer: Layer,
    gain: float,
    mode: Mode,
    distribution: Distribution,
    split: Split,
    input_size: int | Sequence[int] | None,
    generator: torch.Generator | None,
) -> Layer:
    if distribution not in get_args(Distribution):
        allowed = ", ".join(map(repr, get_args(Distribution)))
        raise ValueError(f"distribution must be one of {allowed}, got {distribution!r}")
    network, cores = _network_and_cores(layer)
    geometry = {"groups": getattr(layer, "groups", 1), "stride": getattr(layer, "stride", 1)}
    if input_size is not None and getattr(layer, "padding_mode", "zeros") == "zeros":
        borders = {name: getattr(layer, name) for name in ("padding", "dilation") if hasattr(layer, name)}
        inside = tensor_fans(network, **geometry, **borders, input_size=input_size)
        gain *= math.sqrt(tensor_fans(network, **geometry).select(mode) / inside.select(mode))
    variances = core_variances(network, gain=gain, mode=mode, **geometry, split=split)
    with torch.no_grad():
        for stage in stages(network):
            core = cores[stage.core]
            # Half precision has no QR decomposition, and few numbers to draw from.
            dtype = torch.float64 if core.dtype == torch.float64 else torch.float32
            empty = partial(torch.empty, dtype=dtype, device=core.device)
            draw = _DRAWS[distribution](network, stage, empty, generator)
            core.copy_(draw * math.sqrt(variances[stage.core]))
    return layer


def _network_and_cores(layer: nn.Module) -> tuple[TensorNetwork, list[Tensor]]:
    missing = [name for name in ("network", "cores") if not hasattr(layer, name)]
    if missing:
        raise TypeError(
            f"layer must be a tensorial one, such as TensorConv2d; {type(layer).__name__} has no {missing[0]}: "
            "use torch.nn.init for other layers, and initialize those inside a container one by one"
        )
    found: Any = layer
    cores = list(found.cores)
    found.network.check_cores(cores)
    return found.network, cores


def _normal(network: TensorNetwork, stage: Stage, empty: _Empty, generator: torch.Generator | None) -> Tensor:
    return empty(network.core_shapes[stage.core]).normal_(generator=generator)


def _uniform(network: TensorNetwork, stage: Stage, empty: _Empty, generator: torch.Generator | None) -> Tensor:
    return empty(network.core_shapes[stage.core]).uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)


def _orthogonal(network: TensorNetwork, stage: Stage, empty: _Empty, generator: torch.Generator | None) -> Tensor:
    """A core whose linear maps are semi-orthogonal, with the sum over dangling bonds a multiple of such a map."""
    passing, dangling, new, summed = map(network.size, (stage.passing, stage.dangling, stage.new, stage.summed))
    long, short = max(new, summed), min(new, summed)
    frames = _orthonormal(empty(passing, dangling, long, short).normal_(generator=generator)) * math.sqrt(long)
    maps = frames if new >= summed else frames.mT
    if dangling > 1:
        # Turned so that the sum is the first map alone: that of several would be no semi-orthogonal one.
        ones_first = torch.eye(dangling, dtype=maps.dtype, device=maps.device)
        ones_first[:, 0] = 1
        maps = torch.einsum("pdns,ed->pens", maps, torch.linalg.qr(ones_first).Q)
    labels = stage.passing + stage.dangling + stage.new + stage.summed
    core = maps.reshape([network.dims[label] for label in labels])
    return core.permute([labels.index(label) for label in network.cores[stage.core]])


def _orthonormal(draws: Tensor) -> Tensor:
    """Orthonormal columns (..., n, p) of Gaussian ones, uniformly distributed: R must have a positive diagonal.

    Their entries are uncorrelated and of variance 1/n, all that the variance rule asks for.
    """
    frames, triangle = torch.linalg.qr(draws)
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(frames.dtype)
    uniform: Tensor = frames * signs.unsqueeze(-2)
    return uniform


#: How the cores of each distribution are drawn, with variance 1.
_DRAWS = {"orthogonal": _orthogonal, "normal": _normal, "uniform": _uniform}
