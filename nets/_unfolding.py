"""The matrices of a weight (out, in / groups, *kernel) that low-rank layers factor, and the way back.

A layer whose matrix is a product of two thin ones is two layers in a row, through rank channels. Each axis of the
kernel belongs to one of the two: to the rows of the matrix, beside the output channels, and then to the second
layer, or to the columns, beside the input channels, and to the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

__all__ = ["Unfolding", "UnfoldingKind"]

UnfoldingKind: TypeAlias = Literal["output", "input", "separable"]


@dataclass(frozen=True)
class Unfolding:
    """How a weight of shape (out, in / groups, *kernel) lies in its matrix, one for each group.

    Args:
        weight_shape: of a linear layer or a convolution that is not transposed.
        kind: ``"output"``: rows are output channels, columns run over (in, *kernel). ``"input"``: rows run over
            (out, *kernel), columns are input channels. ``"separable"``: rows run over (out, first kernel axis),
            columns over (in, the other axes): vertical after horizontal filters in 2-D (Jaderberg, Vedaldi, Zisserman,
            BMVC 2014), in 3-D temporal after spatial ones ("(2+1)D": Tran et al., CVPR 2018). In 1-D it is
            ``"input"``, and for kernels of one tap all three are the same.
        groups: of the convolution.

    Raises:
        ValueError: an empty weight or one of fewer than two dimensions, another kind, or groups that do not divide the
            output channels.
    """

    weight_shape: tuple[int, ...]
    kind: UnfoldingKind = "output"
    groups: int = 1

    def __post_init__(self) -> None:
        if len(self.weight_shape) < 2 or 0 in self.weight_shape:
            raise ValueError(f"weight must be non-empty and have two or more dimensions, got shape {self.weight_shape}")
        if self.kind not in get_args(UnfoldingKind):
            allowed = ", ".join(map(repr, get_args(UnfoldingKind)))
            raise ValueError(f"unfolding must be one of {allowed}, got {self.kind!r}")
        if self.groups < 1 or self.weight_shape[0] % self.groups:
            raise ValueError(f"groups must divide the {self.weight_shape[0]} output channels, got {self.groups}")

    @property
    def split(self) -> int:
        """Number of kernel axes that belong to the rows: the leading ones."""
        axes = len(self.weight_shape) - 2
        return {"output": 0, "input": axes, "separable": min(1, axes)}[self.kind]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(out / groups, *leading kernel axes): what the rows of a matrix run over, row-major."""
        return self.weight_shape[0] // self.groups, *self.weight_shape[2 : 2 + self.split]

    @property
    def column_shape(self) -> tuple[int, ...]:
        """(in / groups, *other kernel axes): what the columns of a matrix run over, row-major."""
        return self.weight_shape[1], *self.weight_shape[2 + self.split :]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix of a group."""
        return math.prod(self.row_shape), math.prod(self.column_shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as its matrix (rows, columns); with several groups as (groups, rows, columns).

        Raises:
            ValueError: the weight has another shape.
        """
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(f"weight must have shape {self.weight_shape}, got {tuple(weight.shape)}")
        # Axes are group, out, in, *kernel: those of the kernel that belong to the rows come before in.
        parted = weight.reshape(self.groups, -1, *self.weight_shape[1:]).movedim(2, 2 + self.split)
        return parted.reshape(*self._stack, *self.matrix_shape)

    def weight(self, matrix: Tensor) -> Tensor:
        """The weight of a matrix (rows, columns), or with several groups (groups, rows, columns); contiguous."""
        parted = matrix.reshape(self.groups, *self.row_shape, *self.column_shape).movedim(2 + self.split, 2)
        return parted.reshape(self.weight_shape).contiguous()

    def check_rank(self, rank: int) -> None:
        """Refuse a rank that no matrix of this shape has.

        Raises:
            TypeError: no integer.
            ValueError: below 1, or above the smaller side of the matrix.
        """
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an int, got {rank!r}")
        most = min(self.matrix_shape)
        if not 1 <= rank <= most:
            raise ValueError(
                f"rank must be from 1 to {most} for a weight of shape {self.weight_shape}, whose matrix "
                f"{self._described} is {self.matrix_shape}, got {rank}"
            )

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes (rows, rank) and (rank, columns), led by the number of groups if there are several."""
        rows, columns = self.matrix_shape
        return (*self._stack, rows, rank), (*self._stack, rank, columns)

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self.groups == 1 else (self.groups,)

    @property
    def _described(self) -> str:
        return f"of unfolding {self.kind!r}" + ("" if self.groups == 1 else f" in each of {self.groups} groups")
