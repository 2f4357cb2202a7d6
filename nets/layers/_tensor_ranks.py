"""Ranks of a tensor network: the largest that are of use, and the largest that a number of parameters allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Limit",
    "Ranks",
    "Sizes",
    "count_parameters",
    "largest_ranks",
    "proportional_ranks",
    "two_core_limit",
    "useful_ranks",
]

Sizes = Mapping[str, int]
Ranks = dict[str, int]
#: The largest useful size of a bond, by the cores, the present sizes of all indices, and the bond.
Limit = Callable[[Sequence[str], Sizes, str], int]


def count_parameters(cores: Sequence[str], sizes: Sizes) -> int:
    """Entries of all cores."""
    return sum(math.prod([sizes[label] for label in core]) for core in cores)


def two_core_limit(cores: Sequence[str], sizes: Sizes, bond: str) -> int:
    """The largest useful size of a bond between two cores: what else they have, of the one that has less.

    The core with less, as a matrix of the bond by the rest, has no higher rank: its row space can be moved into the
    other core. Indices that both cores have only repeat that matrix.
    """
    first, second = (set(core) for core in cores if bond in core)
    return min(math.prod([sizes[label] for label in own]) for own in (first - second, second - first))


def useful_ranks(cores: Sequence[str], dims: Sizes, ranks: Ranks, limit: Limit) -> Ranks:
    """The ranks, each cut to its limit beside the others."""
    while True:
        sizes = {**dims, **ranks}
        cut = {bond: min(rank, limit(cores, sizes, bond)) for bond, rank in ranks.items()}
        if cut == ranks:
            return ranks
        ranks = cut


def proportional_ranks(
    cores: Sequence[str], dims: Sizes, shares: Mapping[str, float], limit: Limit, scale: int
) -> Ranks:
    """The ranks in proportion to their shares, each cut to its limit. One with an infinite share is at its limit."""
    most = math.prod(dims.values())
    ranks = {bond: most if math.isinf(share) else math.ceil(scale * share) for bond, share in shares.items()}
    return useful_ranks(cores, dims, ranks, limit)


def largest_ranks(cores: Sequence[str], dims: Sizes, shares: Mapping[str, float], limit: Limit, budget: int) -> Ranks:
    """The largest useful ranks in proportion to their shares whose cores have no more parameters than the budget.

    What the proportion leaves over goes to single ranks, the smallest for its share first. A bond with an infinite
    share is as large as is of use, whatever the budget. If the least ranks exceed the budget, they are the result.
    """

    def fits(ranks: Ranks) -> bool:
        return count_parameters(cores, {**dims, **ranks}) <= budget

    def is_useful(ranks: Ranks) -> bool:
        return useful_ranks(cores, dims, ranks, limit) == ranks

    def proportional(scale: int) -> Ranks:
        return proportional_ranks(cores, dims, shares, limit, scale)

    low, high = 1, 2
    while fits(proportional(high)) and proportional(high) != proportional(low):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(proportional(middle)) else (low, middle)
    ranks: Ranks | None = proportional(low)
    while ranks is not None:
        largest = ranks
        by_share = sorted(ranks, key=lambda bond: largest[bond] / shares[bond])
        raised = ({**largest, bond: largest[bond] + 1} for bond in by_share)
        ranks = next((one for one in raised if fits(one) and is_useful(one)), None)
    return largest
