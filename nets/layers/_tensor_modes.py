"""Modes: the factors into which a tensor network splits a number of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral

from retract.manifolds.tensor_ranks import prime_modes

__all__ = ["MOST_MODES", "balanced_modes", "channel_modes", "integers"]

MOST_MODES = 12
_DEFAULT_MODES = 3


@lru_cache(maxsize=4096)
def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    """The ``count`` factors of a size with the least sum: as equal as they can be, ascending, with ones if need be."""
    if count == 1:
        return (size,)
    divisors = (first for first in range(1, size + 1) if size % first == 0)
    splits = (sorted((first, *balanced_modes(size // first, count - 1))) for first in divisors)
    return tuple(min(splits, key=lambda factors: (sum(factors), factors)))


def channel_modes(
    out_channels: int,
    in_channels: int,
    out_modes: Sequence[int] | None,
    in_modes: Sequence[int] | None,
    *,
    paired: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Modes of output and input channels: those that are given, the others by default; as many of both if paired."""
    outs = None if out_modes is None else _checked("out_modes", out_modes, out_channels)
    ins = None if in_modes is None else _checked("in_modes", in_modes, in_channels)
    out_count, in_count = (min(_DEFAULT_MODES, len(prime_modes(size))) for size in (out_channels, in_channels))
    if paired:
        given = outs or ins
        out_count = in_count = len(given) if given else max(out_count, in_count)
    outs = outs or balanced_modes(out_channels, out_count)
    if ins is None:
        ins = balanced_modes(in_channels, in_count)
        # Ascending beside descending, so that the pairs are of like size.
        ins = ins[::-1] if paired else ins
    if paired and len(outs) != len(ins):
        raise ValueError(f"out_modes and in_modes must be as many, got {outs} and {ins}")
    return outs, ins


def integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Values as a tuple of integers, all at least 1."""
    values = tuple(values)
    if not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
        raise TypeError(f"{name} must be integers, got {values}")
    if any(value < 1 for value in values):
        raise ValueError(f"{name} must be at least 1, got {values}")
    return tuple(int(value) for value in values)


def _checked(name: str, modes: Sequence[int], channels: int) -> tuple[int, ...]:
    modes = integers(name, modes)
    if math.prod(modes) != channels or not 1 <= len(modes) <= MOST_MODES:
        raise ValueError(f"{name} must be up to {MOST_MODES} factors of {channels}, got {modes}")
    return modes
