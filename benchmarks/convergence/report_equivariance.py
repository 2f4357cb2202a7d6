"""What the report of `retract bench convergence` says of equivariance: two starts that are one function, two curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..report import Figure, Section, Table
from .equivariance import STARTS
from .export import Results
from .figures import Band, line_panels
from .methods import find_method
from .summary import by_method, curve_band, grouped, number

__all__ = ["equivariance_sections"]

CURVES = ("usual", "rescaled")
SHOWN = ("SGD", "AdamW", "Muon", "PSISGD", "PSIAngular", "PSIAdam")  # methods
POWERS, FILTERS = STARTS

Record = Mapping[str, Any]


def equivariance_sections(results: Results) -> list[Section]:
    """A section for every data set and network on which two starts were compared."""
    records = [record for record in results.metrics() if record["stage"] == "equivariance"]
    tasks = grouped(records, lambda record: (record["data"], record["model"]))
    return [_section(results, data, model, own) for (data, model), own in tasks.items()]


def _section(results: Results, data: str, model: str, records: Sequence[Record]) -> Section:
    methods = by_method(records)
    panels = {method: _panel(results, methods[method]) for method in SHOWN if method in methods}
    items: list[Figure | Table] = [_table(methods)]
    if shown := {method: panel for method, panel in panels.items() if panel}:
        figure = line_panels(shown, xlabel="steps", ylabel="training loss of the batch")
        caption = (
            "Loss from the usual start and with every filter multiplied by its own 10^U(-1.5, 1.5): median over seeds."
        )
        items.insert(0, Figure(figure, caption))
    return Section(f"Equivariance: {model} on {data}", _TEXT.strip(), items)


_TEXT = """
Multiplying the filters before a BatchNorm changes nothing that the network computes. Each method trains in float64,
with an epsilon of BatchNorm that is as good as none, from the usual weights and from rescaled ones, on the same
batches. To a method on the manifold the two are one start: its curves coincide up to rounding, and bit for bit where
all factors are powers of two.
"""


def _panel(results: Results, runs: Sequence[Record]) -> dict[str, Band]:
    chosen = [run for run in runs if run["start"] == FILTERS]
    bands = {name: curve_band(results, chosen, name) for name in CURVES}
    return {name: band for name, band in bands.items() if band is not None}


def _table(methods: Mapping[str, Sequence[Record]]) -> Table:
    rows = []
    for method, runs in methods.items():
        starts = grouped(runs, lambda run: str(run["start"]))
        largest = [_largest(starts.get(start, [])) for start in (FILTERS, POWERS)]
        equal = [bool(run["equal"]) for run in starts.get(POWERS, [])]
        bits = "–" if not equal else "yes" if all(equal) else "no"
        construction = "yes" if find_method(method).equivariant else "no"
        rows.append([method, construction, *largest, bits, str(len(runs))])
    header = ("method", "by construction", "filters", "powers of two", "same bits", "runs")
    caption = (
        "Largest difference between the two losses of a step, in parts of the first loss, over all steps and seeds. "
        "Same bits: whether all losses are equal where the factors are powers of two."
    )
    return Table(header, rows, caption)


def _largest(runs: Sequence[Record]) -> str:
    found = [math.inf if run["max_difference"] is None else run["max_difference"] for run in runs]
    if not found:
        return "–"
    return "diverged" if math.isinf(max(found)) else number(max(found), ".1e")
