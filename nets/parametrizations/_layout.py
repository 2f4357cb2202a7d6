"""A weight tensor read as the matrix (out, fan_in) that spectral parametrizations factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from retract.manifolds.tensor_train import prime_modes

__all__ = ["MatrixLayout", "Modes"]

Modes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class MatrixLayout:
    """How a weight of shape (out, in, *kernel), or (in, out, *kernel) if ``transposed``, lies in its matrix.

    Rows of the matrix are outputs; its columns run over (in, *kernel), row-major.
    """

    weight_shape: tuple[int, ...]
    transposed: bool = False

    def __post_init__(self) -> None:
        if len(self.weight_shape) < 2 or 0 in self.weight_shape:
            raise ValueError(f"weight must be non-empty and have two or more dimensions, got shape {self.weight_shape}")

    @property
    def fan_in_shape(self) -> tuple[int, ...]:
        """(in, *kernel)."""
        first = self.weight_shape[0] if self.transposed else self.weight_shape[1]
        return (first, *self.weight_shape[2:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, fan_in)."""
        return self.weight_shape[1 if self.transposed else 0], math.prod(self.fan_in_shape)

    @property
    def is_convolution(self) -> bool:
        """Whether there is a kernel of more than one tap, so that the matrix is not the layer's operator."""
        return math.prod(self.weight_shape[2:]) > 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as its matrix."""
        if weight.shape != self.weight_shape:
            raise ValueError(f"weight must have shape {self.weight_shape}, got {tuple(weight.shape)}")
        return (weight.transpose(0, 1) if self.transposed else weight).reshape(self.matrix_shape)

    def weight(self, matrix: Tensor) -> Tensor:
        """The matrix as the weight, contiguous."""
        weight = matrix.reshape(-1, *self.fan_in_shape)
        return weight.transpose(0, 1).contiguous() if self.transposed else weight

    def kernel(self, right: Tensor) -> Tensor:
        """A factor (fan_in, r) as the kernel of a convolution to r channels: (r, in, *kernel)."""
        return right.mT.reshape(-1, *self.fan_in_shape)

    def prime_modes(self) -> Modes:
        """Prime factors of out, and of in and of each kernel size; ones are left out, where others remain."""
        fan_in = [mode for size in self.fan_in_shape for mode in prime_modes(size) if mode > 1]
        return prime_modes(self.matrix_shape[0]), tuple(fan_in) or (1,)

    def check_modes(self, modes: tuple[Sequence[int], Sequence[int]]) -> Modes:
        """Modes that multiply to the sizes of the matrix.

        Raises:
            ValueError: they do not.
        """
        if len(modes) != 2:
            raise ValueError(f"modes must be a pair (those of out, those of fan_in), got {modes}")
        for name, given, size in zip(("out", "fan_in"), modes, self.matrix_shape, strict=True):
            if math.prod(given) != size or min(given, default=0) < 1:
                raise ValueError(f"modes of {name} must be positive and multiply to {size}, got {tuple(given)}")
        return tuple(modes[0]), tuple(modes[1])
