"""Where block terms lie: the column spaces of the blocks of a weight, by linear algebra.

The slices of a weight of b blocks, one for each kernel position k, are M_k = A diag(G_1k, ..., G_bk) Cᵀ. If A = [A_1,
..., A_b] and C have full column rank, then Z M_k = M_k Y for all k is solved by Z = A diag(z_1 I, ..., z_b I) A⁺ with
any z, and by Yᵀ = C diag(z_1 I, ..., z_b I) C⁺, and for generic blocks by nothing else: endomorphisms of an algebra of
matrices are scalars on its irreducible parts (Maehara, Murota, "Algorithm for error-controlled simultaneous
block-diagonalization of matrices", SIAM J. Matrix Anal. Appl. 2011). The eigenspaces of a random solution are the
blocks' column spaces. For a weight that is only near such a one the equations are solved by least squares.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

__all__ = ["block_spaces"]

# Unknowns, whose matrix of equations is solved densely.
_MOST_UNKNOWNS = 3000


def block_spaces(tensor: Tensor, blocks: int, p: int, q: int) -> tuple[Tensor, Tensor] | None:
    """Orthonormal bases (blocks, out, p) and (blocks, in, q) of the spaces of each block.

    Args:
        tensor: (out, in, *kernel), of float64.
        blocks: how many.
        p: dimension of a block's space of outputs.
        q: dimension of a block's space of inputs.

    Returns:
        None if the spaces of all blocks together are larger than those of the channels, or too large to compute with.
    """
    total_p, total_q = blocks * p, blocks * q
    unknowns = total_p**2 + total_q**2
    slices = tensor.flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(-1)
    rows, columns = slices.flatten(1), slices.transpose(0, 1).flatten(1)
    if total_p > min(rows.shape) or total_q > min(columns.shape) or unknowns > _MOST_UNKNOWNS:
        return None
    left = torch.linalg.svd(rows, full_matrices=False).U[:, :total_p]
    right = torch.linalg.svd(columns, full_matrices=False).U[:, :total_q]
    compressed = torch.einsum("oik,op,iq->kpq", slices, left, right)
    z, y = _commuting(compressed, blocks)
    return left @ _eigenspaces(z, p), right @ _eigenspaces(y.mT, q)


def _commuting(slices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A random Z (P, P) and Y (Q, Q) among the ``count`` pairs with least sum over k of |Z M_k - M_k Y|²."""
    _, p, q = slices.shape
    identity_p, identity_q = torch.eye(p).to(slices), torch.eye(q).to(slices)
    gram_p, gram_q = torch.einsum("kpq,kPq->pP", slices, slices), torch.einsum("kpq,kpQ->qQ", slices, slices)
    mixed = -torch.einsum("kpq,kac->apcq", slices, slices).reshape(p * p, q * q)
    top = torch.cat([torch.kron(identity_p, gram_p), mixed], 1)
    bottom = torch.cat([mixed.mT, torch.kron(gram_q, identity_q)], 1)
    equations = torch.cat([top, bottom]).cpu().numpy()
    random = np.random.default_rng(0)
    # Just below zero, where the matrix that is inverted is definite.
    shift = -1e-10 * np.trace(equations) / len(equations)
    _, solutions = eigsh(equations, k=count, sigma=shift, v0=random.standard_normal(len(equations)))
    mix = torch.from_numpy(solutions @ random.standard_normal(count)).to(slices)
    return mix[: p * p].reshape(p, p), mix[p * p :].reshape(q, q)


def _eigenspaces(matrix: Tensor, size: int) -> Tensor:
    """Orthonormal bases (n / size, n, size) of the eigenspaces, in the order of the eigenvalues' real parts."""
    values, vectors = torch.linalg.eig(matrix)
    spaces = vectors[:, values.real.argsort()].unflatten(1, (-1, size)).movedim(1, 0)
    # An eigenvalue of several dimensions is computed as several, and some of them as conjugate pairs.
    real = torch.cat([spaces.real, spaces.imag], 2)
    bases: Tensor = torch.linalg.svd(real, full_matrices=False).U
    return bases[..., :size]
