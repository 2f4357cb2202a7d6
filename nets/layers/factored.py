"""Layers that run on the factors of their weight W = U diag(s) Vᵀ and never build it.

A convolution becomes one with kernel Vᵀ to r channels and a 1 x 1 convolution with U diag(s); a linear layer two
products; an embedding a look-up of r numbers and a product. Stride, dilation and padding belong to the first
convolution alone, so the result is that of the dense layer.

Each class is its dense one with another `forward`: the weight can still be read and assigned. While the layer has no
spectral parametrization, or another on top of it, it runs dense.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from retract.nets.parametrizations._base import SpectralParametrization, spectral_weight

__all__ = [
    "FACTORED",
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredConvTranspose1d",
    "FactoredConvTranspose2d",
    "FactoredConvTranspose3d",
    "FactoredEmbedding",
    "FactoredLinear",
    "products",
    "saves_products",
    "why_not_factored",
]

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_CONVOLVE_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _scaled_factors(module: nn.Module) -> tuple[SpectralParametrization, Tensor, Tensor] | None:
    """Factors (out, r) and (fan_in, r) of the weight in its dtype, and what they come from, if all is as it must."""
    found = spectral_weight(module, "weight")
    stored: Any = getattr(module, "parametrizations", None)
    if found is None or len(stored["weight"]) != 1:
        return None
    parametrization, originals = found
    left, right = parametrization.scaled_factors(*originals)
    return parametrization, left.to(originals[0].dtype), right.to(originals[0].dtype)


class FactoredLinear(nn.Linear):
    """`torch.nn.Linear` as two products."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        factors = _scaled_factors(self)
        if factors is None:
            return super().forward(input)
        _, left, right = factors
        return F.linear(F.linear(input, right.mT), left, self.bias)


class FactoredEmbedding(nn.Embedding):
    """`torch.nn.Embedding` as a look-up of r numbers for each index, and a product."""

    def forward(self, input: Tensor) -> Tensor:
        """Indices of any shape -> (..., embedding_dim)."""
        factors = _scaled_factors(self)
        if factors is None:
            return super().forward(input)
        _, left, right = factors
        result = F.linear(F.embedding(input, left), right)
        if self.padding_idx is None:
            return result
        return torch.where((input == self.padding_idx).unsqueeze(-1), result.detach(), result)


class _FactoredConv(_ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *size) or (in, *size) -> the same of out."""
        factors = _scaled_factors(self)
        if factors is None:
            result: Tensor = super().forward(input)
            return result
        parametrization, left, right = factors
        hidden = self._conv_forward(input, parametrization.layout.kernel(right), None)
        return _pointwise(hidden, left, self.bias, len(self.kernel_size))


class _FactoredConvTranspose(_ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, in, *size) or (in, *size) -> the same of out."""
        factors = _scaled_factors(self)
        if factors is None:
            result: Tensor = super().forward(input, output_size)
            return result
        parametrization, left, right = factors
        ndim = len(self.kernel_size)
        stride, padding, dilation = (_ints(values) for values in (self.stride, self.padding, self.dilation))
        extra = self._output_padding(input, output_size, stride, padding, list(self.kernel_size), ndim, dilation)
        kernel = parametrization.layout.kernel(right).transpose(0, 1)
        hidden = _CONVOLVE_TRANSPOSED[ndim - 1](input, kernel, None, stride, padding, extra, 1, dilation)
        return _pointwise(hidden, left, self.bias, ndim)


def _ints(values: str | tuple[int, ...]) -> list[int]:
    """An argument of a transposed convolution, which unlike other convolutions knows no padding by name."""
    assert not isinstance(values, str)
    return list(values)


def _pointwise(hidden: Tensor, left: Tensor, bias: Tensor | None, ndim: int) -> Tensor:
    """The 1 x 1 convolution: on a CPU, channels first, a product of matrices takes half the time of torch's own."""
    if hidden.device.type != "cpu" or hidden.ndim != ndim + 2 or not hidden.is_contiguous():
        result: Tensor = _CONVOLVE[ndim - 1](hidden, left.reshape(*left.shape, *(1,) * ndim), bias)
        return result
    weight, flat = left.expand(len(hidden), -1, -1), hidden.flatten(2)
    product = torch.bmm(weight, flat) if bias is None else torch.baddbmm(bias.unsqueeze(-1), weight, flat)
    return product.reshape(*product.shape[:2], *hidden.shape[2:])


class FactoredConv1d(_FactoredConv, nn.Conv1d):
    """`torch.nn.Conv1d` as a convolution to r channels and a pointwise one."""


class FactoredConv2d(_FactoredConv, nn.Conv2d):
    """`torch.nn.Conv2d` as a convolution to r channels and a pointwise one."""


class FactoredConv3d(_FactoredConv, nn.Conv3d):
    """`torch.nn.Conv3d` as a convolution to r channels and a pointwise one."""


class FactoredConvTranspose1d(_FactoredConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` as a transposed convolution to r channels and a pointwise one."""


class FactoredConvTranspose2d(_FactoredConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` as a transposed convolution to r channels and a pointwise one."""


class FactoredConvTranspose3d(_FactoredConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` as a transposed convolution to r channels and a pointwise one."""


#: The factored class of each dense one.
FACTORED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FactoredLinear,
    nn.Embedding: FactoredEmbedding,
    nn.Conv1d: FactoredConv1d,
    nn.Conv2d: FactoredConv2d,
    nn.Conv3d: FactoredConv3d,
    nn.ConvTranspose1d: FactoredConvTranspose1d,
    nn.ConvTranspose2d: FactoredConvTranspose2d,
    nn.ConvTranspose3d: FactoredConvTranspose3d,
}


def why_not_factored(module: nn.Module, name: str = "weight") -> str | None:
    """What keeps a layer from running on the factors of this parameter, if anything does."""
    if type(module) not in FACTORED:
        return f"{type(module).__name__} is not a class of torch.nn itself, and may use its weight in its own way"
    if name != "weight":
        return f"the layer's computation takes its weight, not {name!r}"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return "max_norm and scale_grad_by_freq act on rows of the weight"
    return None


def products(module: nn.Module, rank: int) -> tuple[int, int]:
    """Multiplications of the dense and of the factored layer: per output position, without those for the weight.

    Per input position for transposed convolutions; per index for embeddings, whose dense layer multiplies nothing.
    """
    if isinstance(module, nn.Embedding):
        return 0, rank * module.embedding_dim
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features, rank * (module.in_features + module.out_features)
    assert isinstance(module, _ConvNd)
    taps = math.prod(module.kernel_size)
    outputs = math.prod(module.stride) if module.transposed else 1
    fan_in = module.in_channels * taps
    return module.out_channels * fan_in, rank * (fan_in + module.out_channels * outputs)


def saves_products(module: nn.Module, rank: int) -> bool:
    """Whether the factored layer multiplies less than the dense one, whatever the number of positions.

    An embedding does unless it looks up more indices than it has: building its weight costs as much as looking
    up all of them.
    """
    dense, factored = products(module, rank)
    return isinstance(module, nn.Embedding) or factored < dense
