"""Velocities of a chain's outer cores in the metric of the matrix, from derivatives and from other points.

A velocity dW that only core k causes has ``|dW|² = tr(dC_kᵀ dC_k T_k)``, where T_k is the Gram matrix of all that
lies beyond the right bond of core k: the inner cores and the singular values (the factors beyond those are
orthonormal and drop out). So the gradient is ``(I - C_k C_kᵀ) G_k T_k⁻¹`` where G_k is the derivative with respect to
core k (Holtz, Rohwedder, Schneider 2012, section 4; Steinlechner, SISC 2016, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import frames
from .tensor_chain import Cores, absorb, is_square

__all__ = ["Opened", "bond_factors", "contract", "outer_gradients", "riemannian"]

#: For each core of a frame F: core and velocity seen from another frame, as `contract` explains.
Opened = Sequence[tuple[Tensor, Tensor]]


def bond_factors(cores: Cores, values: Tensor) -> list[Tensor | None]:
    """For each outer core a triangular L with ``L Lᵀ = T_k``; None before the first core that moves.

    By QR, and not from the Gram matrices themselves, whose condition is the square.
    """
    outer, first = cores[:-1], _first_moving(cores)
    factors: list[Tensor | None] = [None] * len(outer)
    beyond = cores[-1] * values
    for k in reversed(range(first, len(outer))):
        lower = torch.linalg.qr(beyond.reshape(outer[k].shape[1], -1).mT, mode="r").R.mT
        factors[k] = lower
        beyond = outer[k] @ lower
    return factors


def riemannian(cores: Cores, values: Tensor, derivatives: Cores) -> Cores:
    """Riemannian gradient at the outer cores, from the derivatives with respect to them."""
    result = []
    for core, derivative, factor in zip(cores[:-1], derivatives, bond_factors(cores, values), strict=True):
        if factor is None or is_square(core):
            result.append(torch.zeros_like(core))
        else:
            velocity = _divide_by_gram(derivative, factor)
            result.append(torch.addmm(velocity, core, core.mT @ velocity, alpha=-1))
    return tuple(result)


def _first_moving(cores: Cores) -> int:
    """Place of the first core that is not square, or of the middle one: those before are constant."""
    return next((k for k, core in enumerate(cores[:-1]) if not is_square(core)), len(cores) - 1)


def _divide_by_gram(derivative: Tensor, lower: Tensor) -> Tensor:
    """``G (L Lᵀ)⁻¹``, or its pseudo-inverse where the rank of the bond has dropped: nothing blows up there.

    Products with L⁻¹ take half the time of triangular solves, and are row-major.
    """
    diagonal = lower.diagonal().abs()
    negligible = len(diagonal) * torch.finfo(lower.dtype).eps
    if not bool(diagonal.amin() <= negligible * diagonal.amax()):
        inverse: Tensor = torch.linalg.solve_triangular(lower, frames.identity_like(lower), upper=False)
        return (derivative @ inverse.mT) @ inverse
    vectors, values, _ = torch.linalg.svd(lower)
    scaled: Tensor = vectors * torch.where(values > negligible * values[0], values, torch.inf).reciprocal()
    return (derivative @ scaled) @ scaled.mT


def contract(here: Cores, cores: Cores, velocities: Cores) -> tuple[Opened, tuple[Tensor, Tensor]]:
    """A frame F of ``cores`` and a tangent velocity dF, contracted with another frame H, of the cores ``here``.

    Returns:
        For each core k, in its shape, F and dF with all before core k contracted with H's; then ``HᵀF`` and ``HᵀdF``.
    """
    first = _first_moving(cores)
    shared = next((k for k in range(first) if here[k] is not cores[k]), first)  # a step leaves them as they are
    opened = []
    overlap, change = cores[0].new_ones(1, 1), cores[0].new_zeros(1, 1)
    for k, (mine, core, velocity) in enumerate(zip(here, cores, velocities, strict=True)):
        still, moving = core, velocity
        if k > shared:
            still, moving = absorb(overlap, core), absorb(overlap, velocity) + absorb(change, core)
        if k >= shared:
            overlap, change = mine.mT @ still, mine.mT @ moving
        opened.append((still, moving))
    return opened, (overlap, change)


def outer_gradients(
    here: Cores, cores: Cores, velocities: Cores, opened: Opened, beyond: tuple[Tensor, Tensor]
) -> Cores:
    """Derivatives of ``<F X + dF Y, H B>`` with respect to the outer cores of H, without F, dF or H.

    ``opened`` is that of `contract`; ``beyond``, what lies behind the middle bond, is ``(X Bᵀ, Y Bᵀ)``, both (r, r).
    Zeros before the first core that moves.
    """
    first = _first_moving(here)
    derivatives = [torch.zeros_like(core) for core in here[:first]]
    of_still, of_moving = beyond
    for k in reversed(range(first + 1, len(here))):
        seen = here[k].reshape(here[k - 1].shape[1], -1)
        inner, outer = cores[k] @ of_still + velocities[k] @ of_moving, cores[k] @ of_moving
        of_still, of_moving = inner.reshape(len(seen), -1) @ seen.mT, outer.reshape(len(seen), -1) @ seen.mT
        still, moving = opened[k - 1]
        derivatives.insert(first, still @ of_still + moving @ of_moving)
    return tuple(derivatives)
