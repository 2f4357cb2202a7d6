"""What the figures of `retract bench convergence` have in common: a look for each method, bands, heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report import INK, SERIES, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["OURS", "Band", "Cell", "draw_bands", "heat_maps", "is_ours", "line_panels", "look", "two_panels"]

OURS = ("PSI", "Riemannian")
"""How the names of this library's optimizers begin."""

LINES = ("-", "--", "-.", ":")
LEAST, MOST = 0.04, 0.6  # opacity of a heat map's cells: what is written on them stays readable, dark page or light
COLUMNS = 3  # of heat maps


def is_ours(method: str) -> bool:
    """Whether a method is one of this library's."""
    return method.startswith(OURS)


def look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Colour and dashes of a method's line: its own among those of ours, or among the others."""
    place = [name for name in methods if is_ours(name) == is_ours(method)].index(method)
    return {"color": SERIES[place % len(SERIES)], "linestyle": LINES[place // len(SERIES) % len(LINES)]}


@dataclass(frozen=True)
class Band:
    """A median curve, and the ends of its interval."""

    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw_bands(ax: Axes, bands: Mapping[str, Band], methods: Sequence[str]) -> None:
    """Every method's curve over its band, in its own look."""
    for method, band in bands.items():
        style = look(method, methods)
        ax.plot(band.x, band.middle, label=method, linewidth=1.4, **style)
        ax.fill_between(band.x, band.low, band.high, color=style["color"], alpha=0.15, linewidth=0)


def two_panels(
    bands: Mapping[str, Band],
    methods: Iterable[str],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    slope: float | None = None,
) -> MatplotlibFigure:
    """The other methods' curves on the left, ours on the right, on the same axes.

    Args:
        bands: of each method.
        methods: all of the report, in order: a method looks the same in all its figures.
        xlabel: what the horizontal axes show.
        ylabel: what the vertical ones do.
        xscale: as of matplotlib.
        yscale: likewise.
        slope: of a dotted guide on logarithmic axes, of ``x ** slope``.
    """
    from matplotlib import pyplot

    names = list(methods)
    with figure_style():
        figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained", sharex=True, sharey=True)
        for ax, ours, title in zip(axes, (False, True), ("other methods", "this library's"), strict=True):
            draw_bands(ax, {name: band for name, band in bands.items() if is_ours(name) == ours}, names)
            ax.set(title=title, xlabel=xlabel, xscale=xscale, yscale=yscale)
            ax.minorticks_off()
            if slope is not None:
                _guide(ax, bands.values(), slope)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)
        axes[0].set_ylabel(ylabel)
    pyplot.close(figure)
    return figure


def _guide(ax: Axes, bands: Iterable[Band], slope: float) -> None:
    """A line of the slope through the middle of the beginnings."""
    begins = [(band.x[0], band.middle[0]) for band in bands if band.x and band.x[0] > 0 and band.middle[0] > 0]
    ends = [band.x[-1] for band in bands if band.x]
    if begins:
        left, right = min(x for x, _ in begins), max(ends)
        top = math.exp(float(np.median([math.log(y) for _, y in begins])))
        label = f"T to the power {slope:g}"
        ax.plot([left, right], [top, top * (right / left) ** slope], ":", color=INK, linewidth=1.2, label=label)


def line_panels(
    panels: Mapping[str, Mapping[str, Band]], *, xlabel: str, ylabel: str, xscale: str = "linear"
) -> MatplotlibFigure:
    """A panel for each method, with the same lines in all, over logarithmic values.

    Args:
        panels: bands by method and line.
        xlabel: what the horizontal axes show.
        ylabel: what the vertical ones do.
        xscale: as of matplotlib.
    """
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for bands in panels.values() for name in bands))
    across = min(COLUMNS, len(panels))
    down = math.ceil(len(panels) / across)
    with figure_style():
        figure, axes = pyplot.subplots(
            down, across, figsize=(3.2 * across, 0.8 + 2.4 * down), layout="constrained", sharey=True, squeeze=False
        )
        for ax, (method, bands) in zip(axes.flat, panels.items(), strict=False):
            ax.set(title=method, xscale=xscale, yscale="log")
            ax.minorticks_off()
            for name, band in bands.items():
                place = names.index(name)
                style = {"color": SERIES[place % len(SERIES)], "linestyle": LINES[place // len(SERIES) % len(LINES)]}
                ax.plot(band.x, band.middle, label=name, linewidth=1.3, **style)
                ax.fill_between(band.x, band.low, band.high, color=style["color"], alpha=0.15, linewidth=0)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        figure.supxlabel(xlabel, fontsize=10)
        figure.supylabel(ylabel, fontsize=10)
        lines = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=4, fontsize=9)
    pyplot.close(figure)
    return figure


# ------------------------------------------------------------------------------------------------------ heat maps


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: how dark, 0 to 1, what is written on it, and whether it has a frame."""

    depth: float
    text: str
    framed: bool = False


def heat_maps(
    maps: Mapping[str, Sequence[Sequence[Cell | None]]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    xlabel: str,
    ylabel: str,
) -> MatplotlibFigure:
    """A heat map for each method, of one scale.

    Args:
        maps: of each method, rows of cells from the top; None where nothing was measured.
        columns: names of the cells' columns.
        rows: of their rows.
        xlabel: what the columns are.
        ylabel: what the rows are.
    """
    from matplotlib import pyplot

    across = min(COLUMNS, len(maps))
    down = math.ceil(len(maps) / across)
    size = (1.2 + across * max(2.2, 0.42 * len(columns)), 0.9 + down * (0.7 + 0.34 * len(rows)))
    with figure_style():
        figure, axes = pyplot.subplots(
            down, across, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
        )
        for ax, (method, cells) in zip(axes.flat, maps.items(), strict=False):
            ax.set_title(method)
            _heat_map(ax, cells)
        for ax in axes.flat[len(maps) :]:
            ax.set_axis_off()
        first = axes[0, 0]
        first.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        first.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 6 else 0)
        first.set_yticks(range(len(rows)), rows)
        figure.supxlabel(xlabel, fontsize=10)
        figure.supylabel(ylabel, fontsize=10)
    pyplot.close(figure)
    return figure


def _heat_map(ax: Axes, cells: Sequence[Sequence[Cell | None]]) -> None:
    from matplotlib.patches import Rectangle

    ax.grid(visible=False)
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            if cell is None:
                continue
            corner, opacity = (column - 0.5, row - 0.5), LEAST + (MOST - LEAST) * cell.depth
            ax.add_patch(Rectangle(corner, 1, 1, facecolor=SERIES[1], alpha=opacity, linewidth=0))
            if cell.framed:
                inner = (column - 0.44, row - 0.44)
                ax.add_patch(Rectangle(inner, 0.88, 0.88, fill=False, edgecolor=INK, linewidth=1.1))
            ax.text(column, row, cell.text, ha="center", va="center", fontsize=7)
