"""From a point's factors back to Householder coordinates: the signs that the charts can produce.

A chart makes the frame of its coordinates up to the signs of the columns. Those of outer cores move on to the next
core; those of the last cores to the singular values, where these are signed. Elsewhere both frames of a column
must take the same sign, and the one that keeps their reflectors short is chosen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from retract.manifolds import frames
from retract.manifolds.householder import householder_coordinates
from retract.manifolds.tensor_chain import Cores, absorb
from retract.manifolds.tensor_train import STTP

from ._charts import ChainCharts, CoreChart

__all__ = ["fit_coordinates"]

#: Longer reflectors than this turn their column by less than a millionth of what its coordinates change.
_LONG_REFLECTOR = 1e6


def fit_coordinates(left: ChainCharts, right: ChainCharts, train: STTP, point: Sequence[Tensor]) -> Sequence[Tensor]:
    """Coordinates of the live cores of U, of the singular values, and of the live cores of V.

    Exact for every point but a set of measure zero, where a column is moved by a few roundings, with a warning:
    a reflector turns e_i into a column that is nearly +e_i only if it is very long.

    Args:
        left: the charts of U.
        right: the charts of V.
        train: the manifold of the point; a plain singular value decomposition is one of two cores.
        point: cores of U, allowed singular values, descending, and cores of V.
    """
    u, s, v = _canonical(train, len(left.cores), point)
    (*outer_u, last_u), (*outer_v, last_v) = _push_signs(left, u), _push_signs(right, v)
    spectrum = train.center.spectrum
    signed = torch.tensor(spectrum.signed(s.shape[-1]), device=s.device)
    joint = _joint_signs(last_u, last_v, left.cores[-1])
    wanted = torch.where(signed, torch.zeros_like(s), joint)
    flat_u, signs_u = _coordinates(last_u, left.cores[-1], wanted)
    flat_v, signs_v = _coordinates(last_v, right.cores[-1], wanted)
    theta = spectrum.coordinates(s * signs_u * signs_v)
    return [flat for flat in (*outer_u, flat_u, theta, *outer_v, flat_v) if flat.numel()]


def _canonical(train: STTP, count: int, point: Sequence[Tensor]) -> tuple[Cores, Tensor, Cores]:
    """Cores of U, singular values, cores of V in the canonical gauge, in which reduced charts make them.

    Square charts make frames of one determinant each. Where no singular value may be negative, last cores that are
    square, both of them, must have determinants of one sign: the least singular value changes its sign if they
    have not, and takes the least value that is allowed.
    """
    u, s, v = _split(train.canonical(tuple(point)), count)
    spectrum, square = train.center.spectrum, (len(s), len(s))
    if any(core.shape != square for core in (u[-1], v[-1])) or any(spectrum.signed(len(s))):
        return u, s, v
    if torch.linalg.det(u[-1]) * torch.linalg.det(v[-1]) > 0:
        return u, s, v
    u, s, v = _split(point, count)
    least = spectrum.project(torch.zeros_like(s))[-1:]
    last = torch.cat((v[-1][:, :-1], -v[-1][:, -1:]), dim=1)
    return _split(train.canonical((*u, torch.cat((s[:-1], least)), *v[:-1], last)), count)


def _split(point: Sequence[Tensor], count: int) -> tuple[Cores, Tensor, Cores]:
    return tuple(point[:count]), point[count], tuple(point[count + 1 :])


def _push_signs(chain: ChainCharts, cores: Cores) -> tuple[Tensor, ...]:
    """Coordinates of the outer cores, then the last core, with the signs that those have left over."""
    result, carried = [], cores[0]
    for chart, following in zip(chain.cores, cores[1:], strict=False):
        if chart.size:
            flat, signs = householder_coordinates(carried, reduced=True)
            result.append(flat)
        else:
            signs = carried.diagonal().sign()
        carried = absorb(torch.diag(signs), following)
    return (*result, carried)


def _joint_signs(u: Tensor, v: Tensor, chart_of_u: CoreChart) -> Tensor:
    """For each column the sign that both charts can produce best, +-1.

    ``I - U diag(signs)``, the leading blocks, is a product L X of triangular matrices, with the reflectors' leading
    block for L and 2 / |h_i|² on the diagonal of X. So elimination without exchange of rows meets
    ``1 - sign_i y_i`` at step i, and the sign of each column can be chosen when it is met, to keep that large for
    the frame for which it is the smaller (Ballard et al., IPDPS 2014, choose them so for one frame).
    """
    r = u.shape[1]
    signs = -u.diagonal().sign()
    if chart_of_u.size == 0:
        return signs
    blocks = torch.stack((u[:r], v[:r])) if u.shape[0] == r else torch.stack((v[:r], u[:r]))
    square = r in (u.shape[0], v.shape[0])
    for i in range(r):
        y = blocks[:, i, i]
        decisive = y[0] if (square and i == r - 1) or y[0].abs() >= y[1].abs() else y[1]
        signs[i] = -1.0 if decisive >= 0 else 1.0
        pivots = (1 - signs[i] * y).clamp(min=torch.finfo(u.dtype).tiny)
        multipliers = -signs[i] * blocks[:, i + 1 :, i] / pivots[:, None]
        blocks[:, i + 1 :] -= multipliers[:, :, None] * blocks[:, None, i]
    return signs


def _coordinates(frame: Tensor, chart: CoreChart, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of a last core, and the signs with which the chart's frame is the given one."""
    if chart.size == 0:
        return frame.new_empty(0), -frame.diagonal().sign()
    try:
        flat, signs = householder_coordinates(frame, reduced=chart.reduced, signs=wanted)
    except ValueError:
        flat, signs = householder_coordinates(_nudged(frame), reduced=chart.reduced, signs=wanted)
    longest = float(flat.abs().amax())
    if longest > _LONG_REFLECTOR:
        warnings.warn(
            f"the weight lies at the edge of the Householder chart: a reflector has an entry of {longest:.1g}, and "
            "training will hardly move its column. Use form='stiefel', or another initial weight",
            stacklevel=2,
        )
    return flat, signs


def _nudged(frame: Tensor) -> Tensor:
    """The frame, moved by a few roundings in every direction."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(frame.shape, dtype=frame.dtype, generator=generator).to(frame.device)
    size = 4 * torch.finfo(frame.dtype).eps / math.sqrt(frame.shape[0])
    return frames.householder_q(frame + size * noise, False)
