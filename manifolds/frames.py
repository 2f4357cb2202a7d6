"""Orthonormal frames: ``p`` vectors of length ``n``, the columns of a tall or the rows of a wide matrix.

Every formula is written for columns, ``X`` of shape (n, p) with ``XᵀX = I``. ``rows=True`` evaluates the same
formula on ``Xᵀ`` as it lies in memory, so that results come out contiguous in the layout of the input: a
column-major result would slow down every later elementwise operation. One leading batch dimension is allowed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "add_mix",
    "cholesky_q",
    "gram",
    "householder_q",
    "identity_like",
    "mix",
    "polar_factor",
    "polish",
    "q_factor",
    "svd_polar_factor",
]

# Below this distance of YᵀY from I, cond(Y)² <= 3 and one Cholesky pass is as orthonormal as Householder QR.
_NEAR_IDENTITY = 0.5


def gram(a: Tensor, b: Tensor, rows: bool) -> Tensor:
    """Inner products of two frames' vectors: ``aᵀb``, shape (p, p)."""
    return a @ b.mT if rows else a.mT @ b


def mix(a: Tensor, s: Tensor, rows: bool) -> Tensor:
    """Combine a frame's vectors: ``a s``, with ``s`` of shape (p, p)."""
    return s.mT @ a if rows else a @ s


def add_mix(c: Tensor, a: Tensor, s: Tensor, rows: bool, *, alpha: float, beta: float = 1.0) -> Tensor:
    """``beta * c + alpha * a s`` in one pass of the matrix product."""
    left, right = (s.mT, a) if rows else (a, s)
    fused = torch.addmm if c.ndim == 2 else torch.baddbmm
    return fused(c, left, right, beta=beta, alpha=alpha)


def identity_like(s: Tensor) -> Tensor:
    """The (p, p) identity in the dtype and on the device of ``s``, without batch dimensions."""
    return torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)


def polish(x: Tensor, rows: bool) -> Tensor:
    """One Newton-Schulz step ``x (3I - xᵀx) / 2`` to the polar factor: an error e of xᵀx becomes 3e²/4."""
    return add_mix(x, x, gram(x, x, rows), rows, alpha=-0.5, beta=1.5)


def polar_factor(y: Tensor, rows: bool) -> Tensor:
    """The orthonormal frame nearest to ``y``: ``y (yᵀy)^(-1/2)``, through the p x p eigenvalues of ``yᵀy``.

    Where their spread would cost more digits than `polish` restores, through the singular values of ``y``.
    """
    values, vectors = torch.linalg.eigh(gram(y, y, rows))
    if not bool((values[..., 0] > math.sqrt(torch.finfo(y.dtype).eps) * values[..., -1]).all()):
        return svd_polar_factor(y, rows)
    inverse_root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return polish(mix(y, inverse_root, rows), rows)


def svd_polar_factor(y: Tensor, rows: bool) -> Tensor:
    """The same for any finite ``y``, of any rank: one of the nearest frames where there are several."""
    left, _, right = torch.linalg.svd(y, full_matrices=False)
    return polish(left @ right, rows)


def q_factor(y: Tensor, rows: bool) -> Tensor:
    """``Q`` of the QR decomposition whose ``R`` has a positive diagonal, for ``y`` of full rank.

    On a CPU one Cholesky pass where that is safe, Householder otherwise. The choice reads a number back from
    the device; elsewhere, where that would synchronise (or break a compiled graph), `cholesky_q` is used.
    """
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return cholesky_q(y, rows)
    products = gram(y, y, rows)
    eye = identity_like(products)
    distance = torch.linalg.vector_norm(products - eye, dim=(-2, -1)).amax()
    if bool(distance <= _NEAR_IDENTITY):
        return _divide_by_cholesky(y, products, eye, rows)
    return householder_q(y, rows)


def cholesky_q(y: Tensor, rows: bool) -> Tensor:
    """The same factor without a branch: shifted Cholesky QR, three passes (Fukaya et al., SISC 2020).

    The shift, of the size of the rounding errors of ``yᵀy``, keeps the first factorization positive definite;
    the two other passes remove it. Orthonormal to rounding for cond(y) up to about 1 / (10 eps).
    """
    for shifted in (True, False, False):
        products = gram(y, y, rows)
        eye = identity_like(products)
        if shifted:
            trace = products.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            products = products + torch.finfo(y.dtype).eps * trace * eye
        y = _divide_by_cholesky(y, products, eye, rows)
    return y


def _divide_by_cholesky(y: Tensor, products: Tensor, eye: Tensor, rows: bool) -> Tensor:
    """``y R⁻¹`` with ``RᵀR = products``; a product with R⁻¹ beats a triangular solve, and is row-major."""
    lower, _ = torch.linalg.cholesky_ex(products)
    return mix(y, torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT, rows)


def householder_q(y: Tensor, rows: bool) -> Tensor:
    """The same factor by Householder reflections: safe for any condition, several times slower."""
    q, r = torch.linalg.qr(y.mT if rows else y)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(y.dtype)
    q = q * sign.unsqueeze(-2)
    frame: Tensor = q.mT if rows else q
    return frame.contiguous()
