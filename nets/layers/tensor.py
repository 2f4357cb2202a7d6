"""Convolutions and linear layers whose weight is a tensor network.

They run factored (the input is contracted with the cores one after another, the weight is never built) or with the
weight built from the cores, whichever is cheaper. Both give the output and the gradients of the dense layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from retract.nets.init.tensor import tensor_kaiming_

from ._contraction import Contraction
from ._contraction_operands import parted_outputs
from ._convolution_geometry import ConvolutionGeometry, PaddingMode, positive, shown
from .tensor_network import TensorNetwork

__all__ = ["Execution", "TensorConv1d", "TensorConv2d", "TensorConv3d", "TensorLinear", "tensor_layer"]

#: How a layer runs: on its cores, with its weight, or as is cheaper.
Execution: TypeAlias = Literal["auto", "factored", "weight"]

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _TensorLayer(nn.Module):
    """Cores, bias, and the way they are used."""

    bias: nn.Parameter | None

    def __init__(
        self,
        network: TensorNetwork,
        contraction: Contraction | None,
        bias: bool,
        execution: Execution,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.network = network
        #: The factored way; None where groups do not part the output indices, and only the weight will do.
        self.contraction = contraction
        self.execution = execution
        self.cores = nn.ParameterList([torch.empty(s, device=device, dtype=dtype) for s in network.core_shapes])
        empty = nn.Parameter(torch.empty(network.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the cores as `retract.nets.init.tensor_kaiming_` does, and zero the bias."""
        tensor_kaiming_(self)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in / groups, *kernel), built from the cores; contiguous, differentiable."""
        # As an einsum leaves it, it may be laid out channels_last: a convolution would return its output so.
        return self.network.weight(list(self.cores)).contiguous()

    @property
    def execution(self) -> Execution:
        """How the layer runs; it may be assigned at any time.

        ``"auto"`` is the cheaper way by an estimate made at construction: see `Contraction.cheaper`.

        Raises:
            ValueError: on assignment of another value, or of ``"factored"`` where groups allow only the weight.
        """
        return self._execution

    @execution.setter
    def execution(self, value: Execution) -> None:
        if value not in get_args(Execution):
            raise ValueError(f"execution must be one of {', '.join(map(repr, get_args(Execution)))}, got {value!r}")
        if value == "factored" and self.contraction is None:
            raise ValueError(
                f"execution must be 'weight' or 'auto' here, got 'factored': {getattr(self, 'groups', 1)} groups do "
                f"not part the output indices {self.network.outputs!r} of {self.network}"
            )
        self._execution: Execution = value

    @property
    def factored(self) -> bool:
        """Whether the layer runs on its cores."""
        if self.contraction is None or self.execution == "weight":
            return False
        return self.execution == "factored" or self.contraction.cheaper


class TensorLinear(_TensorLayer):
    """A linear layer y = W x + b with a tensor network for W.

    Args:
        network: of W (out, in), without kernel indices.
        bias: whether there is b.
        execution: ``"auto"``, ``"factored"`` or ``"weight"``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: no `TensorNetwork`.
        ValueError: a network with kernel indices, or another ``execution``.
    """

    def __init__(
        self,
        network: TensorNetwork,
        *,
        bias: bool = True,
        execution: Execution = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_network(network, 0, type(self).__name__)
        self.in_features, self.out_features = network.in_features, network.out_features
        super().__init__(network, Contraction(network), bias, execution, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.factored:
            assert self.contraction is not None
            return self.contraction(input, list(self.cores), bias=self.bias)
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{self.in_features}, {self.out_features}, {self.network}, bias={self.bias is not None}, "
            f"execution={self.execution!r}"
        )


class _TensorConv(_TensorLayer):
    _spatial: int

    def __init__(
        self,
        network: TensorNetwork,
        *,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        execution: Execution = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spatial = self._spatial
        _check_network(network, spatial, type(self).__name__)
        positive("groups", groups, 1)
        if network.out_features % groups:
            raise ValueError(f"groups must divide the {network.out_features} output channels, got {groups}")
        self.in_channels, self.out_channels, self.groups = network.in_features * groups, network.out_features, groups
        geometry = ConvolutionGeometry.of(
            network.kernel_size, spatial, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode
        )
        self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode, self._amounts = geometry
        contraction = None
        if parted_outputs(network, groups) is not None:
            contraction = Contraction(network, stride=self.stride, dilation=self.dilation, groups=groups)
        super().__init__(network, contraction, bias, execution, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, *size) or (in_channels, *size) -> the same of out_channels."""
        if self.factored:
            assert self.contraction is not None
            cores = list(self.cores)
            return self.contraction(input, cores, self.padding, padding_mode=self.padding_mode, bias=self.bias)
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            flat = [number for pair in reversed(self._amounts) for number in pair]  # torch counts from the last axis
            input, padding = F.pad(input, flat, self.padding_mode), (0,) * self._spatial
        convolve = _CONVOLVE[self._spatial]
        return convolve(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """What `print` shows."""
        sizes = f"{self.in_channels}, {self.out_channels}, {self.network}, kernel_size={self.kernel_size}"
        return f"{sizes}{shown(self)}, bias={self.bias is not None}, execution={self.execution!r}"


class TensorConv1d(_TensorConv):
    """`torch.nn.Conv1d` with a tensor network for its weight; see `TensorConv2d`."""

    _spatial = 1


class TensorConv2d(_TensorConv):
    """`torch.nn.Conv2d` with a tensor network for its weight (out, in / groups, height, width).

    Args:
        network: of the weight, with two kernel indices.
        stride: as for `torch.nn.Conv2d`, as are the arguments that are not named here.
        padding: number, one for each dimension, ``"same"`` or ``"valid"``.
        dilation: of the kernel.
        groups: of channels. The layer can run factored if the output indices begin with the group: whole indices, the
            slowest first, or a divisor of the next.
        bias: whether there is one.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        execution: ``"auto"``, ``"factored"`` or ``"weight"``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: no `TensorNetwork`.
        ValueError: a network with another number of kernel indices; an argument that is not allowed; ``"factored"``
            where groups allow only the weight.
    """

    _spatial = 2


class TensorConv3d(_TensorConv):
    """`torch.nn.Conv3d` with a tensor network for its weight; see `TensorConv2d`."""

    _spatial = 3


def tensor_layer(
    module: nn.Module, network: TensorNetwork, cores: Sequence[Tensor] | None = None, *, execution: Execution = "auto"
) -> _TensorLayer:
    """The tensorial layer with the geometry, bias, device and dtype of a dense one.

    Args:
        module: `torch.nn.Linear`, or `torch.nn.Conv1d` to `Conv3d`; it is left as it is.
        network: of the weight's shape.
        cores: their values, copied. Default: drawn afresh by `retract.nets.init.tensor_kaiming_`.
        execution: as for the layer.

    Raises:
        TypeError: a module of another kind.
        ValueError: a network of another shape than the weight, or cores of other shapes than the network's.
    """
    if not isinstance(module, nn.Linear | _ConvNd) or isinstance(module, _ConvTransposeNd):
        raise TypeError(f"module must be a torch.nn.Linear, Conv1d, Conv2d or Conv3d, got {type(module).__name__}")
    weight = module.weight
    if network.weight_shape != tuple(weight.shape):
        raise ValueError(f"network must have the weight's shape {tuple(weight.shape)}, got {network.weight_shape}")
    options: dict[str, Any] = {
        "bias": module.bias is not None,
        "execution": execution,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    if isinstance(module, _ConvNd):
        geometry = ("stride", "padding", "dilation", "groups", "padding_mode")
        options |= {name: getattr(module, name) for name in geometry}
    layer = _KINDS[weight.ndim - 2](network, **options)
    with torch.no_grad():
        if cores is not None:
            network.check_cores(cores)
            for own, core in zip(layer.cores, cores, strict=True):
                own.copy_(core)
        if layer.bias is not None and module.bias is not None:
            layer.bias.copy_(module.bias)
    return layer.train(module.training)


_KINDS: tuple[Callable[..., _TensorLayer], ...] = (TensorLinear, TensorConv1d, TensorConv2d, TensorConv3d)


def _check_network(network: object, spatial: int, kind: str) -> None:
    if not isinstance(network, TensorNetwork):
        raise TypeError(f"network must be a TensorNetwork, got {network!r}")
    if len(network.kernel) != spatial:
        raise ValueError(f"network of a {kind} must have {spatial} kernel indices, got {network.kernel!r}: {network}")
