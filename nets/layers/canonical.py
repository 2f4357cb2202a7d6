"""Layers that run on the rank-one terms of their weight, W = sum_r w_r a_r o b_r o c_r o ..., and need not build it.

A convolution becomes a 1 x 1 to R channels, depthwise convolutions of them and a 1 x 1; a linear layer two products.
At the full number of terms a convolution has more multiplications so than with its weight, but to build the weight
costs as much as R positions of the output do: which is cheaper depends on the size of the input, and is decided call by
call.

Each class is its dense one with another `forward`: the weight can still be read and assigned. While the layer has no
canonical parametrization, or another on top of it, it runs dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from retract.manifolds.cp_terms import khatri_rao
from retract.nets.parametrizations._canonical_base import Canonical, canonical_weight

from ._contraction import Contraction
from ._contraction_path import MEMORY
from ._contraction_steps import pointwise
from .tensor_network import TensorNetwork

__all__ = [
    "CANONICAL",
    "CanonicalConv1d",
    "CanonicalConv2d",
    "CanonicalConv3d",
    "CanonicalConvTranspose1d",
    "CanonicalConvTranspose2d",
    "CanonicalConvTranspose3d",
    "CanonicalLinear",
    "Cost",
    "TermContraction",
    "TransposedTermContraction",
    "obstacle_to_terms",
    "runs_factored",
    "term_contraction",
]

_CONVOLVE_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_AXES = "xyz"


@dataclass(frozen=True)
class Cost:
    """What a layer costs: multiplications and memory for one position of its output, and once for all positions."""

    multiplications: int
    elements: int  # of maps, read and written
    once: int  # multiplications

    def at(self, positions: int) -> float:
        """All of it for one position in multiplications, if there are so many positions."""
        return self.multiplications + MEMORY * self.elements + self.once / max(positions, 1)


class TermContraction:
    """The way from the input of a layer through the terms of its weight to the output; of a convolution or linear one.

    Args:
        module: the layer, for its geometry.
        shape: (out, in, *kernel).
        rank: the number of terms.
    """

    def __init__(self, module: nn.Module, shape: Sequence[int], rank: int) -> None:
        axes = _AXES[: len(shape) - 2]
        sizes = dict(zip("oi" + axes, shape, strict=True))
        cores = ["r" + label for label, size in sizes.items() if size > 1] or ["r"]
        cores[-1] += "".join(label for label, size in sizes.items() if size == 1)
        network = TensorNetwork(cores, {"r": rank, **sizes}, inputs="i", outputs="o", kernel=axes)
        self.contraction = Contraction(network, **_geometry(module, "stride", "dilation"))
        found, inputs = self.contraction, math.prod(self.contraction.stride)
        convolved = 2 * rank * (1 + inputs) if any(size > 1 for size in shape[2:]) else 2 * rank
        self.cost = Cost(found.multiplications, shape[1] * inputs + convolved + shape[0], found.products)
        self.dense_cost = Cost(found.dense_multiplications, shape[1] * inputs + shape[0], found.building)

    def cheaper(self, positions: int) -> bool:
        """Whether this costs less than to build the weight and use it, for so many positions of the output."""
        return self.cost.at(positions) < self.dense_cost.at(positions)

    def __call__(self, module: Any, input: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The output of the layer.

        Args:
            module: the layer.
            input: (batch, in, *size) or (in, *size); of a linear layer (..., in).
            factors: vectors (R, d) of all modes, whose products sum to the weight (`Canonical.scaled_factors`).
        """
        live = [factor for factor in factors if factor.shape[1] > 1] or factors[:1]
        shaped = [core.reshape(shape) for core, shape in zip(live, self.contraction.network.core_shapes, strict=True)]
        return self.contraction(input, shaped, bias=module.bias, **_geometry(module, "padding", "padding_mode"))


class TransposedTermContraction:
    """The same of a transposed convolution: a 1 x 1, a depthwise transposed convolution, and a 1 x 1.

    Costs are for one position of the input.
    """

    def __init__(self, module: Any, shape: Sequence[int], rank: int) -> None:
        (out, channels, *kernel), outputs = shape, math.prod(module.stride)
        taps = math.prod(kernel)
        multiplications = rank * (channels + taps + out * outputs)
        elements = channels + 2 * rank + (2 * rank + out) * outputs
        self.kernel = tuple(kernel)
        self.cost = Cost(multiplications, elements, rank * taps)
        self.dense_cost = Cost(math.prod(shape), channels + out * outputs, rank * math.prod(shape))

    def cheaper(self, positions: int) -> bool:
        """Whether this costs less than to build the weight and use it, for so many positions of the input."""
        return self.cost.at(positions) < self.dense_cost.at(positions)

    def __call__(self, module: Any, input: Tensor, factors: Sequence[Tensor], output_padding: list[int]) -> Tensor:
        """The output of the layer: as `TermContraction`."""
        out, channels, *kernel = factors
        images = input if input.ndim == len(kernel) + 2 else input.unsqueeze(0)
        channels_first = images.is_contiguous()
        hidden = pointwise(images.movedim(1, -1), channels).movedim(-1, 1)
        depthwise = khatri_rao(kernel).reshape(-1, 1, *self.kernel)
        convolve = _CONVOLVE_TRANSPOSED[len(kernel) - 1]
        hidden = convolve(
            hidden, depthwise, None, module.stride, module.padding, output_padding, len(depthwise), module.dilation
        )
        output = pointwise(hidden.movedim(1, -1), out.mT)
        output = (output if module.bias is None else output + module.bias.to(output.dtype)).movedim(-1, 1)
        output = output.contiguous() if channels_first else output
        return output if input.ndim == images.ndim else output.squeeze(0)


def _geometry(module: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names} if isinstance(module, _ConvNd) else {}


# --------------------------------------------------------------------------------------------------------------- layers


def _factors(module: nn.Module, positions: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """How to run on the terms and on which, if that is possible, and wanted for so many positions."""
    found = canonical_weight(module)
    stored: Any = getattr(module, "parametrizations", None)
    if found is None or len(stored["weight"]) != 1:
        return None
    parametrization, originals = found
    contraction = parametrization.contraction
    if contraction is None or not runs_factored(parametrization, positions):
        return None
    return contraction, parametrization.scaled_factors(*originals)


class CanonicalLinear(nn.Linear):
    """`torch.nn.Linear` as two products, where that costs less than to build the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        found = _factors(self, input.numel() // self.in_features)
        if found is None:
            return super().forward(input)
        contraction, factors = found
        return contraction(self, input, factors)


class _CanonicalConv(_ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *size) or (in, *size) -> the same of out."""
        found = _factors(self, input.numel() // (self.in_channels * math.prod(self.stride)))
        if found is None:
            output: Tensor = super().forward(input)
            return output
        contraction, factors = found
        return contraction(self, input, factors)


class _CanonicalConvTranspose(_ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, in, *size) or (in, *size) -> the same of out."""
        found = _factors(self, input.numel() // self.in_channels)
        if found is None:
            output: Tensor = super().forward(input, output_size)
            return output
        contraction, factors = found
        stride, padding, kernel, dilation = (
            [int(value) for value in values] for values in (self.stride, self.padding, self.kernel_size, self.dilation)
        )
        extra = self._output_padding(input, output_size, stride, padding, kernel, len(kernel), dilation)
        return contraction(self, input, factors, extra)


class CanonicalConv1d(_CanonicalConv, nn.Conv1d):
    """`torch.nn.Conv1d` as a 1 x 1, a depthwise convolution and a 1 x 1, where that costs less."""


class CanonicalConv2d(_CanonicalConv, nn.Conv2d):
    """`torch.nn.Conv2d` as a 1 x 1, a depthwise convolution and a 1 x 1, where that costs less."""


class CanonicalConv3d(_CanonicalConv, nn.Conv3d):
    """`torch.nn.Conv3d` as a 1 x 1, a depthwise convolution and a 1 x 1, where that costs less."""


class CanonicalConvTranspose1d(_CanonicalConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` as a 1 x 1, a depthwise one and a 1 x 1, where that costs less."""


class CanonicalConvTranspose2d(_CanonicalConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` as a 1 x 1, a depthwise one and a 1 x 1, where that costs less."""


class CanonicalConvTranspose3d(_CanonicalConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` as a 1 x 1, a depthwise one and a 1 x 1, where that costs less."""


#: The canonical class of each dense one.
CANONICAL: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CanonicalLinear,
    nn.Conv1d: CanonicalConv1d,
    nn.Conv2d: CanonicalConv2d,
    nn.Conv3d: CanonicalConv3d,
    nn.ConvTranspose1d: CanonicalConvTranspose1d,
    nn.ConvTranspose2d: CanonicalConvTranspose2d,
    nn.ConvTranspose3d: CanonicalConvTranspose3d,
}


def obstacle_to_terms(module: nn.Module, name: str = "weight") -> str | None:
    """What keeps a layer from running on the terms of this parameter, if anything does."""
    if type(module) not in CANONICAL and not isinstance(module, tuple(CANONICAL.values())):
        return f"{type(module).__name__} is not a class of torch.nn itself, and may use its weight in its own way"
    return None if name == "weight" else f"the layer's computation takes its weight, not {name!r}"


def term_contraction(module: nn.Module, parametrization: Canonical) -> TermContraction | TransposedTermContraction:
    """How a layer runs on the terms of a parametrization of its weight."""
    kind = TransposedTermContraction if parametrization.layout.transposed else TermContraction
    return kind(module, parametrization.shape, parametrization.rank)


def runs_factored(parametrization: Canonical, positions: int) -> bool:
    """Whether a layer runs on its terms when its output has so many positions, in all images of the batch together.

    The rows of a linear layer are meant, and of a transposed convolution the positions of its input.
    """
    contraction, execution = parametrization.contraction, parametrization.execution
    if contraction is None or execution == "weight":
        return False
    return execution == "factored" or contraction.cheaper(positions)
