"""From a frame of orthonormal columns back to the Householder reflectors that make it.

Eliminating a frame ``U`` column by column leaves a diagonal of signs, ``U = H_1 ... H_p I diag(signs)``. A reflector
that turns ``e`` into the signed column ``x`` is parallel to ``e - x``: short where ``x`` points away from ``e``, which
a free sign can always choose, and without end where ``x = e``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compact_wy import compact_system

__all__ = ["free_reflectors", "signed_reflectors"]

_PANEL = 32


def free_reflectors(frame: Tensor) -> tuple[Tensor, Tensor]:
    """Reflectors, below the diagonal of an (n, p) matrix, and the signs with which they are all short: |h|² <= 2."""
    reflectors, scales = torch.geqrf(frame)
    diagonal = reflectors.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(frame.dtype)
    # LAPACK does not reflect a column with zeros below the diagonal; a reflector e_i turns it over.
    return reflectors, torch.where(scales == 0, -signs, signs)


def signed_reflectors(frame: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The same for given ``signs``, (..., p) of +1, -1, or 0 where either will do.

    Panels of columns are eliminated one column at a time, and all that follow at once.

    Raises:
        ValueError: a column equals e_i when it is met, so that no reflector makes it with its sign.
    """
    p = frame.shape[-1]
    work, reflectors, chosen = frame.clone(), torch.zeros_like(frame), torch.empty_like(signs)
    for start in range(0, p, _PANEL):
        stop = min(start + _PANEL, p)
        panel = work[..., start:, start:stop]
        h = reflectors[..., start:, start:stop]
        for i in range(stop - start):
            column, chosen[..., start + i] = _reflector(panel[..., i:, i], signs[..., start + i], start + i)
            h[..., i:, i] = column
            rest = panel[..., i:, i + 1 :]
            column = column.unsqueeze(-1)
            rest -= column @ (column.mT @ rest * (2 / column.square().sum(-2, keepdim=True)))
        following = work[..., start:, stop:]
        system = compact_system(-h.mT @ h)
        following += h @ torch.linalg.solve_triangular(system.mT, h.mT @ following, upper=False)
    return reflectors, chosen


def _reflector(x: Tensor, wanted: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The ``h`` with head 1 that reflects ``e`` into the signed and normalised ``x``, and the sign."""
    head, tail = x[..., 0], x[..., 1:]
    away = torch.where(head > 0, -1.0, 1.0).to(x.dtype)
    sign = torch.where(wanted == 0, away, wanted)
    head = sign * head
    square = tail.square().sum(-1)
    norm = (square + head.square()).sqrt()
    impossible = (head > 0) & (square <= torch.finfo(x.dtype).eps ** 2)
    if bool(impossible.any()):
        raise ValueError(
            f"the chart has no frame whose column {index} takes the sign {int(sign[impossible][0]):+d}; "
            f"{-int(sign[impossible][0]):+d} can be taken"
        )
    # norm - head, without the digits that cancel where x is near e
    gap = torch.where(head > 0, square / (norm + head), norm - head)
    return torch.cat((torch.ones_like(head).unsqueeze(-1), (-sign / gap).unsqueeze(-1) * tail), dim=-1), sign
