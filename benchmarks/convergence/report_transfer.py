"""What the report of `retract bench convergence` says of learning rates that are kept when a network grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..report import Figure, Section, Table
from .export import Results
from .figures import Band, line_panels
from .networks import BASE, SIZED
from .statistics import median_interval
from .summary import band, by_method, converged, grouped, number, seeds, spread

__all__ = ["transfer_sections"]

LOSS = "unseen_loss"  # on the validation split

Record = Mapping[str, Any]
Rates = Mapping[float, Sequence[Record]]


def transfer_sections(results: Results) -> list[Section]:
    """A section for every data set."""
    runs = [r for r in results.metrics() if r["protocol"] == "transfer" and r["stage"] == "transfer"]
    return [_section(data, records) for data, records in grouped(runs, lambda record: str(record["data"])).items()]


def _section(data: str, records: Sequence[Record]) -> Section:
    found = {method: _by_size(runs) for method, runs in by_method(records).items()}
    panels = {method: _panel(sizes) for method, sizes in found.items()}
    items: list[Figure | Table] = []
    if shown := {method: panel for method, panel in panels.items() if panel}:
        figure = line_panels(shown, xlabel="learning rate", ylabel="loss on the validation split", xscale="log")
        caption = "Loss on the validation split over learning rates: median over seeds, 95 % bootstrap interval."
        items.append(Figure(figure, caption))
    text = (
        "One small network at several widths and depths, over learning rates of its scale-invariant weights; the "
        f"other settings are those tuned for the one in the middle ({BASE}). A rate transfers where the best rate of "
        "that one costs other sizes little."
    )
    return Section(f"Transfer of the learning rate: {data}", text, [*items, _table(found)])


def _by_size(records: Sequence[Record]) -> dict[str, Rates]:
    """Runs by network, in the order of their table, and by learning rate from the lowest."""
    sizes = grouped(records, lambda record: str(record["model"]))
    known = [name for name in SIZED if name in sizes]
    rates = {name: grouped(sizes[name], lambda record: float(record["lr"])) for name in [*known, *sizes]}
    return {name: {lr: found[lr] for lr in sorted(found)} for name, found in rates.items()}


def _median(runs: Sequence[Record]) -> float:
    """Of the loss; that of a run that diverged is infinite."""
    return median_interval([math.inf if run[LOSS] is None else run[LOSS] for run in runs]).median


def _best(rates: Rates) -> float | None:
    """The learning rate of the lowest median loss; None if all diverged."""
    medians = {lr: _median(runs) for lr, runs in rates.items()}
    best = min(medians, key=medians.__getitem__)
    return None if math.isinf(medians[best]) else best


def _panel(sizes: Mapping[str, Rates]) -> dict[str, Band]:
    """Losses over the learning rates at which no run diverged."""
    found = {}
    for name, rates in sizes.items():
        whole = {lr: runs for lr, runs in rates.items() if len(converged(runs)) == len(runs)}
        count = min(map(len, whole.values()), default=0)
        if count:
            losses = [[runs[seed][LOSS] for runs in whole.values()] for seed in range(count)]
            found[name] = band(list(whole), losses)
    return found


def _table(found: Mapping[str, Mapping[str, Rates]]) -> Table:
    rows = []
    for method, sizes in found.items():
        transferred = _best(sizes[BASE]) if BASE in sizes else None
        for name, rates in sizes.items():
            best = _best(rates)
            runs = [run for own in rates.values() for run in own]
            moved = None if best is None or transferred is None else math.log10(best / transferred)
            own = "diverged" if best is None else spread(_losses(rates[best]).values(), ".2g")
            cost = "–"
            if best is not None and transferred is not None and transferred in rates:
                kept, ideal = _losses(rates[transferred]), _losses(rates[best])
                cost = spread(
                    [kept[seed] / ideal[seed] for seed in kept.keys() & ideal.keys()], ".3g", infinite="diverged"
                )
            rows.append([method, name, seeds(runs), number(best), number(moved, "+.2f"), own, cost])
    header = (
        "method",
        "network",
        "runs",
        "best lr",
        "decades from the middle's",
        "loss there",
        "loss at the middle's, ratio",
    )
    caption = (
        "Loss there: on the validation split after the last epoch, at the network's own best rate. Ratio: the "
        "loss at the rate that is best for the network in the middle, over that. "
        "Median [95 % bootstrap interval] over seeds."
    )
    return Table(header, rows, caption)


def _losses(runs: Sequence[Record]) -> dict[int, float]:
    """By seed; infinite for a run that diverged."""
    return {run["seed"]: math.inf if run[LOSS] is None else run[LOSS] for run in runs}
