"""Which values the singular values of a weight may take: all one, free, of fixed maximum, or within bounds.

Singular values stand along the last dimension of a tensor; leading dimensions are a batch. Each set is used in
two ways. A manifold of matrices projects onto it and keeps velocities along it (`Spectrum.project`,
`Spectrum.constrain`). A layer trained by any optimizer takes its values from unconstrained coordinates
(`Spectrum.values`); there a value may be negative where `Spectrum.signed` says so, and its magnitude is the
singular value.

Identity, free and largest-value spectra are modes C, R and L of Obukhov et al. (AISTATS 2021, section 3.3), the
last two with coordinates of their own: the published quotient S / max|S| has one coordinate too many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["Bounded", "Free", "Identity", "Lipschitz", "Spectrum", "as_spectrum"]


@dataclass(frozen=True)
class Spectrum:
    """A set of allowed singular values, the same for every order of them. Subclasses say which."""

    name: ClassVar[str]

    #: Coinciding values are the rule: velocities of U and V that rotate both alike change nothing, and the middle
    #: block Uᵀ dW V of a tangent vector is skew-symmetric.
    skew_only: ClassVar[bool] = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as plain values."""
        return asdict(self)

    def dimension(self, r: int) -> int:
        """Number of degrees of freedom of ``r`` values, and of their coordinates."""
        return r

    def project(self, s: Tensor) -> Tensor:
        """The nearest allowed values to ``s >= 0``."""
        raise NotImplementedError

    def constrain(self, s: Tensor, ds: Tensor) -> Tensor:
        """The nearest velocity to ``ds`` that keeps the equality constraint at ``s`` to first order."""
        return ds

    def contains(self, s: Tensor, atol: float = 1e-5) -> tuple[bool, str | None]:
        """Whether every value of ``s`` is finite and within ``atol`` of the set; if not, what is wrong."""
        s = s.detach()
        if not bool(torch.isfinite(s).all()):
            return False, "s has NaN or infinite entries"
        worst = float(self._excess(s).amax())
        return (True, None) if worst <= atol else (False, f"s is {worst:.3g} from {self}, allowed {atol:.3g}")

    def _excess(self, s: Tensor) -> Tensor:
        """How far each value is from where it may be."""
        raise NotImplementedError

    def spread(self, r: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """``r`` values to start from, descending and, where the set allows, distinct and inside it.

        At coinciding values, rotating U and V alike has no effect, and r (r - 1) / 2 coordinates of a weight
        would have none.
        """
        raise NotImplementedError

    def signed(self, r: int) -> tuple[bool, ...]:
        """Which of the ``r`` results of `values` may be negative."""
        raise NotImplementedError

    def values(self, theta: Tensor, r: int) -> Tensor:
        """Values from unconstrained coordinates, shape (..., dimension(r)) -> (..., r); differentiable."""
        raise NotImplementedError

    def coordinates(self, s: Tensor) -> Tensor:
        """Coordinates whose `values` are the allowed ``s``, to rounding; the inverse on [-pi/2, pi/2]."""
        raise NotImplementedError

    def _check_coordinates(self, theta: Tensor, r: int) -> None:
        if theta.shape[-1:] != (self.dimension(r),):
            raise ValueError(
                f"theta must have {self.dimension(r)} coordinates for {r} values of {self}, "
                f"got shape {tuple(theta.shape)}"
            )


@dataclass(frozen=True)
class Identity(Spectrum):
    """Every singular value is 1: weights that are isometries of a subspace."""

    name = "identity"
    skew_only = True

    def dimension(self, r: int) -> int:
        """None."""
        return 0

    def project(self, s: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(s)

    def constrain(self, s: Tensor, ds: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(ds)

    def _excess(self, s: Tensor) -> Tensor:
        return (s - 1).abs()

    def spread(self, r: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Ones."""
        return torch.ones(r, dtype=dtype, device=device)

    def signed(self, r: int) -> tuple[bool, ...]:
        """None is."""
        return (False,) * r

    def values(self, theta: Tensor, r: int) -> Tensor:
        """Ones; ``theta`` is empty."""
        self._check_coordinates(theta, r)
        return theta.new_ones(*theta.shape[:-1], r)

    def coordinates(self, s: Tensor) -> Tensor:
        """None: an empty last dimension."""
        return s[..., :0]


@dataclass(frozen=True)
class Free(Spectrum):
    """Any singular values: matrices of fixed rank (zeros, where the rank is lower, are let pass)."""

    name = "free"

    def project(self, s: Tensor) -> Tensor:
        """``s`` itself."""
        return s

    def _excess(self, s: Tensor) -> Tensor:
        return (-s).clamp(min=0)

    def spread(self, r: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Evenly from 1 down to 1/2."""
        return torch.linspace(1.0, 0.5, r, dtype=dtype, device=device)

    def signed(self, r: int) -> tuple[bool, ...]:
        """All are."""
        return (True,) * r

    def values(self, theta: Tensor, r: int) -> Tensor:
        """``theta`` itself."""
        self._check_coordinates(theta, r)
        return theta

    def coordinates(self, s: Tensor) -> Tensor:
        """``s`` itself."""
        return s


@dataclass(frozen=True)
class Lipschitz(Spectrum):
    """The largest singular value is exactly ``c``; the others are at most that.

    Args:
        c: the Lipschitz constant of the weight as a linear map, > 0.
        of: ``"matrix"``, or ``"operator"`` for layers whose convolution is to have it, where the norm of the
            matricized kernel is up to sqrt(kh kw) too small. Only layers know the difference; here they are one.
    """

    name = "lipschitz"
    c: float = 1.0
    of: Literal["matrix", "operator"] = "matrix"

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise ValueError(f"c must be finite and > 0, got {self.c}")
        if self.of not in ("matrix", "operator"):
            raise ValueError(f"of must be 'matrix' or 'operator', got {self.of!r}")

    def dimension(self, r: int) -> int:
        """One less than the number of values."""
        return r - 1

    def project(self, s: Tensor) -> Tensor:
        """Clamp to ``c``; the (first) largest value becomes ``c`` wherever it was."""
        return torch.where(_is_first_largest(s), self.c, s.clamp(max=self.c))

    def constrain(self, s: Tensor, ds: Tensor) -> Tensor:
        """The (first) largest value stays."""
        return torch.where(_is_first_largest(s), 0.0, ds)

    def _excess(self, s: Tensor) -> Tensor:
        return torch.maximum((s.amax(-1, keepdim=True) - self.c).abs(), -s)

    def spread(self, r: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Evenly from ``c`` down to ``c / 2``."""
        return torch.linspace(self.c, self.c / 2, r, dtype=dtype, device=device)

    def signed(self, r: int) -> tuple[bool, ...]:
        """All but the first, which is ``c``."""
        return (False, *(True,) * (r - 1))

    def values(self, theta: Tensor, r: int) -> Tensor:
        """``c (1, sin theta_2, ..., sin theta_r)``."""
        self._check_coordinates(theta, r)
        first = theta.new_full((*theta.shape[:-1], 1), self.c)
        return torch.cat((first, self.c * torch.sin(theta)), dim=-1)

    def coordinates(self, s: Tensor) -> Tensor:
        """Of values whose first is ``c``."""
        return _arcsine(s[..., 1:] / self.c)


@dataclass(frozen=True)
class Bounded(Spectrum):
    """Every singular value in ``[low, high]``: the condition number is at most ``high / low``.

    A manifold with boundary: a step that leaves it is clamped, so a value may stay at a bound for as long as
    the gradient presses against it, and leaves it when the gradient turns.

    Args:
        low, high: the bounds, 0 < low < high.
    """

    name = "bounded"
    low: float = 0.1
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"low and high must be finite with 0 < low < high, got {self.low} and {self.high}")

    def project(self, s: Tensor) -> Tensor:
        """Clamp to the bounds."""
        return s.clamp(self.low, self.high)

    def _excess(self, s: Tensor) -> Tensor:
        return torch.maximum(s - self.high, self.low - s)

    def spread(self, r: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Evenly over the inside."""
        return torch.linspace(self.high, self.low, r + 2, dtype=dtype, device=device)[1:-1].clone()

    def signed(self, r: int) -> tuple[bool, ...]:
        """None is."""
        return (False,) * r

    def values(self, theta: Tensor, r: int) -> Tensor:
        """``(high + low) / 2 + (high - low) / 2 * sin theta``."""
        self._check_coordinates(theta, r)
        return (self.high + self.low) / 2 + (self.high - self.low) / 2 * torch.sin(theta)

    def coordinates(self, s: Tensor) -> Tensor:
        """Of values within the bounds."""
        return _arcsine((2 * s - (self.high + self.low)) / (self.high - self.low))


SpectrumLike = Spectrum | Literal["identity", "free", "lipschitz", "bounded"] | Mapping[str, Any]

_BY_NAME: dict[str, type[Spectrum]] = {cls.name: cls for cls in (Identity, Free, Lipschitz, Bounded)}


def as_spectrum(spectrum: SpectrumLike) -> Spectrum:
    """A spectrum from itself, its name, or the plain values that a state dict holds in its place.

    Raises:
        ValueError: a name that none of them has.
        TypeError: neither a spectrum, nor a name, nor a mapping.
    """
    if isinstance(spectrum, Spectrum):
        return spectrum
    if not isinstance(spectrum, str | Mapping):
        raise TypeError(f"spectrum must be a name or a Spectrum, got {type(spectrum).__name__}")
    described: Mapping[str, Any] = {"name": spectrum} if isinstance(spectrum, str) else spectrum
    if described.get("name") not in _BY_NAME:
        raise ValueError(f"spectrum must be one of {', '.join(_BY_NAME)} or a Spectrum, got {spectrum!r}")
    return _BY_NAME[described["name"]](**described.get("arguments", {}))


def _is_first_largest(s: Tensor) -> Tensor:
    """True at the first of the largest values of each row."""
    places = torch.arange(s.shape[-1], device=s.device)
    return places == s.argmax(-1, keepdim=True)


def _arcsine(y: Tensor) -> Tensor:
    """Arcsine, kept sqrt(2 eps) off ±pi/2: that moves the sine by an eps, and leaves it a derivative to go by.

    At ±pi/2 itself the derivative of the sine is zero, and a coordinate would stay there for ever.
    """
    end = math.pi / 2 - math.sqrt(2 * torch.finfo(y.dtype).eps)
    return torch.asin(y.clamp(-1, 1)).clamp(-end, end)
