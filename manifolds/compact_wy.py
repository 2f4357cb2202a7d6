"""Products of Householder reflections in compact form: value, gradient and derivative.

The reflections ``I - 2 h_i h_iᵀ / |h_i|²`` with h_i the columns of ``H`` (n, p), a unit lower triangular block ``L``
above a block ``B``, multiply to ``I + H S⁻¹ Hᵀ`` with ``S = -striu(HᵀH) - diag(HᵀH) / 2`` (Joffrain et al., ACM TOMS
2006). The first p columns of that are the frame ``U = I + H N`` with ``S N = Lᵀ``: two products of the frame's size,
and three for its gradient.

Everywhere ``lower`` is L, or None where it is the identity; blocks are (n, p) matrices or batches of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "accumulate",
    "adjoint",
    "assign",
    "combine",
    "compact_form",
    "compact_system",
    "derivative",
    "frame",
    "gradient",
    "identity_like",
    "times",
]


def compact_system(products: Tensor) -> Tensor:
    """``S`` from ``-HᵀH``."""
    system = products.triu()
    system.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return system


def compact_form(lower: Tensor | None, bottom: Tensor) -> tuple[Tensor, Tensor]:
    """``S`` and ``N``, upper triangular.

    Systems are solved from the right, as ``Nᵀ Sᵀ = L``: for row-major matrices that takes half the time.
    """
    products = identity_like(bottom) if lower is None else lower.mT @ lower
    system = compact_system(combine(products, bottom.mT, bottom, beta=-1, alpha=-1))
    if lower is None:  # S N = I, and so is N S
        return system, torch.linalg.solve_triangular(system, products.expand_as(system), upper=True, left=False)
    return system, torch.linalg.solve_triangular(system.mT, lower, upper=False, left=False).mT


def frame(lower: Tensor | None, bottom: Tensor) -> Tensor:
    """``I + H N``."""
    _, mixing = compact_form(lower, bottom)
    return torch.cat((times(lower, mixing) + identity_like(mixing), bottom @ mixing), dim=-2)


def adjoint(
    lower: Tensor | None, bottom: Tensor, system: Tensor | None, mixing: Tensor, top: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """What a gradient ``G`` of the frame, in blocks ``top`` and ``rest``, does to the p x p matrices.

    Returns:
        ``Y = S⁻ᵀ HᵀG``, the gradient with respect to ``Lᵀ`` in ``S N = Lᵀ``; and ``M``, symmetric, with the upper
        triangle of ``Y Nᵀ``: the gradient with respect to ``H`` through ``S`` is ``H M``.
    """
    through = combine(times(None if lower is None else lower.mT, top), bottom.mT, rest)
    if lower is None or system is None:
        solved = mixing.mT @ through  # N is the inverse of S
    else:
        solved = torch.linalg.solve_triangular(system, through.mT, upper=True, left=False).mT
    coupling = solved @ mixing.mT
    return solved, coupling.triu() + coupling.triu(1).mT


def gradient(lower: Tensor | None, bottom: Tensor, top: Tensor, rest: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradients with respect to ``L`` (all entries of it) and ``B``: ``G Nᵀ + H M``, and ``Yᵀ`` more for ``L``."""
    system, mixing = compact_form(lower, bottom)
    solved, symmetric = adjoint(lower, bottom, system, mixing, top, rest)
    d_lower = None if lower is None else top @ mixing.mT + lower @ symmetric + solved.mT
    return d_lower, rest @ mixing.mT + bottom @ symmetric


def derivative(lower: Tensor | None, bottom: Tensor, d_lower: Tensor | None, d_bottom: Tensor) -> Tensor:
    """``dU = dH N + H dN`` with ``S dN = dLᵀ - dS N``; ``d_lower`` is strictly lower triangular, None where L is."""
    system, mixing = compact_form(lower, bottom)
    products = bottom.mT @ d_bottom
    if lower is not None and d_lower is not None:
        products = products + lower.mT @ d_lower
    right = compact_system(products + products.mT) @ mixing
    d_mixing = torch.linalg.solve_triangular(system, right if d_lower is None else right + d_lower.mT, upper=True)
    top = times(lower, d_mixing)
    if d_lower is not None:
        top = top + d_lower @ mixing
    return torch.cat((top, d_bottom @ mixing + bottom @ d_mixing), dim=-2)


# -------------------------------------------------------------------------------------------------------- products


def identity_like(square: Tensor) -> Tensor:
    """The identity with as many columns, without batch dimensions."""
    return torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)


def times(left: Tensor | None, right: Tensor) -> Tensor:
    """A product in which None is the identity."""
    return right if left is None else left @ right


def combine(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta c + alpha a b`` in one pass."""
    fused = torch.addmm if a.ndim == 2 else torch.baddbmm
    return fused(c, a, b, beta=beta, alpha=alpha)


def accumulate(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a b`` to ``c``, in its memory."""
    return c.addmm_(a, b) if a.ndim == 2 else c.baddbmm_(a, b)


def assign(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write ``a b`` to the memory of ``c``, whose values are not read."""
    return c.addmm_(a, b, beta=0) if a.ndim == 2 else c.baddbmm_(a, b, beta=0)
