"""Points (U, s, V) of a matrix U diag(s) Vᵀ, and vectors of the same shapes, as a caller gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .frames import identity_like

__all__ = ["HALF", "Triplets", "as_dtype_of", "check_rank", "frame_error", "in_dtype_of_computation", "rounding"]

Triplets = tuple[Tensor, Tensor, Tensor]

HALF = (torch.float16, torch.bfloat16)


def check_rank(rank: int, m: int, n: int) -> None:
    """Refuse a rank that no matrix of shape (m, n) has.

    Raises:
        ValueError: ``rank > min(m, n)``.
    """
    if rank > min(m, n):
        raise ValueError(f"rank {rank} exceeds min(m, n) of a matrix of shape {(m, n)}")


def in_dtype_of_computation(rank: int, point: Sequence[Tensor], *vectors: Sequence[Tensor]) -> tuple[Triplets, ...]:
    """Point and vectors; float32 in place of half precision.

    Raises:
        ValueError: not three tensors, or shapes other than (m, rank), (rank,), (n, rank).
        TypeError: factors that are not real floating-point.
    """
    for name, factors in (("point", point), *(("vector", vector) for vector in vectors)):
        if isinstance(factors, Tensor) or len(factors) != 3:
            raise ValueError(f"{name} must be a tuple of three tensors (U, s, V), got {_shown(factors)}")
    u, s, v = point
    if u.ndim != 2 or v.ndim != 2 or (u.shape[1], *s.shape, v.shape[1]) != (rank,) * 3:
        expected = f"(m, {rank}), ({rank},), (n, {rank})"
        raise ValueError(f"point must have factors of shapes {expected}, got {_shown(point)}")
    check_rank(rank, u.shape[0], v.shape[0])
    for vector in vectors:
        if any(a.shape != b.shape for a, b in zip(point, vector, strict=True)):
            raise ValueError(f"vector has shapes {_shown(vector)}, the point has {_shown(point)}; they must agree")
    if not u.is_floating_point():
        raise TypeError(f"factors must be real floating-point, got dtype {u.dtype}")
    dtype = torch.float32 if u.dtype in HALF else u.dtype
    return tuple(_to(dtype, factors) for factors in (point, *vectors))


def as_dtype_of(point: Sequence[Tensor], factors: Triplets) -> Triplets:
    """A result in the dtype of the point it was computed from."""
    return _to(point[0].dtype, factors)


def frame_error(frame: Tensor) -> float:
    """The largest entry of ``frameᵀ frame - I``."""
    products = frame.detach().mT @ frame.detach()
    return float((products - identity_like(products)).abs().amax())


def rounding(point: Sequence[Tensor]) -> float:
    """What storing unit vectors in half precision costs their products; nothing for the wider types."""
    dtype = point[0].dtype
    return 2 * torch.finfo(dtype).eps if dtype in HALF else 0.0


def _to(dtype: torch.dtype, factors: Sequence[Tensor]) -> Triplets:
    return cast(Triplets, tuple(t.to(dtype) for t in factors))


def _shown(factors: Any) -> str:
    if isinstance(factors, Tensor):
        return f"one tensor of shape {tuple(factors.shape)}"
    return f"({', '.join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in factors)})"
