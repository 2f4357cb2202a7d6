"""A weight as a sum of rank-one terms of unit vectors: what is stored, and how the weight comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from retract.manifolds.cp_terms import check_terms, cp_normalize

from ._base import autocast_off, widened
from ._canonical_start import check_finite, fit_terms
from ._canonical_weight import build_weight
from ._layout import MatrixLayout

if TYPE_CHECKING:
    from retract.nets.layers.canonical import TermContraction, TransposedTermContraction

    from ._registration import Execution

__all__ = ["Canonical", "Form", "Terms", "canonical_weight"]

Form = Literal["euclidean", "oblique"]
Terms = tuple[Tensor, tuple[Tensor, ...]]


class Canonical(nn.Module):
    r"""Weight :math:`\sigma \sum_r \lambda_r a_r \circ b_r \circ \dots` of unit vectors. Use `canonical_weight_norm`.

    The originals are :math:`\lambda` (R,), then a factor (R, d) for each mode of size d > 1 in the order out, in,
    \*kernel; row r of a factor is the vector of term r.

    Args:
        shape: shape of the weight, as torch stores it.
        rank: the number of terms R.
        form: ``"euclidean"``: factors have rows of any length, which are normalised when they are used;
            ``"oblique"``: rows are unit vectors, and the optimizer keeps them so.
        transposed: the weight is (in, out, \*kernel).
        execution: ``"auto"``, ``"factored"`` or ``"weight"``, see `canonical_weight_norm`.

    Attributes:
        sigma: the fixed scale, a buffer with one element and no dimension.
        rank: R.
        shape: sizes of the modes, (out, in, \*kernel).
    """

    sigma: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        *,
        form: Form = "euclidean",
        transposed: bool = False,
        execution: Execution = "auto",
    ) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an int, got {rank!r}")
        if rank < 1:
            raise ValueError(f"rank must be 1 or more, got {rank}: a weight without terms is zero")
        if form not in ("euclidean", "oblique"):
            raise ValueError(f"form must be 'euclidean' or 'oblique', got {form!r}")
        if execution not in ("auto", "factored", "weight"):
            raise ValueError(f"execution must be 'auto', 'factored' or 'weight', got {execution!r}")
        self.layout = MatrixLayout(tuple(shape), transposed)
        self.rank, self.form, self.execution = rank, form, execution
        self.shape = (self.layout.matrix_shape[0], *self.layout.fan_in_shape)
        self._shortest = min(range(len(self.shape)), key=lambda mode: (self.shape[mode] == 1, self.shape[mode]))
        #: How the layer runs on the terms, if it is one that can.
        self.contraction: TermContraction | TransposedTermContraction | None = None
        self.register_buffer("sigma", torch.ones(()))

    @property
    def degrees_of_freedom(self) -> int:
        """R (sum (d - 1) + 1): a unit vector of each mode and a weight for each term."""
        return self.rank * (sum(self.shape) - len(self.shape) + 1)

    @property
    def ambiguous(self) -> bool:
        """Whether there are more terms than can be told apart: whole families of them have one and the same sum.

        That is so when they have more degrees of freedom than the weight has elements. A matrix is many sums of as
        many terms as its rank, whichever that is; here more of them count as too many.
        """
        sizes = sorted(size for size in self.shape if size > 1)
        if len(sizes) <= 2:
            return self.rank > (sizes[0] if len(sizes) == 2 else 1)
        return self.degrees_of_freedom > math.prod(sizes)

    @property
    def parameters_stored(self) -> int:
        """R (sum d + 1), without modes of size one: elements of the originals."""
        return self.rank * (sum(size for size in self.shape if size > 1) + 1)

    @property
    def published_parameters(self) -> int:
        """R (sum d + 1) + 1: the count of the paper, which stores vectors of unit modes, and sigma."""
        return self.rank * (sum(self.shape) + 1) + 1

    def extra_repr(self) -> str:
        """Sizes, rank and form."""
        return f"{self.shape}, rank={self.rank}, form={self.form!r}"

    # ------------------------------------------------------------------------------------ from originals to weights

    def forward(self, *originals: Tensor) -> Tensor:
        """The weight, in the dtype of the originals."""
        weights, vectors = self._live_terms(originals)
        with autocast_off(weights):
            weight = build_weight(weights, vectors, self.shape)
        weight = weight.transpose(0, 1).contiguous() if self.layout.transposed else weight
        return weight.to(originals[0].dtype)

    def scaled_factors(self, *originals: Tensor) -> tuple[Tensor, ...]:
        """Vectors (R, d) of all modes whose products sum to the weight, in the dtype of the originals.

        The weights of the terms are in those of the shortest mode with d > 1.
        """
        weights, factors = self.terms(*originals)
        mode = self._shortest
        factors = (*factors[:mode], weights.unsqueeze(1) * factors[mode], *factors[mode + 1 :])
        return tuple(factor.to(originals[0].dtype) for factor in factors)

    def terms(self, *originals: Tensor) -> Terms:
        """Weights of the terms (R,), which are sigma lambda, and unit vectors (R, d) of the modes out, in, *kernel.

        All modes have theirs here, ones for those of size one. At least float32.
        """
        weights, vectors = self._live_terms(originals)
        remaining = iter(vectors)
        ones = weights.new_ones(self.rank, 1)
        return weights, tuple(next(remaining) if size > 1 else ones for size in self.shape)

    def _live_terms(self, originals: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same without modes of size one."""
        scale, *stored = widened(originals)
        if self.form == "euclidean":
            stored = [rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in stored]
        return scale * self.sigma.to(scale.dtype), stored

    # ------------------------------------------------------------------------------------ from weights to originals

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Originals of a weight near this one: its terms by the power method, one after the other; sigma stays.

        Raises:
            ValueError: NaN or infinite entries, or another shape.
        """
        return self.originals(*fit_terms(self.tensor(weight), self.rank, "power"), weight.dtype)

    def tensor(self, weight: Tensor) -> Tensor:
        """The weight with its modes in the order out, in, *kernel."""
        if weight.shape != self.layout.weight_shape:
            raise ValueError(f"weight must have shape {self.layout.weight_shape}, got {tuple(weight.shape)}")
        return weight.transpose(0, 1) if self.layout.transposed else weight

    def originals(self, weights: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What is stored for weights (R,) and vectors (R, d) of all modes; norms of the vectors go into the weights.

        Raises:
            ValueError: other shapes, a vector that is zero, or entries that are not finite.
        """
        sizes = tuple(factor.shape[1:] for factor in factors)
        check_terms(weights, factors)
        if len(weights) != self.rank or sizes != tuple((size,) for size in self.shape):
            raise ValueError(
                f"factors must be of shapes ({self.rank}, d) with d = {self.shape} in this order, "
                f"got {[tuple(factor.shape) for factor in factors]}"
            )
        scale, *wide = widened((weights.detach(), *(factor.detach() for factor in factors)))
        scale, units = cp_normalize(wide, scale)
        for factor in units:
            if factor.shape[1] == 1:
                scale = scale * factor.squeeze(1)
        check_finite(scale)
        stored = (scale / self.sigma.to(scale), *(factor for factor in units if factor.shape[1] > 1))
        return tuple(tensor.to(dtype, memory_format=torch.contiguous_format, copy=True) for tensor in stored)


def canonical_weight(module: nn.Module, name: str = "weight") -> tuple[Canonical, tuple[Tensor, ...]] | None:
    """What makes a weight of a layer from rank-one terms, and the tensors that it makes it from."""
    if not parametrize.is_parametrized(module, name):
        return None
    stored: Any = getattr(module.parametrizations, name)
    if not isinstance(stored[0], Canonical):
        return None
    return stored[0], tuple(getattr(stored, f"original{i}") for i in range(stored.ntensors))
