"""Householder coordinates of orthonormal frames: as many numbers as the Stiefel manifold has dimensions.

A frame is the product of ``p`` reflections ``I - 2 h_i h_iᵀ / |h_i|²``, applied to the first ``p`` columns of the
identity. Reflector ``h_i`` has zeros above entry i, a one there, and coordinates below it (Obukhov et al., AISTATS
2021, section 3.1); in the reduced chart, of frames whose leading p x p block is upper triangular, only below entry p
(their section 3.2, after Shepard et al. 2015). So coordinates are free: any optimizer may change them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import compact_wy
from .reflectors import free_reflectors, signed_reflectors

__all__ = ["householder_coordinates", "householder_frame", "num_coordinates"]

_HALF = (torch.float16, torch.bfloat16)


def num_coordinates(n: int, p: int, *, reduced: bool = False) -> int:
    """Coordinates of an (n, p) frame: ``n p - p (p + 1) / 2``, the dimension of the Stiefel manifold.

    Those of the reduced chart are ``p (n - p)``, the dimension of the Grassmann manifold.

    Raises:
        ValueError: not 1 <= p <= n.
    """
    if not 1 <= p <= n:
        raise ValueError(f"a frame of p orthonormal columns of length n needs 1 <= p <= n, got n={n}, p={p}")
    return p * (n - p) + (0 if reduced else p * (p - 1) // 2)


def householder_frame(coordinates: Tensor, n: int, p: int, *, reduced: bool = False) -> Tensor:
    """The frame of given coordinates.

    Args:
        coordinates: (..., num_coordinates(n, p)), any real numbers. Row by row, first rows p+1 to n of the matrix
            whose columns are the reflectors; then, in the full chart, the strictly lower triangle of its rows 1 to p.
        n: length of the columns.
        p: number of columns.
        reduced: the chart of frames with an upper triangular leading block.

    Returns:
        (..., n, p), orthonormal columns; minus the first columns of the identity for coordinates zero. Half precision
        is computed in float32, also under autocast. (Float32 is as exact as ``torch.set_float32_matmul_precision``
        lets products be: with TensorFloat-32 columns are orthonormal to about 1e-3 only.)

    Raises:
        ValueError: n, p or the number of coordinates do not fit.
        TypeError: coordinates are not real floating-point numbers.

    Differentiable any number of times, in both modes. The backward pass keeps p x p matrices beside the coordinates,
    and allocates no matrix of the frame's size but the gradient.
    """
    count = num_coordinates(n, p, reduced=reduced)
    if not coordinates.is_floating_point():
        raise TypeError(f"coordinates must be real floating-point numbers, got dtype {coordinates.dtype}")
    if coordinates.ndim == 0 or coordinates.shape[-1] != count:
        chart = "reduced" if reduced else "full"
        raise ValueError(
            f"coordinates must have shape (..., {count}) for the {chart} chart of {n} x {p} frames, "
            f"got {tuple(coordinates.shape)}"
        )
    batch = coordinates.shape[:-1]
    flat = coordinates.float() if coordinates.dtype in _HALF else coordinates
    if len(batch) > 1:
        flat = flat.flatten(0, -2)
    if torch.compiler.is_compiling():  # dynamo takes no autograd function that has a forward-mode rule
        with torch.autocast(flat.device.type, enabled=False):
            frame = compact_wy.frame(*_unpack(flat, n, p, reduced))
    else:
        frame = _HouseholderFrame.apply(flat, n, p, reduced)[0]  # type: ignore[no-untyped-call]
    return (frame.reshape(*batch, n, p) if len(batch) > 1 else frame).to(coordinates.dtype)


def householder_coordinates(
    frame: Tensor, *, reduced: bool = False, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Coordinates and signs of any frame: ``frame = householder_frame(coordinates, n, p) * signs``.

    Args:
        frame: (..., n, p), orthonormal columns.
        reduced: use the reduced chart; the leading p x p block must be upper triangular.
        signs: the sign that each column must get, +1 or -1, or 0 where either will do: (..., p) or broadcast to it.
            By default all are free.

    Returns:
        The coordinates (..., num_coordinates(n, p)) and the signs (..., p) of +-1, in the dtype of the frame. With a
        free sign a reflector has |h|² <= 2. With a forced one it has |h|² = 2 / (1 - x), however large, with x the
        head of the signed column after the reflections before it.

    Raises:
        ValueError: more columns than rows; columns that are not orthonormal (or NaN), or a leading block that is not
            triangular, to half the digits of their type; signs other than those; or a column that the chart cannot
            produce with its sign: x = 1 above, as in the last column of a square frame of the wrong determinant.
        TypeError: the frame is not made of real floating-point numbers.

    Not differentiable.
    """
    with torch.no_grad(), _autocast_off(frame):
        wide = _checked_frame(frame, reduced)
        if signs is None:
            reflectors, chosen = free_reflectors(wide)
        else:
            reflectors, chosen = signed_reflectors(wide, _checked_signs(signs, wide))
        top, bottom = _split(reflectors, frame.shape[-1], dim=-2)
        coordinates = bottom.flatten(-2)
        if not reduced:
            coordinates = torch.cat((coordinates, _pack(top)), dim=-1)
        return coordinates.to(frame.dtype), chosen.to(frame.dtype)


# ------------------------------------------------------------------------------------------------ autograd function


class _HouseholderFrame(torch.autograd.Function):
    """The chart with its derivatives in closed form; products of the frame's size are written where they belong."""

    @staticmethod
    def forward(coordinates: Tensor, n: int, p: int, reduced: bool) -> tuple[Tensor, ...]:
        with _autocast_off(coordinates):
            lower, bottom = _unpack(coordinates, n, p, reduced)
            system, mixing = compact_wy.compact_form(lower, bottom)
            frame = coordinates.new_empty(*coordinates.shape[:-1], n, p)
            top, rest = _split(frame, p, dim=-2)
            top.copy_(mixing) if lower is None else compact_wy.assign(top, lower, mixing)
            top.diagonal(dim1=-2, dim2=-1).add_(1)
            compact_wy.assign(rest, bottom, mixing)
        return (frame, mixing) if lower is None else (frame, mixing, system, lower)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        coordinates, *ctx.chart = inputs
        _, *parts = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*parts)
        ctx.save_for_backward(coordinates, *parts)
        ctx.save_for_forward(coordinates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        grad, (coordinates, *parts) = grads[0], ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        with _autocast_off(coordinates):
            if torch.is_grad_enabled():  # this gradient will be differentiated: its parts must know how they depend
                return _gradient(coordinates, grad, *ctx.chart), None, None, None
            return _write_gradient(coordinates, grad, *ctx.chart, *parts), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (coordinates,) = ctx.saved_tensors
        with _autocast_off(coordinates):
            moved = _derivative(coordinates, tangent, *ctx.chart)
        return (moved, None) if ctx.chart[-1] else (moved, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], coordinates: Tensor, *chart: Any) -> Any:
        batch = coordinates.movedim(in_dims[0], 0)
        outputs = _HouseholderFrame.apply(batch.flatten(0, -2), *chart)  # type: ignore[no-untyped-call]
        return tuple(t.reshape(*batch.shape[:-1], *t.shape[-2:]) for t in outputs), (0,) * len(outputs)


def _write_gradient(
    coordinates: Tensor,
    grad: Tensor,
    n: int,
    p: int,
    reduced: bool,
    mixing: Tensor,
    system: Tensor | None = None,
    lower: Tensor | None = None,
) -> Tensor:
    """`_gradient` from the parts that the forward pass left, each product written into the flat gradient."""
    _, bottom = _unpack(coordinates, n, p, True)
    top, rest = _split(grad, p, dim=-2)
    solved, symmetric = compact_wy.adjoint(lower, bottom, system, mixing, top, rest)
    gradient = grad.new_empty(coordinates.shape)  # a batch of them where vmap has made grad a batch
    below, packed = _split(gradient, p * (n - p), dim=-1)
    d_bottom = compact_wy.assign(below.view(bottom.shape), rest, mixing.mT)
    compact_wy.accumulate(d_bottom, bottom, symmetric)
    if lower is not None:
        d_lower = compact_wy.combine(solved.mT, top, mixing.mT)
        packed.copy_(_pack(compact_wy.accumulate(d_lower, lower, symmetric)))
    return gradient


def _gradient(coordinates: Tensor, grad: Tensor, n: int, p: int, reduced: bool) -> Tensor:
    d_lower, d_bottom = compact_wy.gradient(*_unpack(coordinates, n, p, reduced), *_split(grad, p, dim=-2))
    flat = d_bottom.reshape(*d_bottom.shape[:-2], p * (n - p))
    return flat if d_lower is None else torch.cat((flat, _pack(d_lower)), dim=-1)


def _derivative(coordinates: Tensor, tangent: Tensor, n: int, p: int, reduced: bool) -> Tensor:
    d_lower, d_bottom = _unpack(tangent, n, p, reduced)
    if d_lower is not None:
        d_lower = d_lower - compact_wy.identity_like(d_lower)
    return compact_wy.derivative(*_unpack(coordinates, n, p, reduced), d_lower, d_bottom)


def _autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast would compute products in half precision. To enter its context costs more than to ask for it."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


# ------------------------------------------------------------------------------------------- layout of coordinates


def _unpack(coordinates: Tensor, n: int, p: int, reduced: bool) -> tuple[Tensor | None, Tensor]:
    """The blocks of the reflectors: L, or None where it is the identity, and B, a view of the coordinates."""
    bottom, packed = _split(coordinates, p * (n - p), dim=-1)
    bottom = bottom.reshape(*bottom.shape[:-1], n - p, p)
    if reduced:
        return None, bottom
    identity = compact_wy.identity_like(bottom).flatten().expand(*packed.shape[:-1], p * p)
    lower = identity.scatter(-1, _below_diagonal(p, packed.device).expand(packed.shape), packed)
    return lower.reshape(*packed.shape[:-1], p, p), bottom


def _pack(square: Tensor) -> Tensor:
    """The strictly lower triangle, row by row."""
    p = square.shape[-1]
    return square.reshape(*square.shape[:-2], p * p).index_select(-1, _below_diagonal(p, square.device))


def _below_diagonal(p: int, device: torch.device) -> Tensor:
    """Where the strictly lower triangle lies among the entries of a p x p matrix."""
    row, column = torch.tril_indices(p, p, -1, device=device)
    places: Tensor = row * p + column
    return places


def _split(tensor: Tensor, size: int, dim: int) -> tuple[Tensor, Tensor]:
    first, second = tensor.split((size, tensor.shape[dim] - size), dim)
    return first, second


# ------------------------------------------------------------------------------------------------ checks of frames


def _checked_frame(frame: Tensor, reduced: bool) -> Tensor:
    """The frame in the dtype of the computation, with exact zeros where the reduced chart has them."""
    if not frame.is_floating_point():
        raise TypeError(f"frame must be made of real floating-point numbers, got dtype {frame.dtype}")
    if frame.ndim < 2 or not 1 <= frame.shape[-1] <= frame.shape[-2]:
        raise ValueError(f"frame must have shape (..., n, p) with 1 <= p <= n, got {tuple(frame.shape)}")
    wide = frame.float() if frame.dtype in _HALF else frame
    allowed = math.sqrt(torch.finfo(frame.dtype).eps)
    _check_zero(
        wide.mT @ wide - compact_wy.identity_like(wide), allowed, "frame must have orthonormal columns: UᵀU - I"
    )
    if not reduced:
        return wide
    top, bottom = _split(wide, frame.shape[-1], dim=-2)
    _check_zero(
        top.tril(-1), allowed, "the reduced chart needs an upper triangular leading block: below its diagonal frame"
    )
    return torch.cat((top.triu(), bottom), dim=-2)


def _check_zero(error: Tensor, allowed: float, what: str) -> None:
    if not bool((error.abs() <= allowed).all()):  # NaN is not
        raise ValueError(f"{what} reaches {float(error.abs().amax()):.3g}, allowed {allowed:.3g}")


def _checked_signs(signs: Tensor, frame: Tensor) -> Tensor:
    """One for every column, in the dtype of the frame."""
    shape = frame.shape[:-2] + frame.shape[-1:]
    wanted = signs.to(frame)
    if not bool(((wanted == 0) | (wanted.abs() == 1)).all()):
        raise ValueError(f"signs must be +1, -1, or 0 for either, got {signs.unique().tolist()}")
    try:
        return wanted.expand(shape)
    except RuntimeError:
        raise ValueError(f"signs must broadcast to shape {tuple(shape)}, got {tuple(signs.shape)}") from None
