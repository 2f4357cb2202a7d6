"""Rank-one terms for a given tensor, without a rank to guess: orthogonal terms, and the power method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cp_terms import Terms, cp_gram, khatri_rao

__all__ = ["orthogonal_terms", "power_method"]

#: The pool starts anew where a candidate is this near to the term just taken (absolute cosine).
_SAME = 0.9
#: Sweeps of the pool for each term that is taken.
_SWEEPS = 2
#: All weights are fitted together each time the number of terms has grown by this part of itself.
_GROWTH = 0.1
#: Pull towards the weights before, against unit terms: what makes the fit of parallel terms unique.
_PULL = 1e-6


def orthogonal_terms(
    tensor: Tensor, *, rank: int | None = None, error: float | None = None, generator: torch.Generator | None = None
) -> Terms:
    """Mutually orthogonal terms of a tensor, heaviest first: a matrix's SVD, and of more modes that of its slices.

    The smaller modes are turned to their principal axes (Tucker, 1966). For each combination of axes there remains a
    matrix over the two largest modes, and its singular triplets are terms. All terms of all matrices are orthogonal,
    so errors are those of the weights left out, and all prod(d) / max(d) terms together are the tensor.

    Args:
        tensor: of any number of modes; those of size one get factors of ones.
        rank: how many terms. Terms beyond the largest useful number have weight zero and random directions.
        error: relative Frobenius error; as many terms as it takes. With ``rank`` too, whichever is reached first.
        generator: for the random directions.

    Returns:
        Weights (R,), descending and not negative, and for each mode a factor (R, d) with unit rows.

    Raises:
        ValueError: neither rank nor error, one out of range, or a tensor that is not finite or has no entries.
        TypeError: a tensor that is not real and floating-point.
    """
    target = _target(tensor, rank, error)
    weights, factors = _orthogonal(target)
    return target.expand(weights, factors, generator)


def power_method(
    tensor: Tensor,
    *,
    rank: int | None = None,
    error: float | None = None,
    repeats: int = 32,
    iterations: int = 10,
    generator: torch.Generator | None = None,
) -> Terms:
    """Terms of a tensor one by one, each the best that the alternating power iteration finds in what is left.

    A pool of ``repeats`` candidates is iterated on the residual as one batch. The best is taken, and the others stay:
    one subtraction moves them little, so that two more sweeps a term do, where a new start took tens. All weights are
    refitted each time the number of terms has grown by a tenth. One term costs four products of the pool with the
    unfolded tensor, 4 repeats prod(d) multiplications, and one rank-one update.

    If orthogonal terms (`orthogonal_terms`) are as near at that rank, or reach the error with as few, they are
    the result: for full ranks, for matrices, and for low ranks of large random tensors. Every error is thus reached,
    with prod(d) / max(d) terms at most.

    Args:
        tensor: of any number of modes; those of size one get factors of ones.
        rank: how many terms. Terms beyond the largest useful number have weight zero and random directions.
        error: relative Frobenius error; as many terms as it takes. With ``rank`` too, whichever is reached first.
        repeats: candidates in the pool.
        iterations: sweeps over the modes before the first term is taken, at least two.
        generator: for the random starts, on the tensor's device.

    Returns:
        Weights (R,) and for each mode a factor (R, d) with unit rows, in the order they were found.

    Raises:
        ValueError: neither rank nor error, an argument out of range, or a tensor that is not finite or has no entries.
        TypeError: a tensor that is not real and floating-point.

    Sources: Anandkumar, Ge, Hsu, Kakade, Telgarsky, JMLR 2014 (robust power method); Veeramacheneni et al., IJCNN
    2022 (as initialization of canonical layers).
    """
    if repeats < 1 or iterations < _SWEEPS:
        raise ValueError(f"repeats must be at least 1 and iterations {_SWEEPS}, got {repeats} and {iterations}")
    target = _target(tensor, rank, error)
    weights, factors = _orthogonal(target)
    left_by_orthogonal = float((1 - weights.double().square().sum()).clamp(min=0).sqrt())
    if target.tensor.ndim > 2 and (error is not None or left_by_orthogonal > target.precision):
        found = _deflate(target, len(weights), repeats, iterations, generator)
        fewer = error is not None and found.left <= error and len(found.weights) < len(weights)
        if fewer or (len(found.weights) == len(weights) and found.left < left_by_orthogonal):
            weights, factors = found.weights, found.factors
    return target.expand(weights, factors, generator)


# ------------------------------------------------------------------------------------------------- what is to be fitted


@dataclass(frozen=True)
class _Target:
    """A tensor as the methods take it: of norm one, its modes descending, two at least, none of size one but these."""

    tensor: Tensor
    norm: Tensor
    #: The modes of the original, in the order of those of ``tensor``, the largest first; others have size one.
    modes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int | None
    error: float | None

    @property
    def precision(self) -> float:
        """Relative error that rounding leaves."""
        return 8 * torch.finfo(self.tensor.dtype).eps

    def expand(self, weights: Tensor, factors: Sequence[Tensor], generator: torch.Generator | None) -> Terms:
        """Terms of the original tensor, with its scale, its modes and, if no error was asked for, its rank."""
        missing = 0 if self.error is not None or self.rank is None else self.rank - len(weights)
        weights = torch.cat([weights * self.norm, weights.new_zeros(missing)])
        whole = [weights.new_ones(len(weights), d) for d in self.shape]
        signs = weights.new_ones(len(weights), 1)
        for mode, factor in zip(self.modes, factors, strict=True):
            padded = torch.cat([factor, _directions(factor.new_empty(missing, factor.shape[1]), generator)])
            if self.shape[mode] == 1:
                signs = signs * padded
            else:
                whole[mode] = padded
        whole[self.modes[0]] = whole[self.modes[0]] * signs
        return weights.to(self.dtype), tuple(factor.to(self.dtype) for factor in whole)


def _target(tensor: Tensor, rank: int | None, error: float | None) -> _Target:
    if not tensor.is_floating_point():
        raise TypeError(f"tensor must be real and floating-point, got dtype {tensor.dtype}")
    if tensor.ndim < 1 or tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"tensor must be finite, with one mode and one entry at least, got shape {tuple(tensor.shape)}"
        )
    if rank is None and error is None:
        raise ValueError("rank or error must be given")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if error is not None and not 0 <= error < math.inf:
        raise ValueError(f"error must be finite and >= 0, got {error}")
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    modes = sorted((m for m, d in enumerate(tensor.shape) if d > 1), key=lambda m: -tensor.shape[m])
    modes += [m for m, d in enumerate(tensor.shape) if d == 1][: max(0, 2 - len(modes))]
    ordered = wide.permute(*modes, *(m for m in range(tensor.ndim) if m not in modes))
    ordered = ordered.reshape([tensor.shape[m] for m in modes] + [1] * (2 - len(modes))).contiguous()
    norm = torch.linalg.vector_norm(ordered)
    scaled = torch.where(norm > 0, ordered / norm, 0.0)
    return _Target(scaled, norm, tuple(modes), tuple(tensor.shape), tensor.dtype, rank, error)


def _directions(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows uniform on the sphere, in the shape of ``like``."""
    return _unit(torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator))


def _unit(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit: Tensor = rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)
    return unit


# ---------------------------------------------------------------------------------------------------- orthogonal terms


def _orthogonal(target: _Target) -> Terms:
    """The fewest orthogonal terms that do what is asked for, without padding; one at least."""
    core, axes = target.tensor, []
    for mode in range(2, core.ndim):
        unfolded = target.tensor.movedim(mode, 0).flatten(1)
        axes.append(torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors)
        core = torch.tensordot(core, axes[-1], dims=([2], [0]))  # the turned mode goes to the end
    u, s, vh = torch.linalg.svd(core.flatten(2).movedim(2, 0) if axes else core.unsqueeze(0), full_matrices=False)
    weights, order = s.flatten().sort(descending=True)
    count = len(weights) if target.rank is None else min(target.rank, len(weights))
    if target.error is not None:
        tails = weights.double().square().flip(0).cumsum(0).flip(0)
        count = max(1, min(count, int((tails > target.error**2 * tails[0]).sum())))
    order = order[:count]
    matrix, column = order // s.shape[1], order % s.shape[1]
    factors = [u[matrix, :, column], vh[matrix, column]]
    position = torch.unravel_index(matrix, [axis.shape[1] for axis in axes]) if axes else ()
    factors += [axis[:, index].mT for axis, index in zip(axes, position, strict=True)]
    return weights[:count], tuple(factors[: len(target.modes)])


# ----------------------------------------------------------------------------------------------------- greedy deflation


@dataclass(frozen=True)
class _Found:
    weights: Tensor
    factors: tuple[Tensor, ...]
    #: Norm of the residual; that of the tensor is one.
    left: float


def _deflate(target: _Target, count: int, repeats: int, iterations: int, generator: torch.Generator | None) -> _Found:
    """Up to ``count`` terms, fewer if the error is reached before."""
    residual = target.tensor.clone()
    weights = residual.new_zeros(count)
    factors = [residual.new_zeros(count, d) for d in residual.shape]
    pool = [_directions(residual.new_empty(repeats, d), generator) for d in residual.shape]
    for _ in range(iterations - _SWEEPS):
        _sweep(residual, pool)
    allowed = max(target.error or 0.0, target.precision)
    left, taken, fitted = 1.0, 0, 0
    while taken < count and left > allowed:
        for _ in range(_SWEEPS):
            scores = _sweep(residual, pool)
        best = scores.argmax()
        for factor, candidates in zip(factors, pool, strict=True):
            factor[taken] = candidates[best]
        weights[taken] = scores[best]
        _subtract(residual, scores[best, None], [factor[taken : taken + 1] for factor in factors])
        _renew(pool, best, generator)
        taken += 1
        if taken >= (1 + _GROWTH) * fitted or taken == count:
            _refit(residual, weights[:taken], [factor[:taken] for factor in factors])
            fitted = taken
        left = float(torch.linalg.vector_norm(residual))
    return _Found(weights[:taken], tuple(factor[:taken] for factor in factors), left)


def _sweep(residual: Tensor, pool: list[Tensor]) -> Tensor:
    """Best vector of every mode in turn, the others fixed, for all candidates at once and in place.

    Returns:
        Scores (B,): inner products of the residual with the candidates' terms, not negative.
    """
    unfolded = residual.flatten(1)
    pool[0] = _unit(khatri_rao(pool[1:]) @ unfolded.mT)
    contracted = (pool[0] @ unfolded).reshape(-1, *residual.shape[1:])
    for mode in range(1, len(pool)):
        rows = contracted
        for other in range(len(pool) - 1, 0, -1):
            if other != mode:
                rows = torch.einsum("br...,br->b...", rows.movedim(other, 1), pool[other])
        pool[mode] = _unit(rows)
    scores: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return scores


def _renew(pool: list[Tensor], taken: Tensor, generator: torch.Generator | None) -> None:
    """Start anew with what was taken, and with what had come to the same."""
    cosines = math.prod(candidates @ candidates[taken] for candidates in pool)
    same = (torch.as_tensor(cosines).abs() > _SAME).unsqueeze(1)
    for mode, candidates in enumerate(pool):
        pool[mode] = torch.where(same, _directions(candidates, generator), candidates)


def _refit(residual: Tensor, weights: Tensor, factors: list[Tensor]) -> None:
    """Change all weights, in place, to where the residual is least: never to where it is more."""
    products = (factors[0] @ residual.flatten(1) * khatri_rao(factors[1:])).sum(1).double()
    gram = cp_gram([factor.double() for factor in factors])
    gram.diagonal().add_(_PULL)
    change = torch.cholesky_solve(products.unsqueeze(1), torch.linalg.cholesky(gram)).squeeze(1).to(weights.dtype)
    weights += change
    _subtract(residual, change, factors)


def _subtract(residual: Tensor, weights: Tensor, factors: Sequence[Tensor]) -> None:
    scaled = weights.unsqueeze(1) * factors[0]
    residual.flatten(1).addmm_(scaled.mT, khatri_rao(factors[1:]), alpha=-1)
