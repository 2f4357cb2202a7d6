"""Sizes of tensor trains: modes of a dimension, ranks that can be attained, shapes of the cores."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Shapes", "capped_ranks", "chain_shapes", "check_ranks", "core_shapes", "prime_modes"]

Shapes = tuple[tuple[int, int], ...]


def prime_modes(size: int) -> tuple[int, ...]:
    """Prime factors of a dimension in ascending order: 12 is (2, 2, 3), a prime is itself, 1 is (1,).

    Raises:
        ValueError: ``size`` is less than one.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    factors, divisor, rest = [], 2, size
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            factors.append(divisor)
            rest //= divisor
        divisor += 1
    if rest > 1 or not factors:
        factors.append(rest)
    return tuple(factors)


def capped_ranks(out_modes: Sequence[int], in_modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """The ranks ``min(rank, largest possible)`` of every bond: always admissible.

    The largest possible rank of a bond is the lesser of the products of the modes on its two sides; that of the
    middle bond is the lesser of the matrix's two dimensions.

    Raises:
        ValueError: a mode or the rank is less than one, or a list of modes is empty.
    """
    modes = _train_modes(out_modes, in_modes)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    largest = (min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes)))
    return tuple(min(rank, most) for most in largest)


def check_ranks(out_modes: Sequence[int], in_modes: Sequence[int], ranks: int | Sequence[int]) -> tuple[int, ...]:
    """The ranks of all bonds, if tensors of exactly these ranks exist. An int is the cap of `capped_ranks`.

    They do if ``R_k <= R_{k-1} n_k`` and ``R_{k-1} <= n_k R_k`` for every core, with ``R_0 = R_D = 1``. Otherwise
    the ranks are never attained, and the dimension formula of Holtz, Rohwedder and Schneider over-counts.

    Raises:
        ValueError: their number is not that of the bonds, or one is not possible beside its neighbours.
    """
    if isinstance(ranks, int):
        return capped_ranks(out_modes, in_modes, ranks)
    modes = _train_modes(out_modes, in_modes)
    ranks = tuple(ranks)
    if len(ranks) != len(modes) - 1:
        raise ValueError(
            f"ranks must be {len(modes) - 1} numbers for modes {tuple(out_modes)} x {tuple(in_modes)}, "
            f"one for each bond between neighbouring modes, got {len(ranks)}: {ranks}"
        )
    if min(ranks) < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    bonds = (1, *ranks, 1)
    for k, (left, mode, right) in enumerate(zip(bonds, modes, bonds[1:], strict=False), start=1):
        if right > left * mode:
            raise ValueError(
                f"ranks {ranks}: R_{k} = {right} exceeds R_{k - 1} n_{k} = {left} * {mode} = {left * mode}"
            )
        if left > mode * right:
            raise ValueError(
                f"ranks {ranks}: R_{k - 1} = {left} exceeds n_{k} R_{k} = {mode} * {right} = {mode * right}"
            )
    return ranks


def core_shapes(out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> tuple[Shapes, Shapes]:
    """Shapes of the matricized cores of the left and of the right frame, both from the outside to the middle."""
    middle = len(out_modes) - 1
    return chain_shapes(out_modes, ranks[: middle + 1]), chain_shapes(in_modes, ranks[middle:][::-1])


def chain_shapes(modes: Sequence[int], ranks: Sequence[int]) -> Shapes:
    """Shapes (R_{k-1} n_k, R_k) of the cores of one frame, for ``ranks`` R_1 ... R_D and R_0 = 1."""
    return tuple((left * mode, right) for left, mode, right in zip((1, *ranks), modes, ranks, strict=False))


def _train_modes(out_modes: Sequence[int], in_modes: Sequence[int]) -> tuple[int, ...]:
    """The modes along the train: of the rows, then of the columns from the middle outward."""
    for name, modes in (("out_modes", out_modes), ("in_modes", in_modes)):
        if len(modes) == 0 or min(modes) < 1:
            raise ValueError(f"{name} must be one or more numbers of at least 1, got {tuple(modes)}")
    return (*out_modes, *reversed(in_modes))
