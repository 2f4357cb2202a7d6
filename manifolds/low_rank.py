"""Matrices ``U diag(s) Vᵀ`` that are never formed: their velocities, and singular value decompositions from factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .frames import householder_q, identity_like, q_factor
from .triplets import Triplets

__all__ = ["Triplets", "pair_weights", "reciprocal", "svd_of_product", "svd_of_update"]


def pair_weights(s: Tensor) -> Tensor:
    """``s_j / (s_i² + s_j²)`` off the diagonal; zero on it, and where both values are zero."""
    length = torch.hypot(s.unsqueeze(-1), s)
    zero = length < torch.finfo(s.dtype).tiny
    return (s / length / length).masked_fill(zero, 0.0).fill_diagonal_(0.0)


def reciprocal(s: Tensor) -> Tensor:
    """``1 / s``; 0 where ``s`` is zero, or so small that it has no finite reciprocal."""
    return torch.where(s < torch.finfo(s.dtype).tiny, 0.0, 1 / s)


def svd_of_product(x: Tensor, s: Tensor, y: Tensor, *, near_orthonormal: bool = False) -> Triplets:
    """Singular triplets of ``x diag(s) yᵀ``, shapes (m, r), (r,), (n, r), descending; any finite factors.

    Two QR decompositions and an r x r SVD. Frames of a product of lower rank are completed to orthonormal ones.
    ``near_orthonormal=True`` says that ``x`` and ``y`` probably are: it saves time then, and costs little if not.
    """
    # Away from the CPU `q_factor` does not look, and fails where a column is nearly a combination of others.
    factor = q_factor if near_orthonormal and x.is_cpu else householder_q
    left, right = factor(x, False), factor(y, False)
    a, sigma, bt = torch.linalg.svd((left.mT @ x * s) @ (right.mT @ y).mT)
    return left @ a, sigma, right @ bt.mT


def svd_of_update(left: Tensor, middle: Tensor, right: Tensor, x: Tensor, y: Tensor) -> Triplets:
    """The ``r`` leading singular triplets of ``U middle Vᵀ + x Vᵀ + U yᵀ``, of rank 2 r, where Uᵀx = 0 and Vᵀy = 0.

    With x = Q R and y = P T it is [U Q] K [V P]ᵀ, with a 2r x 2r matrix K whose lower left block is R. For singular
    vectors (a, b) and (c, d) of K, sigma b = R c: those of the whole are U a + x c / sigma and V c + y a / sigma. So
    neither Q nor P is needed, which saves half of the QR decompositions. Dividing by sigma costs the digits by which
    the largest value exceeds it. A Newton-Schulz step restores up to half of all; where more are lost, QR
    decompositions of [U x] and [V y] give the frames.

    Source: Vandereycken, SIOPT 2013, section 3 (the 2r x 2r matrix).
    """
    r = middle.shape[0]
    core = middle.new_zeros(2 * r, 2 * r)
    core[:r, :r] = middle
    core[:r, r:] = torch.linalg.qr(y, mode="r").R.mT
    core[r:, :r] = torch.linalg.qr(x, mode="r").R
    a, sigma, ct = torch.linalg.svd(core)
    a, sigma, c = a[:r, :r], sigma[:r], ct[:r, :r].mT
    u, v = _polished((left @ a).addmm_(x, c / sigma)), _polished((right @ c).addmm_(y, a / sigma))
    if u is None or v is None:
        return _svd_of_update_by_qr(left, middle, right, x, y)
    return u, sigma, v


def _polished(frame: Tensor) -> Tensor | None:
    """The frame made orthonormal to rounding; None if it has lost more than half of its digits."""
    products = frame.mT @ frame
    error = torch.linalg.vector_norm(products - identity_like(products))
    if not bool(error <= math.sqrt(torch.finfo(frame.dtype).eps)):  # NaN too
        return None
    return torch.addmm(frame, frame, products, beta=1.5, alpha=-0.5)


def _svd_of_update_by_qr(left: Tensor, middle: Tensor, right: Tensor, x: Tensor, y: Tensor) -> Triplets:
    r = middle.shape[0]
    q_left, r_left = torch.linalg.qr(torch.cat((left, x), dim=1))
    q_right, r_right = torch.linalg.qr(torch.cat((right, y), dim=1))
    of_left, of_right = r_left[:, :r], r_right[:, :r]
    core = (of_left @ middle + r_left[:, r:]) @ of_right.mT + of_left @ r_right[:, r:].mT
    a, sigma, ct = torch.linalg.svd(core, full_matrices=False)
    return q_left @ a[:, :r], sigma[:r], q_right @ ct[:r].mT
