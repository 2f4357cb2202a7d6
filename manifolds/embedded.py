"""What manifolds of matrices that are given by factors share: the embedded metric's verbs, and membership tests."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

__all__ = ["EmbeddedManifold", "Factors"]

Factors = Sequence[Tensor]


class EmbeddedManifold:
    """A manifold whose points are tuples of factors of a matrix, with the metric of the space of matrices."""

    #: Optimizers take the parameters of a group, in order, for the factors of one point.
    factored = True

    @abstractmethod
    def inner(self, x: Factors, u: Factors, v: Factors | None = None) -> Tensor:
        """``<dW, dW'>``, a scalar, for any factor velocities, in normal form or not."""

    @abstractmethod
    def _off_manifold(self, x: Factors, atol: float, rtol: float) -> str | None:
        """Why ``x`` is no point, or None."""

    @abstractmethod
    def _off_tangent(self, x: Factors, u: Factors, atol: float, rtol: float) -> str | None:
        """Why ``u`` is no tangent vector in normal form at the point ``x``, or None."""

    def norm(self, x: Factors, u: Factors) -> Tensor:
        """Frobenius norm of dW, a scalar."""
        return self.inner(x, u).clamp(min=0).sqrt()

    def dist(self, x: Factors, y: Factors) -> NoReturn:
        """Not offered: it has no closed form."""
        raise NotImplementedError(f"{self} has no closed-form dist; it offers embed, whose distance is in the space")

    def expmap(self, x: Factors, u: Factors) -> NoReturn:
        """Not offered: it has no closed form."""
        raise NotImplementedError(f"{self} has no closed-form expmap; it offers retr")

    def logmap(self, x: Factors, y: Factors) -> NoReturn:
        """Not offered: it has no closed form."""
        raise NotImplementedError(f"{self} has no closed-form logmap; it offers tangent(x, embed(y) - embed(x))")

    def check_point_on_manifold(
        self, x: Factors, *, explain: bool = False, atol: float = 1e-5, rtol: float = 1e-5
    ) -> bool | tuple[bool, str | None]:
        """Whether frames are orthonormal and singular values allowed; with the reason if not, if ``explain``."""
        try:
            reason = self._off_manifold(x, atol, rtol)
        except (TypeError, ValueError) as error:  # shapes, dtypes
            reason = str(error)
        return (reason is None, reason) if explain else reason is None

    def check_vector_on_tangent(
        self, x: Factors, u: Factors, *, explain: bool = False, atol: float = 1e-5, rtol: float = 1e-5
    ) -> bool | tuple[bool, str | None]:
        """Whether ``u`` is a tangent vector in normal form; with the reason if not, if ``explain``."""
        try:
            reason = self._off_tangent(x, u, atol, rtol)
        except (TypeError, ValueError) as error:
            reason = str(error)
        return (reason is None, reason) if explain else reason is None
