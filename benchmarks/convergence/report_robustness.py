"""What the report of `retract bench convergence` says of robustness: over learning rates and initial scales."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..report import Figure, Section, Table
from .export import Results
from .figures import Cell, heat_maps
from .statistics import PairedTest, compare_pairs
from .summary import by_method, converged, grouped, number, seeds, spread, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["robustness_sections"]

REFERENCE = "SGD"
SHARE = 0.95  # of the best accuracy: what the region reaches
USUAL = 1.0  # start

Record = Mapping[str, Any]
Place = tuple[float, float]  # factor of the weights, and learning rate
Grid = Mapping[Place, Sequence[Record]]


def robustness_sections(results: Results) -> list[Section]:
    """For every data set and network the region that trains, and training from filters and layers out of scale."""
    final = [r for r in results.metrics() if r["protocol"] == "robustness" and r["stage"] == "final"]
    found = []
    for (data, model), records in grouped(final, lambda record: (record["data"], record["model"])).items():
        scaled = by_method(record for record in records if not isinstance(record["start"], str))
        grids = {method: grouped(runs, lambda run: (run["start"], run["lr"])) for method, runs in scaled.items()}
        text, items = _region(grids) if grids else ("", [])
        found.append(Section(f"Robustness: {model} on {data}", text, [*items, *_named_starts(records)]))
    return found


# ------------------------------------------------------------------------------------------------------ the region


def _region(grids: Mapping[str, Grid]) -> tuple[str, list[Figure | Table]]:
    """What was done, the maps, and the regions' areas."""
    medians = {method: {place: _median(runs) for place, runs in grid.items()} for method, grid in grids.items()}
    bar = SHARE * max(value for found in medians.values() for value in found.values())
    areas = {method: _shares(grid, bar) for method, grid in grids.items()}
    reference = areas.get(REFERENCE, {})
    tests = compare_pairs({method: (found, reference) for method, found in areas.items() if method != REFERENCE})
    text = (
        "Accuracy from initial weights multiplied by one factor, over learning rates of the scale-invariant weights, "
        f"all else as tuned from the usual start. The region is where a run reaches {100 * bar:.1f} %, "
        f"{100 * SHARE:g} % of the best median of all methods."
    )
    caption = (
        "Median accuracy over seeds in percent; 0 for a run that diverged, × where the median run did. Framed: in the "
        "region. Learning rates in parts of the middle one of the method's range."
    )
    return text, [Figure(_maps(grids, medians, bar), caption), _areas_table(grids, bar, areas, tests)]


def _accuracy(run: Record) -> float:
    """Of the last epoch, 0 of a run that diverged."""
    return float(run["accuracy"] or 0.0)


def _median(runs: Sequence[Record]) -> float:
    return statistics.median(map(_accuracy, runs))


def _shares(grid: Grid, bar: float) -> dict[int, float]:
    """By seed: the part of the cells that reach the bar, in percent; of seeds that all cells were run from."""
    reached: dict[int, list[bool]] = {}
    for runs in grid.values():
        for run in runs:
            reached.setdefault(run["seed"], []).append(_accuracy(run) >= bar)
    return {seed: 100 * statistics.mean(found) for seed, found in reached.items() if len(found) == len(grid)}


def _row(grid: Grid) -> Grid:
    """The cells of the usual start."""
    return {(start, lr): runs for (start, lr), runs in grid.items() if start == USUAL}


def _column(grid: Grid) -> Grid:
    """The cells of the tuned learning rate, the one in the middle."""
    rates = sorted({lr for _, lr in grid})
    middle = rates[(len(rates) - 1) // 2]
    return {(start, lr): runs for (start, lr), runs in grid.items() if lr == middle}


def _areas_table(
    grids: Mapping[str, Grid], bar: float, areas: Mapping[str, Mapping[int, float]], tests: Mapping[str, PairedTest]
) -> Table:
    rows = []
    for method, grid in grids.items():
        runs = [run for found in grid.values() for run in found]
        test = tests.get(method)
        less, words, p = "–", "–", "–"
        if test is not None:
            less = f"{test.difference:+.1f} [{test.low:+.1f}, {test.high:+.1f}]"
            words = verdict(test, higher_is_better=True)
            p = number(test.p, ".2g")
        rates = [f"{rate:.2g}" for rate in (min(lr for _, lr in grid), max(lr for _, lr in grid))]
        area = spread(areas[method].values(), ".1f")
        lines = [spread(_shares(part, bar).values(), ".0f") for part in (_column(grid), _row(grid))]
        rows.append([method, " to ".join(rates), str(len(grid)), seeds(runs), *lines, area, less, p, words])
    parts = ("scales at the tuned rate, %", "rates from the usual start, %", "region, % of cells")
    header = ("method", "learning rates", "cells", "runs", *parts, f"less {REFERENCE}", "p", f"beside {REFERENCE}")
    caption = (
        "How many scales, rates and cells of both are in the region: median [95 % bootstrap interval] over seeds. Less "
        f"{REFERENCE}: mean difference of the cells [95 % interval], paired by seed; p-values of the t-test, corrected "
        "by Holm. Runs: converged of all."
    )
    return Table(header, rows, caption)


def _maps(grids: Mapping[str, Grid], medians: Mapping[str, Mapping[Place, float]], bar: float) -> MatplotlibFigure:
    starts = sorted({start for grid in grids.values() for start, _ in grid})
    rates = {method: sorted({lr for _, lr in grid}) for method, grid in grids.items()}
    longest = max(rates.values(), key=len)
    columns = [f"{rate / longest[(len(longest) - 1) // 2]:.2g}" for rate in longest]
    maps = {
        method: [
            [_cell(grid.get((start, lr)), medians[method].get((start, lr)), bar) for lr in rates[method]]
            for start in starts
        ]
        for method, grid in grids.items()
    }
    rows = [f"{start:g}" for start in starts]
    return heat_maps(maps, columns=columns, rows=rows, xlabel="learning rate", ylabel="initial scale")


def _cell(runs: Sequence[Record] | None, median: float | None, bar: float) -> Cell | None:
    if runs is None or median is None:
        return None
    if len(converged(runs)) <= len(runs) / 2:
        return Cell(0.0, "×")
    return Cell(median, f"{100 * median:.0f}", median >= bar)


# ------------------------------------------------------------------------------------ filters and layers out of scale


def _named_starts(records: Sequence[Record]) -> list[Table]:
    """Accuracy from starts that have a name, beside the usual one at the same settings; none if there are no such."""
    names = list(dict.fromkeys(record["start"] for record in records if isinstance(record["start"], str)))
    found: dict[str, dict[str, dict[int, float]]] = {}
    for method, runs in by_method(records).items():
        rates = {run["lr"] for run in runs if run["start"] in names}
        own = [run for run in runs if run["lr"] in rates and run["start"] in (USUAL, *names)]
        starts = grouped(own, lambda run: "usual" if run["start"] == USUAL else str(run["start"]))
        found[method] = {name: {r["seed"]: 100 * _accuracy(r) for r in group} for name, group in starts.items()}
    tests = {
        name: compare_pairs(
            {m: (starts[name], starts.get("usual", {})) for m, starts in found.items() if name in starts}
        )
        for name in names
    }
    rows = [
        [
            method,
            *(spread(starts.get(name, {}).values(), ".2f") for name in ("usual", *names)),
            *(_change(tests[name].get(method)) for name in names),
        ]
        for method, starts in found.items()
        if starts
    ]
    header = ("method", "usual", *names, *(f"{name} less usual" for name in names))
    caption = (
        "Accuracy in percent from the usual start and from filters or layers out of scale, at the settings tuned for "
        "the usual one: median [95 % bootstrap interval] over seeds, 0 for a run that diverged. Less usual: mean [95 % "
        "interval], paired by seed, by Student's t; the word by the t-test corrected by Holm over its column."
    )
    return [Table(header, rows, caption)] if names else []


def _change(test: PairedTest | None) -> str:
    if test is None:
        return "–"
    return f"{test.difference:+.2f} [{test.low:+.2f}, {test.high:+.2f}], {verdict(test, higher_is_better=True)}"
