"""Checks of what says how large a factored layer becomes, and why one that would be no smaller stays dense."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

__all__ = ["StaysDense", "allowed_by", "check_energy", "check_error", "check_fresh", "check_saving"]


class StaysDense(Exception):  # noqa: N818  # no error: nothing is wrong, and nothing is raised to the user
    """A layer would not be smaller for its conversion; the message says so."""


def allowed_by(budget: float, whole: int, unit: str = "element") -> int:
    """How much a budget allows: itself if it is an int, else that fraction of the whole."""
    if not _is_number(budget):
        raise TypeError(f"budget must be a number, got {budget!r}")
    if isinstance(budget, Integral):
        if budget < 1:
            raise ValueError(f"budget must be 1 {unit} or more, or a fraction in (0, 1], got {budget!r}")
        return int(budget)
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be a fraction in (0, 1], or an int, a number of {unit}s, got {budget!r}")
    return int(budget * whole)


def check_error(error: float) -> None:
    """Refuse what is no relative error."""
    if not _is_number(error):
        raise TypeError(f"error must be a number, got {error!r}")
    if not 0 < error < 1:
        raise ValueError(f"error must be a relative error, in (0, 1), got {error!r}")


def check_energy(energy: float) -> None:
    """Refuse what is no fraction of the squared singular values."""
    if not _is_number(energy):
        raise TypeError(f"energy must be a number, got {energy!r}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be a fraction of the squared singular values, in (0, 1], got {energy!r}")


def check_fresh(init: str, given: Sequence[str]) -> None:
    """Refuse options of random starts where there is none."""
    if given:
        raise ValueError(f"{' and '.join(given)} given with init={init!r}, and of effect for random starts alone")


def check_saving(stored: int, elements: int) -> None:
    """Leave a layer dense if its factors would store as much."""
    if stored >= elements:
        raise StaysDense(f"it would store {stored:,} elements, its weight has {elements:,}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
