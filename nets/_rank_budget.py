"""Ranks of the low-rank layers of a model: one budget over all of them, met by one threshold on their spectra.

A term of a layer's singular value decomposition holds a share of the layer's energy: its squared singular value over
the sum of all. For white inputs the shares that are kept are what the outputs keep of their energy, and from layer to
layer they multiply. So terms are taken, from all layers at once, in the order of what they add to the sum of the
logarithms of what layers keep, per unit of cost: this sum is then the largest possible, but for what is left over of
the budget. Shares, and not singular values, are compared: the scale of a layer does not say how much it matters.
Without the logarithms, low budgets would leave small layers whole and large ones with nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RankCost", "Spectrum", "energy_shares", "rank_for_energy", "ranks_within_budget"]

#: A share of the energy that is lost in the rounding of weights in float32.
_ROUNDING = 1e-12


class RankCost(NamedTuple):
    """What a layer costs dense, and what each unit of its rank costs: parameters or multiplications."""

    dense: int
    per_rank: int

    @property
    def most(self) -> int:
        """The highest rank that costs less than the dense layer; 0 if none does."""
        return (self.dense - 1) // self.per_rank


class Spectrum:
    """A layer as the budget sees it.

    Args:
        shares: of the terms of its matrix, largest first: what `energy_shares` returns.
        cost: of its ranks.
    """

    def __init__(self, shares: Sequence[float], cost: RankCost) -> None:
        self.shares, self.cost = shares, cost
        self._kept = list(accumulate(shares))

    def worth_of_term_after(self, rank: int) -> float:
        """What the next term adds to the logarithm of the share kept, per cost; 0 if it is none or rounding."""
        if rank >= len(self.shares) or self.shares[rank] <= _ROUNDING:
            return 0.0
        return math.log1p(self.shares[rank] / self._kept[rank - 1]) / self.cost.per_rank


@torch.no_grad()
def energy_shares(matrix: Tensor) -> Tensor:
    """Squared singular values over their sum, decreasing, in float64: (min(rows, columns),); zeros for a zero matrix.

    From the smaller Gram matrix: what it rounds away is 1e-16 of the energy.

    Args:
        matrix: (rows, columns), or (groups, rows, columns), whose shares are added up: a unit of rank is one in each
            group.

    Raises:
        ValueError: NaN or infinite entries.
    """
    wide = matrix.detach().double()
    if not wide.isfinite().all():
        raise ValueError("weight must be finite, got NaN or infinite entries")
    wide = wide / wide.abs().amax().clamp(min=torch.finfo(wide.dtype).tiny)  # squares neither overflow nor vanish
    rows, columns = wide.shape[-2:]
    gram = wide @ wide.mT if rows <= columns else wide.mT @ wide
    energies = torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)
    energies = energies.reshape(-1, energies.shape[-1]).sum(0).cpu()
    shares: Tensor = energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)
    return shares


def rank_for_energy(shares: Tensor, energy: float) -> int:
    """The least rank, from 1, that keeps a fraction of the energy, to the rounding of float32; 1 for a zero matrix.

    Args:
        shares: of `energy_shares`.
        energy: in (0, 1].
    """
    kept = shares.cumsum(0)
    return min(int((kept < energy * kept[-1] - _ROUNDING).sum()) + 1, len(shares))


def ranks_within_budget(layers: Mapping[str, Spectrum], allowed: int, unit: str = "element") -> dict[str, int | None]:
    """The rank of each layer, None for one that stays dense, such that together they cost no more than allowed.

    Every layer begins with rank 1. Then terms are bought in the order of log((kept + share) / kept) per cost, each if
    what is left of the budget pays for it; a layer whose next term is too dear is done, and others go on. A layer whose
    next term would make it no cheaper than the dense one becomes dense in that term's turn.

    Args:
        layers: by name.
        allowed: in the unit of their costs.
        unit: its name.

    Raises:
        ValueError: less is allowed than all layers cost at rank 1, those dense for which that saves nothing.
    """
    ranks: dict[str, int | None] = {name: 1 if layer.cost.most >= 1 else None for name, layer in layers.items()}
    left = allowed - sum(_price(layers[name].cost, rank) for name, rank in ranks.items())
    if left < 0:
        raise ValueError(f"budget allows {allowed:,} {unit}s, but the layers have {allowed - left:,} at rank 1")
    offers: list[tuple[float, int, str]] = []
    order = {name: position for position, name in enumerate(layers)}  # of equal terms the first

    def offer(name: str, rank: int | None) -> None:
        if rank is not None and (worth := layers[name].worth_of_term_after(rank)) > 0:
            heapq.heappush(offers, (-worth, order[name], name))

    for name, rank in ranks.items():
        offer(name, rank)
    while offers:
        *_, name = heapq.heappop(offers)
        cost, rank = layers[name].cost, ranks[name]
        higher = rank + 1 if rank is not None and rank < cost.most else None
        price = _price(cost, higher) - _price(cost, rank)
        if price <= left:
            ranks[name], left = higher, left - price
            offer(name, higher)
    return ranks


def _price(cost: RankCost, rank: int | None) -> int:
    return cost.dense if rank is None else cost.per_rank * rank
