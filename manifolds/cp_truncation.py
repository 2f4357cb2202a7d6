"""Fewer terms of a sum of rank-one tensors: which to keep, what that costs, and the weights that cost least.

All by the Gram matrix G of the terms, (R, R), in float64; no tensor is formed. With v the weights of the terms that
are dropped, |W - W_S|^2 = v^T G v, and the best weights of those kept are lambda_S + G_SS^-1 G_S: v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cp_terms import check_terms, cp_gram

__all__ = ["Selection", "refit", "select_terms", "soft_threshold", "truncation_error"]

#: Part of a unit term that the terms before it do not span, squared, from which on it counts as a term of its own.
#: Weights refitted over terms nearer than this would be large, of both signs, and lost in float32.
_INDEPENDENT = 1e-6

#: Pull of refitted weights towards those before, against terms of norm one: far less than what `_INDEPENDENT` keeps.
_PULL = 1e-9


@dataclass(frozen=True)
class Selection:
    """Terms in the order in which they are worth keeping; every beginning of ``order`` is a truncation."""

    #: Indices of terms, (count,), the most valuable first.
    order: Tensor
    #: ``errors[k]`` is the Frobenius norm of W less its best approximation by the first k terms, (count + 1,), float64;
    #: never increasing.
    errors: Tensor


def truncation_error(weights: Tensor, factors: Sequence[Tensor], kept: Tensor) -> Tensor:
    """Frobenius norm of what is lost when only some terms are kept, their weights unchanged: a float64 scalar.

    Args:
        weights: (R,), of either sign.
        factors: one of shape (R, d_m) for each mode.
        kept: indices of the terms that stay, or a mask (R,).
    """
    check_terms(weights, factors)
    dropped = ~_mask(kept, len(weights))
    v = weights[dropped].double()
    square = v @ cp_gram([factor[dropped].double() for factor in factors]) @ v
    return square.clamp(min=0).sqrt()


def refit(weights: Tensor, factors: Sequence[Tensor], kept: Tensor) -> Tensor:
    """Weights of the kept terms with which they are nearest to the sum of all, in the order of ``kept``.

    Least squares with a small pull towards the weights they had, which decides where kept terms are all but parallel.
    The error is never above that of the weights unchanged.

    Args:
        weights: (R,), of either sign.
        factors: one of shape (R, d_m) for each mode, with unit rows.
        kept: indices of the terms that stay, or a mask (R,).

    Returns:
        Weights, one for each kept term, in the dtype of ``weights``.
    """
    check_terms(weights, factors)
    mask = _mask(kept, len(weights))
    indices = kept.nonzero().flatten() if kept.dtype == torch.bool else kept
    gram, wide = cp_gram([factor.double() for factor in factors]), weights.double()
    lost = gram[indices] @ torch.where(mask, 0.0, wide)
    system = gram[indices][:, indices]
    system.diagonal().add_(_PULL)
    moved = wide[indices] + torch.cholesky_solve(lost.unsqueeze(1), torch.linalg.cholesky(system)).squeeze(1)
    return moved.to(weights.dtype)


def select_terms(weights: Tensor, factors: Sequence[Tensor], count: int | None = None) -> Selection:
    """Order terms by their worth: each next one lowers the error after a refit of all weights the most.

    Orthogonal least squares (Chen, Cowan, Grant 1991) on the Gram matrix, as a Cholesky factorization with pivots:
    R^2 count multiplications. What lowers nothing comes last: terms that those before them span, then those of weight
    zero, which are not part of W.

    Args:
        weights: (R,), of either sign.
        factors: one of shape (R, d_m) for each mode, with unit rows.
        count: how many terms to order, all R if left out.

    Raises:
        ValueError: ``count`` is not in 1 ... R.
    """
    check_terms(weights, factors)
    terms = len(weights)
    count = terms if count is None else count
    if not 1 <= count <= terms:
        raise ValueError(f"count must be between 1 and the number of terms, {terms}, got {count}")
    live, dead = weights.nonzero().flatten(), (weights == 0).nonzero().flatten()
    wide = weights[live].double()
    gram = cp_gram([factor[live].double() for factor in factors])
    order, gains = _pivoted(gram, gram @ wide, min(count, len(live)))
    square = (wide @ gram @ wide).clamp(min=0)
    errors = (square - torch.cat([square.new_zeros(1), gains.cumsum(0)])).clamp(min=0).sqrt()
    if count >= len(live):
        errors[-1] = 0.0  # all terms: W itself, whatever has been rounded
    rest = dead[: count - len(order)]
    return Selection(torch.cat([live[order], rest]), torch.cat([errors, errors.new_zeros(len(rest))]))


def soft_threshold(weights: Tensor, threshold: float | Tensor) -> Tensor:
    """Proximal step of threshold * sum |lambda_r|: magnitudes less the threshold, zero where they were below it.

    Raises:
        ValueError: a negative or NaN threshold; one given as a tensor is not looked at.
    """
    if not isinstance(threshold, Tensor) and not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    return weights.sign() * (weights.abs() - threshold).clamp(min=0)


def _pivoted(gram: Tensor, correlations: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Order of the terms and by how much each lowers the squared error, both (count,).

    Step k holds, for every term, what is left of its square norm and of its product with W once the k terms before
    are projected out: the rows of a Cholesky factor give both.
    """
    left, product = gram.diagonal().clone(), correlations.clone()
    available = left.new_zeros(len(left))  # -inf for a term that has been taken
    rows = gram.new_zeros(count, len(left))
    order = torch.empty(count, dtype=torch.long, device=gram.device)
    gains = gram.new_zeros(count)
    for k in range(count):
        worth = torch.where(left > _INDEPENDENT, product.square() / left.clamp(min=_INDEPENDENT), 0.0)
        best = (worth + available).argmax()
        order[k], gains[k], available[best] = best, worth[best], -torch.inf
        rows[k] = (gram[best] - rows[:k, best] @ rows[:k]) / left[best].clamp(min=_INDEPENDENT).sqrt()
        product -= rows[k] * gains[k].sqrt() * product[best].sign()
        left -= rows[k].square()
    return order, gains


def _mask(kept: Tensor, terms: int) -> Tensor:
    """Which terms stay, (R,), from indices or a mask.

    Raises:
        ValueError: neither, none, one out of range, or one twice.
    """
    if kept.dtype == torch.bool and tuple(kept.shape) == (terms,) and bool(kept.any()):
        return kept
    is_indices = kept.ndim == 1 and not kept.is_floating_point() and kept.dtype != torch.bool and len(kept) > 0
    if not is_indices or not bool(((kept >= 0) & (kept < terms)).all()) or len(kept.unique()) < len(kept):
        raise ValueError(f"kept must be a mask ({terms},) or distinct indices of {terms} terms, at least one: {kept}")
    mask = torch.zeros(terms, dtype=torch.bool, device=kept.device)
    mask[kept] = True
    return mask
