"""What `retract bench init` says of its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retract.nets.init.variance_report import WINDOW

from .cells import mean_losses
from .init import RATES
from .init_cell import Cell, Settings
from .init_depth import CHANNELS, DEPTH, DRAWS, NETWORKS, network
from .init_methods import INITIALIZATIONS
from .provenance import provenance
from .report import SERIES, Figure, Section, Table, figure_style, write_report

__all__ = ["tables", "write_init_report"]

Record = Mapping[str, Any]


def tables(records: Sequence[Record]) -> list[Table]:
    """Those of the parts that were computed, in this order: Var(W), forward and backward ratios, training, its rates.

    Args:
        records: of finished cells.
    """
    found = [_weights(records), _ratios(records, "forward"), _ratios(records, "backward")]
    found += [_training(records), _tuning(records)]
    return [table for table in found if table.rows]


# ------------------------------------------------------------------------------------------------- without training


def _by_network(records: Sequence[Record], part: str, cell: Any, caption: str) -> Table:
    """A row for each network and a column for each initialization."""
    found = {(r["network"], r["initialization"]): r for r in records if r["part"] == part}
    rows = []
    for name in NETWORKS:
        cells = [found.get((name, initialization)) for initialization in INITIALIZATIONS]
        if any(cells):
            rows.append([_label(name), *("–" if record is None else cell(record) for record in cells)])
    return Table(("network", *INITIALIZATIONS), rows, caption)


def _label(name: str) -> str:
    """Its bonds, too, which the formats have different numbers of."""
    found = network(name)
    bonds = ", ".join(f"{bond}={found.dims[bond]}" for bond in found.bonds)
    return f"{name} ({bonds})" if bonds else name


def _weights(records: Sequence[Record]) -> Table:
    caption = (
        f"Var(W) over 2/fan_in, a convolution of {CHANNELS} to {CHANNELS} channels, mean of {DRAWS['weights']} draws; "
        "in brackets their standard deviation in percent of the mean. –: there is no such initialization."
    )
    return _by_network(records, "weights", lambda r: f"{r['mean']:.3g} ({100 * r['variation']:.0f} %)", caption)


def _ratios(records: Sequence[Record], direction: str) -> Table:
    low, high = WINDOW
    what = {"forward": "outputs", "backward": "gradients, backward"}[direction]
    caption = (
        f"{direction.capitalize()}: second moments from layer to layer of {what}, {DEPTH} layers with ReLU, mean of "
        f"{DRAWS['depth']} draws, arithmetic | geometric. ✓: the arithmetic mean is in [{low:g}, {high:g}]."
    )

    def cell(record: Record) -> str:
        arithmetic, geometric = record[direction]["arithmetic"], record[direction]["geometric"]
        return f"{arithmetic:.3g} | {geometric:.3g}" + (" ✓" if low <= arithmetic <= high else "")

    return _by_network(records, "depth", cell, caption)


# -------------------------------------------------------------------------------------------------------- training


def _training(records: Sequence[Record]) -> Table:
    """Mean and standard deviation over seeds."""
    rows = []
    for names, group in _final(records).items():
        converged = [r for r in group if r["train_loss"] is not None]
        figures = [_spread([r[key] for r in converged]) for key in ("train_loss", "unseen_loss")]
        accuracy = _spread([100 * r["accuracy"] for r in converged])
        rows.append([*names, f"{group[0]['lr']:g}", f"{len(converged)} of {len(group)}", *figures, accuracy])
    header = ("format", "initialization", "lr", "seeds", "train loss", "test loss", "test accuracy %")
    caption = (
        "Seeds: those that did not end in NaN, of all. Train loss: mean over the last epoch; chance is "
        f"{math.log(10):.3f} for ten classes. ±: standard deviation over seeds."
    )
    return Table(header, rows, caption)


def _final(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records of the compared runs by (format, initialization), ours first."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["part"] == "training" and not record["tuning"]:
            groups.setdefault((record["format"], record["initialization"]), []).append(record)
    order = list(INITIALIZATIONS)
    return {names: groups[names] for names in sorted(groups, key=lambda names: (names[0], order.index(names[1])))}


def _spread(values: Sequence[float]) -> str:
    """Of figures that may be of any size: a network that explodes need not reach infinity."""
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    style = ".3f" if max(values) < 1000 else ".1e"
    return f"{statistics.mean(values):{style}} ± {deviation:{style}}"


def _tuning(records: Sequence[Record]) -> Table:
    """Loss on held-out images at every learning rate."""
    tuned = {Cell.of(record): record for record in records if record["part"] == "training" and record["tuning"]}
    losses = mean_losses(tuned, lambda cell: ((cell.format, cell.initialization), cell.lr))
    rows = [[*names, *(_loss(rates.get(lr)) for lr in RATES)] for names, rates in losses.items()]
    header = ("format", "initialization", *(f"lr {lr:g}" for lr in RATES))
    caption = "Loss on held-out training images after the tuning runs, mean over seeds; –: diverged, or not tried yet."
    return Table(header, rows, caption)


def _loss(loss: float | None) -> str:
    return "–" if loss is None or loss == math.inf else f"{loss:.4g}"


def _curves(records: Sequence[Record]) -> Figure | None:
    """Training loss against epochs, the mean over seeds, for each format."""
    from matplotlib.figure import Figure as MatplotlibFigure

    groups = _final(records)
    formats = list(dict.fromkeys(format for format, _ in groups))
    if not formats:
        return None
    with figure_style():
        figure = MatplotlibFigure(figsize=(3.2 * len(formats), 3.0), layout="constrained")
        panels = figure.subplots(1, len(formats), sharey=True, squeeze=False)[0]
        for axes, format in zip(panels, formats, strict=True):
            names = [name for found, name in groups if found == format]
            for name, colour in zip(names, SERIES, strict=False):
                curves = [record["curve"] for record in groups[format, name]]
                mean = [statistics.mean(losses) for losses in zip(*curves, strict=False)]
                axes.plot(range(1, len(mean) + 1), mean, color=colour, label=name)
            axes.set_title(format)
            axes.set_xlabel("epoch")
        panels[0].set_ylabel("training loss")
        panels[0].set_ylim(0, 2 * math.log(10))
        panels[-1].legend(fontsize="small")
    return Figure(figure, "Training loss, mean over seeds. Curves that leave the picture explode.")


def write_init_report(path: Path, records: Sequence[Record], settings: Settings, text: str) -> Path:
    """Write the tables, the curves, and what is needed to compute them again, as one HTML file; returns its path."""
    curves = _curves(records)
    items: list[Figure | Table] = [*tables(records), *([] if curves is None else [curves])]
    facts = provenance(**{name: value for name, value in vars(settings).items() if value is not None}, optimizer="Adam")
    return write_report(
        path,
        title="Initializations of tensorial convolutions",
        summary="Each initialization at the best of the same few learning rates, chosen on held-out training images.",
        sections=[Section("Results", text, items)],
        facts=facts,
    )
