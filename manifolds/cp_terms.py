"""Sums of rank-one tensors, W = sum_r lambda_r a_r o b_r o c_r ...: their Gram matrix, norm and gauge.

Terms are held as ``(weights, factors)``: weights (R,) and, for every mode m of the tensor, a factor (R, d_m) whose
*rows* are the unit vectors of the terms, so that `retract.manifolds.Oblique` takes a factor as it is. Nothing
here forms the tensor but `cp_tensor`; what sums terms that may cancel is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "canonical_form",
    "check_terms",
    "cp_gram",
    "cp_norm",
    "cp_normalize",
    "cp_tensor",
    "degeneracy",
    "khatri_rao",
]

Terms = tuple[Tensor, tuple[Tensor, ...]]


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Products of the vectors of each term, (R, d_1 d_2 ...): row r is the flattened outer product."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return product


def cp_tensor(weights: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The tensor of shape (d_1, ..., d_D), as one matrix product between two groups of modes; differentiable.

    Args:
        weights: (R,), of either sign.
        factors: one of shape (R, d_m) for each mode; the rows need not be unit vectors.
    """
    check_terms(weights, factors)
    shape = [factor.shape[1] for factor in factors]
    # The two groups are cut where the least is stored for them.
    cut = min(range(1, len(shape) + 1), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))
    left = khatri_rao([weights.unsqueeze(1) * factors[0], *factors[1:cut]])
    right = khatri_rao(factors[cut:]) if cut < len(shape) else left.new_ones(len(weights), 1)
    return (left.mT @ right).reshape(shape)


def cp_gram(factors: Sequence[Tensor]) -> Tensor:
    """Inner products of the rank-one tensors, (R, R): the entrywise product of the Gram matrices of the modes."""
    gram = factors[0] @ factors[0].mT
    for factor in factors[1:]:
        gram = gram * (factor @ factor.mT)
    return gram


def cp_norm(weights: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of the tensor, sqrt(lambda^T G lambda), a scalar; by the Gram matrix in float64."""
    check_terms(weights, factors)
    wide = weights.double()
    square = wide @ cp_gram([factor.double() for factor in factors]) @ wide
    return square.clamp(min=0).sqrt().to(weights.dtype)


def cp_normalize(factors: Sequence[Tensor], weights: Tensor | None = None) -> Terms:
    """Scale the rows of any factors to norm 1 and put the norms into the weights; the tensor stays.

    Args:
        factors: one of shape (R, d_m) for each mode.
        weights: (R,), ones if left out.

    Returns:
        Weights, which keep their signs, and factors.

    Raises:
        ValueError: a row that is zero or not finite: it has no direction.
    """
    check_terms(weights, factors)
    norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True) for factor in factors]
    for mode, norm in enumerate(norms):
        bad = (~(torch.isfinite(norm) & (norm > 0))).flatten().nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"factors[{mode}] has rows that are zero or not finite and have no direction: {bad[:8]}")
    scale = torch.cat(norms, dim=1).prod(dim=1)
    units = tuple(factor / norm for factor, norm in zip(factors, norms, strict=True))
    return (scale if weights is None else weights * scale), units


def canonical_form(weights: Tensor, factors: Sequence[Tensor]) -> Terms:
    """The representative of a gauge class: what remains when order, signs and norms of the terms are chosen.

    Weights are not negative and descend. In all factors but the first the entry of largest magnitude of every row
    (the first of equals) is positive; the first factor takes the sign of the term. Terms of equal weight keep
    the order they came in.

    Returns:
        Weights (R,) and factors with unit rows.

    Raises:
        ValueError: a row that is zero or not finite.
    """
    weights, units = cp_normalize(factors, weights)
    sign = _sign(weights)
    oriented = []
    for factor in units[1:]:
        flip = _sign(factor.gather(1, factor.abs().argmax(dim=1, keepdim=True)).squeeze(1))
        sign = sign * flip
        oriented.append(factor * flip.unsqueeze(1))
    magnitudes, order = weights.abs().sort(descending=True, stable=True)
    first = units[0] * sign.unsqueeze(1)
    return magnitudes, tuple(factor[order] for factor in (first, *oriented))


def degeneracy(weights: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """How far terms cancel: sum of |lambda_r| over the norm of their sum, a scalar; rows must be unit vectors.

    At most sqrt(R) for orthogonal terms; values in the hundreds mean diverging components, of which no subset is near
    the tensor. Infinite if the terms cancel entirely, 0 without any. (Phan et al., ECCV 2020.)
    """
    total = weights.abs().sum()
    return torch.where(total > 0, total / cp_norm(weights, factors), 0.0)


def check_terms(weights: Tensor | None, factors: Sequence[Tensor]) -> None:
    """Refuse weights and factors that do not speak of the same terms.

    Raises:
        ValueError: no factor, one that is not (R, d) with R, d >= 1, or weights that are not (R,).
    """
    shapes = [tuple(factor.shape) for factor in factors]
    if not shapes or any(len(shape) != 2 or 0 in shape or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"factors must be tensors (R, d), d >= 1, with one R >= 1 for all, got shapes {shapes}")
    if weights is not None and tuple(weights.shape) != shapes[0][:1]:
        raise ValueError(f"weights must have shape ({shapes[0][0]},), got {tuple(weights.shape)}")


def _sign(x: Tensor) -> Tensor:
    """Signs as +1 and -1; +1 for zero."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
