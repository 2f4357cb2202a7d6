"""The row space of a low-rank layer that is best for its function, globally, for a small rank: a reference.

With V an orthonormal basis of the row space and rho_i = |Vᵀw_i| / |w_i| the layer's relative error, with the best left
factor, is 1 - F(V), F(V) = sum_i |w_i|² kappa_a(rho_i)² / |W|² (`retract.nets.init.arc_cosine`). A polynomial-time
argument for fixed rank r and accuracy:

1. kappa_a² has slopes in [0, 2], so projecting the rows on the k leading right singular vectors changes F by at most
   2 (sum of the r squared singular values after the k-th)^½ / |W| <= 2 (r / (k + 1))^½. Of the projected rows the best
   row space lies in those k dimensions, where F is as before: k depends on the accuracy, not on the layer's size.
2. A subspace of k dimensions is the graph of a matrix B, (k - r, r), over the r coordinates where its minor is
   largest, and then B has entries in [-1, 1]. The graph of B + D makes angles with that of B whose sines are at most
   |D|. So on a cell, a box of matrices, no row is nearer to the row space than to that of the center by more than this
   angle, which bounds F there.
3. Cells are halved until no bound exceeds the best value found by more than the accuracy. That ends when |D| is about
   half the accuracy everywhere: a net, made fine only where the optimum may be.

The cost is one SVD and O(out k r) a cell. Cells are at worst of the order of
binomial(k, r) (4 sqrt(r (k - r)) / accuracy)^(r (k - r)): polynomial in the layer's size at a fixed accuracy, and out
of reach beyond a few dimensions k. To initialize layers is the task of local search; this tells how far it ends from
the optimum.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._filter_lengths import cosines
from ._variable_projection import variable_projection
from .arc_cosine import kernel

__all__ = ["FixedRankSearch", "fixed_rank_search"]

#: Iterations of the local search from the best cell so far: it converges long before.
_LOCAL_ITERATIONS = 100
#: Entries of a temporary, by which many cells are visited in parts.
_TEMPORARY = 1 << 21


class FixedRankSearch(NamedTuple):
    """What `fixed_rank_search` found.

    Attributes:
        basis: V, shape (fan_in, rank), orthonormal columns, in float64.
        error: the layer's relative error with this row space and the left factor that is best for it.
        gap: no layer of this rank has an error below ``error - gap``; at most the accuracy asked for.
        dimension: k, of the space that was searched.
        cells: number of cells visited.
    """

    basis: Tensor
    error: float
    gap: float
    dimension: int
    cells: int


@torch.no_grad()
def fixed_rank_search(
    weight: Tensor, rank: int, accuracy: float, *, slope: float = 0.0, max_cells: int = 1_000_000
) -> FixedRankSearch:
    """A row space whose relative error exceeds the least possible one by at most ``accuracy``, with its proof.

    Args:
        weight: matrix W, shape (out, fan_in), computed in float64.
        rank: dimension r of the row space, from 1 to min(out, fan_in).
        accuracy: of the error of the function relative to (1 + slope²)/2 |W|²; in (0, 1).
        slope: of the leaky ReLU.
        max_cells: most cells to visit. What needs more is refused, after at most that work.

    Raises:
        ValueError: an argument out of range, NaN in the weight, a zero weight, or more cells than ``max_cells``.
    """
    if not 0 < accuracy < 1:
        raise ValueError(f"accuracy must be in (0, 1), got {accuracy}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    matrix = weight.detach().double()
    start = variable_projection(matrix, rank, slope=slope, iterations=_LOCAL_ITERATIONS)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if not bool(values[0] > 0):
        raise ValueError("weight is zero: no error is relative to it")
    values = values / values[0]  # squares of tiny or huge ones would be lost
    values = values / torch.linalg.vector_norm(values)
    dimension, tail = _leading_dimension(values, rank, accuracy)
    search = _Search(left * values, rank, dimension, slope)
    search.offer(right @ start)
    try:
        search.run(accuracy - tail, max_cells)
    except _TooManyCellsError:
        raise ValueError(
            f"accuracy={accuracy} takes more than max_cells={max_cells} cells for this weight: subspaces of dimension "
            f"{rank} in {dimension} dimensions have {rank * (dimension - rank)} parameters; allow a larger accuracy"
        ) from None
    gap = max(0.0, search.bound + tail - search.energy)
    return FixedRankSearch(right.mT @ search.basis, 1 - search.energy, gap, dimension, search.cells)


def _leading_dimension(values: Tensor, rank: int, accuracy: float) -> tuple[int, float]:
    """Least k whose change of F is at most half the accuracy, and that change; ``values`` have unit norm."""
    squares = torch.nn.functional.pad(values.square(), (0, rank))
    changes = 2 * squares.unfold(0, rank, 1).sum(-1).sqrt()
    dimension = max(rank, int((changes > accuracy / 2).sum()))
    return dimension, float(changes[dimension])


class _TooManyCellsError(Exception):
    """The next level would visit more than allowed."""


class _Search:
    """Subspaces of the first k coordinates of the rows, |W| = 1; those offered may be of all coordinates.

    Attributes:
        basis, energy: the best V so far, shape (coordinates, rank), and F there.
        bound: no subspace of the cells that have been settled has an F above it.
        cells: number of cells visited.
    """

    def __init__(self, rows: Tensor, rank: int, dimension: int, slope: float) -> None:
        self.rows, self.rank, self.dimension, self.slope = rows, rank, dimension, slope
        self.norms = torch.linalg.vector_norm(rows, dim=1)
        self.basis, self.energy, self.bound, self.cells = rows.new_zeros(rows.shape[1], rank), 0.0, 0.0, 0

    def offer(self, basis: Tensor) -> None:
        """Take a basis if it is better than the best so far."""
        energy = float(self._energy(torch.linalg.vector_norm(self.rows @ basis, dim=1)))
        if energy > self.energy:
            self.basis, self.energy = basis, energy

    def run(self, accuracy: float, max_cells: int) -> None:
        """Visit cells level by level, all of one shape, until each is settled to the accuracy."""
        k, r = self.dimension, self.rank
        if math.comb(k, r) > max_cells:
            raise _TooManyCellsError
        chosen = itertools.combinations(range(k), r)
        orders = torch.tensor([[*pivots, *sorted({*range(k)} - {*pivots})] for pivots in chosen])
        orders = orders.to(self.rows.device)
        centers = self.rows.new_zeros(len(orders), k - r, r)
        half_widths = torch.ones_like(centers[0])
        while len(orders):
            self.cells += len(orders)
            if self.cells > max_cells:
                raise _TooManyCellsError
            energies, bounds = self._visit(orders, centers, half_widths)
            best = int(energies.argmax())
            if float(energies[best]) > self.energy:
                self._improve(orders[best], centers[best])
            settled = bounds <= self.energy + accuracy
            self.bound = max(self.bound, float(torch.where(settled, bounds, 0.0).amax()))
            orders, centers, half_widths = _halves(orders[~settled], centers[~settled], half_widths)

    def _visit(self, orders: Tensor, centers: Tensor, half_widths: Tensor) -> tuple[Tensor, Tensor]:
        """F at the centers of the cells, and bounds of F on the cells."""
        at_once = max(1, _TEMPORARY // (self.rows.shape[0] * self.dimension))
        pairs = zip(orders.split(at_once), centers.split(at_once), strict=True)
        energies, bounds = zip(*(self._visit_part(*pair, half_widths) for pair in pairs), strict=True)
        return torch.cat(energies), torch.cat(bounds)

    def _visit_part(self, orders: Tensor, centers: Tensor, half_widths: Tensor) -> tuple[Tensor, Tensor]:
        """The graph of B is spanned by X = [I; B]. A row w is X (XᵀX)^-1 Xᵀw along it, of length |(XᵀX)^-½ Xᵀw|.

        A unit vector X z of it is at most |D z| from the graph of B + D, and |z|² is at most 1 over the least
        eigenvalue of XᵀX: the sine of the angle between the two is at most |D| over the root of that eigenvalue.
        """
        ordered = self.rows[:, orders].movedim(1, 0)
        products = ordered[..., : self.rank] + ordered[..., self.rank :] @ centers
        eye = torch.eye(self.rank, dtype=centers.dtype, device=centers.device)
        values, vectors = torch.linalg.eigh(eye + centers.mT @ centers)
        lengths = torch.linalg.vector_norm(products @ vectors / values.sqrt().unsqueeze(-2), dim=-1)
        sine = torch.linalg.vector_norm(half_widths) / values[:, :1].sqrt()
        angles = torch.acos(cosines(self.norms, lengths)) - torch.asin(sine.clamp(max=1))
        return self._energy(lengths), self._energy(self.norms * torch.cos(angles.clamp(min=0)))

    def _energy(self, lengths: Tensor) -> Tensor:
        """F, from the lengths of the rows' projections, shape (..., out)."""
        energy: Tensor = (self.norms * kernel(cosines(self.norms, lengths), self.slope)).square().sum(-1)
        return energy

    def _improve(self, order: Tensor, center: Tensor) -> None:
        """Offer the center of a cell, and where local search leads from there."""
        spanning = torch.cat((torch.eye(self.rank, dtype=center.dtype, device=center.device), center))
        basis = torch.zeros_like(self.basis).index_copy(0, order, torch.linalg.qr(spanning)[0])
        self.offer(basis)
        self.offer(
            variable_projection(self.rows, self.rank, slope=self.slope, start=basis, iterations=_LOCAL_ITERATIONS)
        )


def _halves(orders: Tensor, centers: Tensor, half_widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the cells in two across a longest edge."""
    if not len(orders):
        return orders, centers, half_widths
    edge = torch.zeros_like(half_widths)
    edge.view(-1)[half_widths.argmax()] = half_widths.amax() / 2
    return orders.repeat(2, 1), torch.cat((centers - edge, centers + edge)), half_widths - edge
