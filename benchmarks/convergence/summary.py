"""Finished cells as the report's sections need them: by method and seed, with their settings, as bands of curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from .export import Results
from .figures import Band
from .methods import METHODS, Method
from .statistics import PairedTest, median_interval

__all__ = [
    "AT_EDGE",
    "SETTINGS",
    "band",
    "by_method",
    "by_seed",
    "converged",
    "curve_band",
    "grouped",
    "number",
    "ordered",
    "seeds",
    "settings",
    "spread",
    "tuned",
    "verdict",
]

SETTINGS = ("lr", "lr of others", "decay")
"""The header of `settings`."""
AT_EDGE = "*: the lowest or the highest rate of the method's grid, so that one beyond may be better."
"""What `tuned` marks."""

RESAMPLES, LEVEL = 1000, 0.95  # of the bootstrap of bands

Record = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)


def grouped(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    """Records by a key, in the order in which each comes first."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by method, in the order of `ordered`."""
    groups = grouped(records, lambda record: str(record["method"]))
    return {method: groups[method] for method in ordered(groups)}


def ordered(methods: Iterable[str]) -> list[str]:
    """Names in the order of the methods' table, one with a decay of its own after that without; then all others."""
    places = {name: place for place, name in enumerate(METHODS)}
    return sorted(dict.fromkeys(methods), key=lambda name: (places.get(name.partition(",")[0], len(places)), name))


def converged(records: Iterable[Record]) -> list[Record]:
    """Those that did not diverge."""
    return [record for record in records if record["status"] != "diverged"]


def by_seed(records: Iterable[Record], name: str) -> dict[int, float]:
    """A result by seed, of the runs that have it."""
    return {record["seed"]: record[name] for record in records if record.get(name) is not None}


def seeds(records: Sequence[Record]) -> str:
    """How many converged of all."""
    return f"{len(converged(records))} of {len(records)}"


def settings(records: Sequence[Record]) -> list[str]:
    """The learning rates and the decay of runs of one method; their range where they differ."""
    return [_range([record.get(name) for record in records]) for name in ("lr", "euclidean_lr", "weight_decay")]


def tuned(records: Sequence[Record], method: Method, factor: float = 1.0) -> list[str]:
    """The settings of runs of one method, with a star after a rate at the end of its grid.

    Args:
        records: the runs.
        method: whose grid it is.
        factor: of the rates of these runs, over those that were tuned.
    """
    edges = method.at_edges(records[0]["lr"] / factor, records[0]["euclidean_lr"] / factor)
    return [text + "*" * edge for text, edge in zip(settings(records), (*edges, False), strict=True)]


def _range(values: Sequence[float | None]) -> str:
    found = sorted({value for value in values if value is not None})
    if not found:
        return "–"
    return f"{found[0]:.3g}" if len(found) == 1 else f"{found[0]:.3g} to {found[-1]:.3g}"


def number(value: float | None, form: str = ".3g") -> str:
    """A number in that form, "–" where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def spread(values: Iterable[float], form: str = ".3g", *, infinite: str = "never") -> str:
    """Median and its interval over seeds: "0.93 [0.92, 0.95]"; "–" of none.

    Args:
        values: one a seed, infinite for a run that did not get there.
        form: of the numbers.
        infinite: stands for a median, or an end of the interval, that is.
    """
    found = list(values)
    if not found:
        return "–"
    summary = median_interval(found)
    middle, low, high = (
        infinite if math.isinf(x) else f"{x:{form}}" for x in (summary.median, summary.low, summary.high)
    )
    if middle == infinite or summary.count == 1:
        return middle
    return f"{middle} [{low}, {high}]"


def verdict(test: PairedTest, *, higher_is_better: bool) -> str:
    """Whether a method is ahead or behind, or no difference is seen; differences without spread were not tested."""
    if test.low == test.high and test.difference != 0:
        return "the same at every seed, not tested"
    if not test.seen:
        return "no difference seen"
    return "ahead" if (test.difference > 0) == higher_is_better else "behind"


def curve_band(results: Results, records: Iterable[Record], name: str, *, timed: bool = False) -> Band | None:
    """The median of a curve over runs, at the steps that all have.

    Args:
        results: what has the curves.
        records: the runs.
        name: of the curve.
        timed: over the median of the seconds, not over steps.
    """
    curves = [results.curve(record, name) for record in converged(records)]
    points = [{x: (y, time) for x, y, time in curve if x is not None and y is not None} for curve in curves if curve]
    if not points:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in points)))
    if timed:
        times = [[curve[step][1] for curve in points] for step in steps]
        if any(time is None for row in times for time in row):
            return None
        x = [float(np.median(row)) for row in np.array(times, dtype=float)]
    else:
        x = steps
    return band(x, [[curve[step][0] for step in steps] for curve in points])


def band(x: Sequence[float], curves: Sequence[Sequence[float]]) -> Band:
    """The pointwise median of curves over ``x``, and the percentile bootstrap's interval of it.

    Args:
        x: (points,).
        curves: (runs, points).
    """
    values = np.asarray(curves, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Band(list(x), list(np.median(values, axis=0)), list(low), list(high))
