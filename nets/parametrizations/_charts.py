"""Householder coordinates of a whole weight: one chart for every core of its two chains.

Each frame of W = U diag(s) Vᵀ is a chain of matricized cores with orthonormal columns: of one core for a plain
singular value decomposition, of several for a tensor train. The core next to the singular values has the full
chart, the outer ones the reduced chart, which removes the gauge of their bonds (Obukhov et al., AISTATS 2021,
section 3.2). Where all singular values are one, U and V may rotate together: the last core of U is reduced too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retract.manifolds.householder import householder_frame, num_coordinates
from retract.manifolds.tensor_train import frame

__all__ = ["ChainCharts", "CoreChart", "evaluate"]


#: Frames are padded where that makes one at most so much longer, and no larger than so many entries: a call costs as
#: much as the arithmetic of such frames, and of larger ones much less.
_MOST_LONGER, _MOST_ENTRIES = 1.5, 2**14


@dataclass(frozen=True)
class CoreChart:
    """The chart of one core, a frame of ``rows`` by ``columns``."""

    rows: int
    columns: int
    reduced: bool

    @property
    def size(self) -> int:
        """Number of coordinates. A square core in the reduced chart has none: it is fixed."""
        return num_coordinates(self.rows, self.columns, reduced=self.reduced)

    def fixed(self, sign: float, like: Tensor) -> Tensor:
        """The core that has no coordinates."""
        return sign * torch.eye(self.rows, self.columns, dtype=like.dtype, device=like.device)


def evaluate(charts: Sequence[CoreChart], coordinates: Sequence[Tensor]) -> list[Tensor]:
    """The frames of many coordinates, those of one chart in one batch. Small frames are padded to share a chart.

    Rows of zeros below the reflectors become rows of zeros below the frame (padded Householder, Obukhov et al.,
    section 3.4); and zeros in the full chart's triangle make a frame of the reduced chart.
    """
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for index, (chart, flat) in enumerate(zip(charts, coordinates, strict=True)):
        groups.setdefault((chart.columns, flat.dtype, flat.device), []).append(index)
    frames = list(coordinates)
    for members in groups.values():
        for batch in _batches(charts, members):
            together = _evaluate_together([charts[i] for i in batch], [coordinates[i] for i in batch])
            for i, one in zip(batch, together, strict=True):
                frames[i] = one
    return frames


def _evaluate_together(charts: Sequence[CoreChart], coordinates: Sequence[Tensor]) -> Sequence[Tensor]:
    """One batch, in the least chart that has all of these in it."""
    rows, columns = charts[-1].rows, charts[-1].columns
    common = CoreChart(rows, columns, all(chart.reduced for chart in charts))
    if len(charts) == 1:
        return [householder_frame(coordinates[0], rows, columns, reduced=common.reduced)]
    pieces = [piece for chart, flat in zip(charts, coordinates, strict=True) for piece in _padded(chart, common, flat)]
    batch = torch.cat(pieces).view(len(charts), common.size)
    frames = householder_frame(batch, rows, columns, reduced=common.reduced)
    heights = [height for chart in charts for height in (chart.rows, rows - chart.rows)]
    parts: Sequence[Tensor] = frames.flatten(0, 1).split(heights)
    return parts[::2]


def _batches(charts: Sequence[CoreChart], members: Sequence[int]) -> list[list[int]]:
    """Members of equal columns in batches of one chart, or of small frames of similar rows."""
    batches: list[list[int]] = []
    for index in sorted(members, key=lambda i: (charts[i].rows, charts[i].reduced)):
        chart = charts[index]
        small = chart.rows * chart.columns <= _MOST_ENTRIES
        if batches and (
            chart == charts[batches[-1][-1]] or (small and chart.rows <= _MOST_LONGER * charts[batches[-1][0]].rows)
        ):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _padded(chart: CoreChart, common: CoreChart, flat: Tensor) -> Sequence[Tensor]:
    """Coordinates in the common chart of the same frame with rows of zeros below, in pieces to be joined."""
    if chart == common:
        return (flat,)
    if chart.reduced:
        return flat, flat.new_zeros(common.size - chart.size)
    below = (chart.rows - chart.columns) * chart.columns
    bottom, triangle = flat.split((below, chart.size - below))
    return bottom, flat.new_zeros(common.size - chart.size), triangle


class ChainCharts:
    """The charts of one chain, and its contraction, which leaves out cores that are known to be the identity.

    A saturated outer core is one up to the gauge: at the head of the chain it merges its mode with the next. The last
    core, if it has no coordinates, is minus the identity, the value of every chart at coordinates zero.

    Args:
        shapes: (rows, columns) of each matricized core, from the outside to the singular values.
        modes: n_k of each core.
        reduced: whether the last core is reduced too.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], modes: Sequence[int], *, reduced: bool) -> None:
        last = len(shapes) - 1
        self.cores = tuple(CoreChart(*shape, reduced=reduced or k < last) for k, shape in enumerate(shapes))
        #: The charts that have coordinates.
        self.live = tuple(chart for chart in self.cores if chart.size)
        self._links: list[tuple[CoreChart, float]] = []
        self._modes: list[int] = []
        head = 1
        for k, (chart, mode) in enumerate(zip(self.cores, modes, strict=True)):
            saturated = chart.size == 0 and k < last
            if saturated and not self._links:
                head *= mode
            elif not (saturated and mode == 1):
                self._links.append((chart, 1.0 if saturated else -1.0))
                self._modes.append(head * mode)
                head = 1

    def contract(self, frames: Sequence[Tensor], like: Tensor) -> Tensor:
        """The chain's frame (prod n, r) from the `live` cores; ``like`` gives dtype and device to the fixed ones."""
        remaining = iter(frames)
        cores = [next(remaining) if chart.size else chart.fixed(sign, like) for chart, sign in self._links]
        return frame(cores, self._modes)
