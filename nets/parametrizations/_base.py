"""What the parametrizations of `spectral` share: from stored tensors to U, s, V and the weight, and back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Lipschitz, Spectrum
from retract.manifolds.tensor_train import STTP, core_shapes, frame
from retract.nets._conv_norm import conv_norm_bound

from ._charts import ChainCharts, CoreChart, evaluate
from ._fitting import fit_coordinates
from ._layout import MatrixLayout, Modes

__all__ = ["Factors", "Form", "SpectralParametrization", "spectral_weight", "widened"]

Form = Literal["householder", "stiefel"]
Factors = tuple[Tensor, Tensor, Tensor]

_HALF = (torch.float16, torch.bfloat16)


class SpectralParametrization(nn.Module):
    """What `SVDP` and `STTP` share: all but the manifold, once a frame is a chain of cores, be it of one."""

    #: Factors that `shared_frames` has computed beforehand.
    shared: Factors | None = None

    def __init__(
        self,
        layout: MatrixLayout,
        modes: Modes,
        ranks: tuple[int, ...],
        spectrum: Spectrum,
        manifold: SVDSpectral | STTP,
        form: Form,
    ) -> None:
        super().__init__()
        if form not in ("householder", "stiefel"):
            raise ValueError(f"form must be 'householder' or 'stiefel', got {form!r}")
        self.layout, self.modes, self.ranks = layout, modes, ranks
        self.spectrum, self.manifold, self.form = spectrum, manifold, form
        #: What the norm of the convolution is held to, if the spectrum is that of the operator and not of the matrix.
        self.operator_norm: float | None = None
        if isinstance(spectrum, Lipschitz) and spectrum.of == "operator" and layout.is_convolution:
            self.operator_norm = spectrum.c
        self.rank = ranks[len(modes[0]) - 1]
        left, right = core_shapes(*modes, ranks)
        self.left = ChainCharts(left, modes[0], reduced=self.spectrum.skew_only)
        self.right = ChainCharts(right, modes[1], reduced=False)
        if self.degrees_of_freedom == 0:
            raise ValueError(
                f"a {self.matrix_shape} weight of rank {self.rank} with spectrum {self.spectrum} has no degree of "
                "freedom: leave this layer out, or use another spectrum"
            )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, fan_in) of the weight's matrix."""
        return self.layout.matrix_shape

    @property
    def degrees_of_freedom(self) -> int:
        """Dimension of the set of weights, and the number of elements stored in Householder form."""
        frames = sum(chart.size for chart in (*self.left.cores, *self.right.cores))
        return frames + self.spectrum.dimension(self.rank)

    def extra_repr(self) -> str:
        """Matrix, ranks and spectrum."""
        return f"{self.matrix_shape}, rank={self.rank}, spectrum={self.spectrum}, form={self.form!r}"

    # ------------------------------------------------------------------------------------ from originals to weights

    def forward(self, *originals: Tensor) -> Tensor:
        """The weight, in the dtype of the originals."""
        left, right = self.scaled_factors(*originals)
        with autocast_off(left):
            return self.layout.weight(left @ right.mT).to(originals[0].dtype)

    def scaled_factors(self, *originals: Tensor) -> tuple[Tensor, Tensor]:
        """(out, r) and (fan_in, r) whose product ``left @ right.mT`` is the matrix, s in the smaller of them."""
        u, s, v = self.factors(*originals)
        return (u * s, v) if u.shape[0] <= v.shape[0] else (u, v * s)

    def singular_values(self, *originals: Tensor) -> Tensor:
        """Singular values of the matrix, (r,), in no order."""
        return self.factors(*originals)[1].abs()

    def factors(self, *originals: Tensor) -> Factors:
        """U (out, r), s (r,) and V (fan_in, r) of the matrix U diag(s) Vᵀ, at least in float32.

        In Householder form values may be negative where ``spectrum.signed`` says so, and stand in no order.
        """
        if self.shared is not None:
            return self.shared
        wide = widened(originals)
        return self.assemble(wide, evaluate(self.charts, self.coordinates(wide)))

    @property
    def charts(self) -> tuple[CoreChart, ...]:
        """Charts of the frames that are stored by coordinates: of cores of U, then of V. None in Stiefel form."""
        return self.left.live + self.right.live if self.form == "householder" else ()

    def coordinates(self, originals: Sequence[Tensor]) -> list[Tensor]:
        """The coordinates among the originals, in the order of `charts`."""
        if self.form == "stiefel":
            return []
        count = len(self.left.live)
        return [*originals[:count], *originals[len(originals) - len(self.right.live) :]]

    def assemble(self, originals: Sequence[Tensor], frames: Sequence[Tensor]) -> Factors:
        """The factors, from the originals, no longer in half precision, and the frames of their coordinates."""
        with autocast_off(originals[0]):
            if self.form == "stiefel":
                return self._normalized(*self.contract(originals))
            count, like = len(self.left.live), originals[0]
            theta = originals[count] if self.spectrum.dimension(self.rank) else like.new_empty(0)
            u, v = self.left.contract(frames[:count], like), self.right.contract(frames[count:], like)
            return self._normalized(u, self.spectrum.values(theta, self.rank), v)

    def contract(self, point: Sequence[Tensor]) -> Factors:
        """U, s and V of a point of the manifold."""
        count = len(self.modes[0])
        return frame(point[:count], self.modes[0]), point[count], frame(point[count + 1 :], self.modes[1])

    def _normalized(self, u: Tensor, s: Tensor, v: Tensor) -> Factors:
        """Scaled to the norm of the convolution, if that is what the spectrum is of.

        U has orthonormal columns: as a 1 x 1 convolution it keeps norms, so the norm is that of diag(s) Vᵀ.
        """
        if self.operator_norm is not None:
            bound = conv_norm_bound(self.layout.kernel(v * s), matrix_norm=s.detach().abs().amax())
            s = s * (self.operator_norm / bound)
        return u, s, v

    # ------------------------------------------------------------------------------------ from weights to originals

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Originals of the nearest weight: exact to rounding for weights of the set.

        Of tensor trains it is the nearest up to the factor sqrt(D - 1) of TT-SVD, D the number of modes; of
        convolutions normalised to their operator norm the nearest of its rank, scaled. Square weights of full
        rank whose singular values may not be negative have a positive determinant in Householder form.

        Raises:
            ValueError: NaN or infinite entries, or another shape.
        """
        return self.originals(self.nearest(self.matrix(weight)), weight.dtype)

    def matrix(self, weight: Tensor) -> Tensor:
        """The matrix of a weight as it is to be fitted, at least in float32."""
        (matrix,) = widened((self.layout.matrix(weight.detach()),))
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("weight has NaN or infinite entries: no weight U diag(s) Vᵀ is near it")
        if self.operator_norm is None:
            return matrix
        largest = torch.linalg.matrix_norm(matrix, 2)
        return matrix * torch.where(largest > 0, self.operator_norm / largest, 1.0)

    def nearest(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The point of the manifold nearest to a matrix: cores of U, descending singular values, cores of V."""
        point: tuple[Tensor, ...] = self.manifold.project(matrix)
        return point

    def originals(self, point: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What the layer stores for a point of the manifold."""
        if self.form == "householder":
            train = STTP(self.modes, self.ranks, self.spectrum)
            point = fit_coordinates(self.left, self.right, train, point)
        return tuple(t.to(dtype).contiguous() for t in point)


def spectral_weight(module: nn.Module, name: str) -> tuple[SpectralParametrization, tuple[Tensor, ...]] | None:
    """What makes a weight of a layer from its singular values, and the tensors that it makes it from."""
    if not parametrize.is_parametrized(module, name):
        return None
    stored: Any = getattr(module.parametrizations, name)
    if not isinstance(stored[0], SpectralParametrization):
        return None
    return stored[0], tuple(getattr(stored, f"original{i}") for i in range(stored.ntensors))


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Half precision as float32."""
    return [t.float() if t.dtype in _HALF else t for t in tensors]


def autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep the dtype of their factors; entering it costs more than asking for it."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
