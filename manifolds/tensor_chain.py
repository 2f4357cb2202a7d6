"""Orthonormal frames as chains of tensor-train cores.

A frame of shape (n_1 ... n_D, r) is a product of D cores. Core k, of shape (R_{k-1}, n_k, R_k) with R_0 = 1 and
R_D = r, is stored as the matrix (R_{k-1} n_k, R_k), rows counted row-major: "matricized". Cores with orthonormal
columns make a frame with orthonormal columns (Obukhov et al., AISTATS 2021, proposition 1). The last core is the
middle one, next to the singular values; the others are the outer cores.

A square outer core is an orthogonal matrix, which its neighbour can absorb: up to gauge it is the identity. It
holds no freedom and never moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import frames
from .tensor_ranks import Shapes, chain_shapes
from .triplets import Triplets

__all__ = [
    "Cores",
    "Train",
    "absorb",
    "canonical",
    "canonical_center",
    "evenly_spread",
    "fit",
    "frame",
    "horizontal",
    "is_square",
    "moved",
    "orthonormal",
    "random_outer",
    "rotate",
]

Cores = tuple[Tensor, ...]


class Train(NamedTuple):
    """Two chains that meet at singular values: a point of `STTP`, or a tangent vector in the same shapes."""

    left: Cores
    values: Tensor
    right: Cores

    @classmethod
    def of(cls, left: Cores, center: Triplets, right: Cores) -> Train:
        """From outer cores and the center."""
        u, s, v = center
        return cls((*left, u), s, (*right, v))

    @property
    def sides(self) -> tuple[Cores, Cores]:
        """The chain of the row modes and that of the column modes."""
        return self.left, self.right

    @property
    def center(self) -> Triplets:
        """The middle cores and the values: a point of `SVDSpectral`, or a vector there."""
        return self.left[-1], self.values, self.right[-1]

    def with_center(self, center: Triplets) -> Train:
        """The same outer cores with another center."""
        return Train.of(self.left[:-1], center, self.right[:-1])

    def factors(self, dtype: torch.dtype) -> Cores:
        """All tensors in order."""
        return tuple(t.to(dtype) for t in (*self.left, self.values, *self.right))


def frame(cores: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """Contract a chain of matricized cores, each (R_{k-1} n_k, R_k), into the matrix (n_1 ... n_D, R_D).

    Raises:
        ValueError: the cores do not fit together, or not the modes.
    """
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != chain_shapes(modes, [shape[-1] for shape in shapes]):
        raise ValueError(f"cores of shapes {shapes} do not form a chain over modes {tuple(modes)}")
    product = cores[0]
    for core in cores[1:]:
        product = (product @ core.reshape(product.shape[1], -1)).reshape(-1, core.shape[1])
    return product


def absorb(matrix: Tensor, core: Tensor) -> Tensor:
    """Apply a matrix (p, R_{k-1}) to the left bond of a core (R_{k-1} n_k, R_k): ``(matrix ⊗ I) core``."""
    return (matrix @ core.reshape(matrix.shape[1], -1)).reshape(-1, core.shape[1])


def is_square(core: Tensor) -> bool:
    """Whether an outer core is a mere rotation of its right bond."""
    return core.shape[0] == core.shape[1]


# ------------------------------------------------------------------------------------------------------------ gauge


def rotate(cores: Cores, rotations: Sequence[Tensor]) -> Cores:
    """Insert ``Q Qᵀ`` at the bonds: core k becomes ``(Q_{k-1}ᵀ ⊗ I) core Q_k`` (proposition 2); the frame stays."""
    *outer, middle = cores
    turned = [*(core @ q for core, q in zip(outer, rotations, strict=True)), middle]
    return (turned[0], *(absorb(q.mT, core) for q, core in zip(rotations, turned[1:], strict=True)))


def canonical(cores: Cores) -> Cores:
    """The same frame from outer cores whose leading R_k x R_k block is upper triangular with diagonal >= 0.

    Unique where those blocks have full rank. Square cores become the identity.
    """
    result, carried = [], cores[0]
    for following in cores[1:]:
        rank = carried.shape[1]
        rotation = _upper_rotation(carried[:rank])
        turned = carried @ rotation
        result.append(torch.cat((turned[:rank].triu(), turned[rank:])))
        carried = absorb(rotation.mT, following)
    return (*result, carried)


def canonical_center(center: Triplets, *, triangular: bool) -> Triplets:
    """The same matrix with s descending and, per column of U, a positive entry of largest magnitude.

    With ``triangular=True``, where all singular values agree, a leading block of U as in `canonical` instead.
    """
    u, s, v = center
    if triangular:
        turn = _upper_rotation(u[: len(s)])
        return u @ turn, s, v @ turn
    s, order = s.sort(descending=True, stable=True)
    u, v = u[:, order], v[:, order]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, v * sign


def _upper_rotation(block: Tensor) -> Tensor:
    """The orthogonal ``Q`` for which ``block Q`` is upper triangular with a diagonal >= 0 (RQ decomposition)."""
    # Read from the last row to the first, the transposed block has a QR decomposition with the same Q, reversed.
    q, r = torch.linalg.qr(block.flip(0).mT)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(block.dtype)
    rotation: Tensor = (q * sign).flip(1)
    return rotation


def orthonormal(cores: Cores) -> Cores:
    """The same frame with orthonormal outer cores, from any finite ones: the rest goes into the middle core."""
    result, carried = [], cores[0]
    for following in cores[1:]:
        core = frames.svd_polar_factor(carried, False)
        result.append(core)
        carried = absorb(core.mT @ carried, following)
    return (*result, carried)


def horizontal(cores: Cores, velocities: Cores) -> Cores:
    """The same velocity of the frame with ``coreᵀ velocity = 0`` at the outer cores: the rest moves inward."""
    result, carried = [], velocities[0]
    for core, following, velocity in zip(cores, cores[1:], velocities[1:], strict=False):
        turn = core.mT @ carried
        result.append(torch.zeros_like(core) if is_square(core) else carried - core @ turn)
        carried = velocity + absorb(turn, following)
    return (*result, carried)


def moved(cores: Cores, velocities: Cores) -> Cores:
    """The outer cores one horizontal step further: the orthonormal ones nearest to ``core + velocity``.

    Polar factors, since those turn with the gauge, which Q factors of QR do not.
    """
    pairs = list(zip(cores, velocities, strict=True))[:-1]
    return tuple(core if is_square(core) else frames.polar_factor(core + step, False) for core, step in pairs)


# ----------------------------------------------------------------------------------------------------- construction


def fit(matrix: Tensor, shapes: Shapes) -> tuple[Cores, Tensor]:
    """Outer cores for a matrix (n_1 ... n_D, q) by TT-SVD: sequential truncated SVDs, up to the middle core.

    Returns:
        Those D - 1 cores, and what remains for the middle: the matrix contracted with them, (R_{D-1} n_D, q).

    Source: Oseledets, SIAM J. Sci. Comput. 2011, algorithm 1.
    """
    cores, rest = [], matrix
    for rows, rank in shapes[:-1]:
        rest = rest.reshape(rows, -1)
        if rows == rank:
            cores.append(torch.eye(rank, dtype=matrix.dtype, device=matrix.device))
            continue
        core = torch.linalg.svd(rest, full_matrices=False).U[:, :rank].contiguous()
        cores.append(core)
        rest = core.mT @ rest
    return tuple(cores), rest.reshape(shapes[-1][0], matrix.shape[1])


def random_outer(shapes: Shapes, **options: Any) -> Cores:
    """Outer cores, uniform on their Stiefel manifolds; square ones are the identity, the frame is as random.

    ``options`` are dtype, device and generator of `torch.randn`.
    """
    draws = (torch.randn(shape, **options) for shape in shapes[:-1])
    return tuple(torch.eye(*t.shape).to(t) if is_square(t) else frames.householder_q(t, False) for t in draws)


def evenly_spread(shapes: Shapes, **options: Any) -> Cores:
    """Sparse orthonormal cores, the identity where square, of chains and trains that have their full ranks.

    As (R_{k-1}, n_k R_k), too, every core has orthogonal rows, none zero: each index of the wider bond has one entry,
    spread evenly over those of the other. The first columns of the identity would lose rank there. ``options`` are
    dtype and device.
    """
    cores, left = [], 1
    for rows, right in shapes:
        more, fewer = max(left, right), min(left, right)
        index = torch.arange(more)
        group = index * fewer // more
        place = index - (group * more + fewer - 1) // fewer  # counted from the group's first index
        core = torch.zeros(left, rows // left, right, **options)
        core[index * left // more, place, index * right // more] = 1
        core = core.reshape(rows, right)
        cores.append(core / torch.linalg.vector_norm(core, dim=0))
        left = right
    return tuple(cores)
