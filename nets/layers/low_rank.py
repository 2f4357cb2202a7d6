"""Linear layers and convolutions whose weight is a product U V of two thin matrices, which they never build.

A linear layer is two products. A convolution is two convolutions through rank channels, and which axes of the kernel
each of them convolves is its unfolding (`retract.nets._unfolding.Unfolding`):

    unfolding     first convolution       second convolution
    "output"      kernel to rank          1 x 1 to out
    "input"       1 x 1 to rank           kernel to out
    "separable"   1 x width to rank       height x 1 to out

Stride, padding and dilation along an axis belong to the convolution that has the axis. The first one has no bias, so
that it commutes with every padding mode along the other axes: outputs and gradients are those of the dense layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from retract.nets._unfolding import Unfolding, UnfoldingKind
from retract.nets.init.low_rank import LowRankMethod, lowrank_factors, lowrank_factors_with_bias

from ._contraction_steps import Geometry
from ._convolution_geometry import ConvolutionGeometry, PaddingMode, positive, shown
from ._factored_convolution import AxisConvolution
from ._low_rank import LowRankLayer

__all__ = [
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLayer",
    "LowRankLinear",
    "low_rank_layer",
]


class LowRankLinear(LowRankLayer):
    """A linear layer y = U V x + b.

    Args:
        in_features: size of x.
        out_features: size of y.
        rank: from 1 to the smaller of both; the factors save products below in * out / (in + out).
        bias: whether there is b.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a rank that is no integer.
        ValueError: a rank or a size out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        (self.in_features,) = positive("in_features", in_features, 1)
        (self.out_features,) = positive("out_features", out_features, 1)
        super().__init__(Unfolding((out_features, in_features)), rank, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(F.linear(input, self.right), self.left, self.bias)

    def _dense(self) -> nn.Linear:
        options: dict[str, Any] = {"device": self.left.device, "dtype": self.left.dtype}
        sizes = (self.in_features, self.out_features)
        dense: nn.Linear = nn.utils.skip_init(nn.Linear, *sizes, bias=self.bias is not None, **options)
        return dense

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class _LowRankConv(LowRankLayer):
    _spatial: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        rank: int,
        *,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        unfolding: UnfoldingKind = "output",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spatial = self._spatial
        (self.in_channels,), (self.out_channels,), (self.groups,) = (
            positive(name, value, 1)
            for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups))
        )
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide {in_channels} input and {out_channels} output channels, got {groups}")
        geometry = ConvolutionGeometry.of(
            kernel_size, spatial, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode
        )
        self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode, amounts = geometry
        matrix = Unfolding((out_channels, in_channels // groups, *self.kernel_size), unfolding, groups)
        # An axis with one tap may belong to either; strided over first, it leaves fewer positions.
        second = [axis for axis in range(matrix.split) if self.kernel_size[axis] > 1]
        first = [axis for axis in range(spatial) if axis not in second]
        self._first, self._second = (
            AxisConvolution.of(
                axes, self.kernel_size, self.stride, self.dilation, groups, Geometry(amounts, padding_mode)
            )
            for axes in (first, second)
        )
        super().__init__(matrix, rank, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, *size) or (in_channels, *size) -> the same of out_channels."""
        spatial = self._spatial
        if input.ndim not in (spatial + 1, spatial + 2):
            raise ValueError(f"input must have {spatial + 1} or {spatial + 2} dimensions, got {tuple(input.shape)}")
        if input.shape[-spatial - 1] != self.in_channels:
            raise ValueError(f"input must have {self.in_channels} channels, got shape {tuple(input.shape)}")
        images = input if input.ndim == spatial + 2 else input.unsqueeze(0)
        # Rows of left run over (group, out, *axes) and have the hidden channels last: the kernel needs them second.
        left = self.left.reshape(self.out_channels, -1, self.rank).mT
        hidden = self._first(images, self.right.reshape(self.groups * self.rank, -1))
        output = self._second(hidden, left.reshape(self.out_channels, -1), self.bias)
        return output if input.ndim == spatial + 2 else output.squeeze(0)

    def _dense(self) -> _ConvNd:
        options: dict[str, Any] = {name: getattr(self, name) for name in _GEOMETRY}
        options |= {"bias": self.bias is not None, "device": self.left.device, "dtype": self.left.dtype}
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        dense: _ConvNd = nn.utils.skip_init(_DENSE[self._spatial], *sizes, **options)
        return dense

    def extra_repr(self) -> str:
        """What `print` shows."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        return f"{sizes}{shown(self)}, bias={self.bias is not None}, unfolding={self.unfolding.kind!r}"


class LowRankConv1d(_LowRankConv):
    """`torch.nn.Conv1d` with a weight of low rank; see `LowRankConv2d`."""

    _spatial = 1


class LowRankConv2d(_LowRankConv):
    """`torch.nn.Conv2d` with a weight whose matrix is U V, run as two convolutions.

    Args:
        in_channels: as for `torch.nn.Conv2d`, as are the arguments that are not named here.
        out_channels: likewise.
        kernel_size: height and width, or one number for both.
        rank: of the matrix of each group, from 1 to its smaller side.
        stride: of the convolution.
        padding: number, one for each dimension, ``"same"`` or ``"valid"``.
        dilation: of the kernel.
        groups: of channels, each with factors of its own.
        bias: whether there is one.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        unfolding: ``"output"``, a matrix (out, in * height * width); ``"input"``, (out * height * width, in); or
            ``"separable"``, (out * height, in * width). In 1-D the last is ``"input"``; in 3-D it is
            (out * depth, in * height * width).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a rank that is no integer.
        ValueError: an argument that is not allowed.
    """

    _spatial = 2


class LowRankConv3d(_LowRankConv):
    """`torch.nn.Conv3d` with a weight of low rank; see `LowRankConv2d`."""

    _spatial = 3


#: What a convolution has besides sizes, with torch's names.
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_DENSE: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVOLUTIONS: dict[int, type[_LowRankConv]] = {1: LowRankConv1d, 2: LowRankConv2d, 3: LowRankConv3d}


def low_rank_layer(
    module: nn.Module,
    rank: int,
    *,
    unfolding: UnfoldingKind = "output",
    method: LowRankMethod = "spectral",
    correct_bias: bool = False,
    factors: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> LowRankLayer:
    """The low-rank layer with the geometry, device and dtype of a dense one, and a weight or function near its own.

    Args:
        module: `torch.nn.Linear`, or `torch.nn.Conv1d` to `Conv3d`; it is left as it is.
        rank: from 1 to the smaller side of the weight's matrix.
        unfolding: of a convolution.
        method: of `retract.nets.init.lowrank_factors`. The default is the nearest weight, whatever comes after the
            layer; most others are for a ReLU there.
        correct_bias: fit the bias, too, with `retract.nets.init.lowrank_factors_with_bias`. The layer then has one even
            if the dense layer has none; else its bias is a copy.
        factors: values of ``left`` and ``right``, copied, instead of a method's.
        options: ``slope``, ``covariance`` and ``iterations`` of `retract.nets.init.lowrank_factors`.

    Raises:
        TypeError: a module of another kind, or an option that the method's function has not.
        ValueError: a rank or another argument out of range, factors of other shapes than the layer's or given together
            with what chooses them, a weight with NaN or infinite entries.
    """
    if not isinstance(module, nn.Linear | _ConvNd) or isinstance(module, _ConvTransposeNd):
        raise TypeError(f"module must be a torch.nn.Linear, Conv1d, Conv2d or Conv3d, got {type(module).__name__}")
    if factors is not None and (options or correct_bias or method != "spectral"):
        raise ValueError("factors are given: method, correct_bias and options would have no effect")
    layer, bias = _like(module, rank, unfolding, module.bias is not None or correct_bias), module.bias
    sizes: dict[str, Any] = {"rank": rank, "unfolding": unfolding, "groups": layer.unfolding.groups}
    if correct_bias:
        left, right, bias = lowrank_factors_with_bias(module.weight, bias, method=method, **sizes, **options)
    elif factors is None:
        left, right = lowrank_factors(module.weight, method=method, **sizes, **options)
    else:
        left, right = factors
    with torch.no_grad():
        for name, own, value in (("left", layer.left, left), ("right", layer.right, right)):
            if own.shape != value.shape:
                raise ValueError(f"factors: {name} must have shape {tuple(own.shape)}, got {tuple(value.shape)}")
            own.copy_(value)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    return layer.train(module.training)


def _like(module: nn.Linear | _ConvNd, rank: int, unfolding: UnfoldingKind, bias: bool) -> LowRankLayer:
    """A low-rank layer of the geometry of a dense one, its parameters uninitialized."""
    options: dict[str, Any] = {"bias": bias, "device": module.weight.device, "dtype": module.weight.dtype}
    kind: type[LowRankLayer] = LowRankLinear
    sizes: tuple[Any, ...] = (module.weight.shape[1], module.weight.shape[0])
    if isinstance(module, _ConvNd):
        kind, sizes = _CONVOLUTIONS[len(module.kernel_size)], (module.in_channels, sizes[1], module.kernel_size)
        options |= {"unfolding": unfolding, **{name: getattr(module, name) for name in _GEOMETRY}}
    layer: LowRankLayer = nn.utils.skip_init(kind, *sizes, rank, **options)
    return layer
