"""What `retract bench canonical` says of its results: tables, and accuracy against parameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .canonical_cell import METHODS, OPTIMIZER, STAGES, VALIDATED, VALIDATION, WARMUP, Cell, Settings
from .cells import mean_losses
from .paired_statistics import paired_difference
from .provenance import provenance
from .report import SERIES, Figure, Section, Table, figure_style, write_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["tables", "write_canonical_report"]

Results = dict[Cell, dict[str, Any]]
Group = tuple[
    str, str, float, str
]  # method, stage, fraction of terms, how it was shared out: cells that differ by seed

COLOURS = dict(zip((*METHODS, "scratch"), SERIES, strict=True))


def tables(results: Results) -> list[Table]:
    """The trained networks, how they differ, what is left of canonical ones, and the learning rates tried, of training
    and of fine-tuning.

    Args:
        results: the records of finished cells.
    """
    return [
        _trained(results),
        _differences(results),
        _smaller(results),
        _rates(results, "tuning", "Loss on the validation split; –: diverged, or not tried yet."),
        _rates(results, "fine-tuning", "The same, of fine-tuning what is left."),
    ]


# ------------------------------------------------------------------------------------------------------ the tables


def _trained(results: Results) -> Table:
    rows = []
    for (method, stage, _, _), records in _groups(results).items():
        if stage == "training":
            speeds = [record["steps_per_second"] for record in records if record["steps_per_second"] is not None]
            speed = f"{statistics.median(speeds):.2f}" if speeds else "–"
            converged = f"{len(_accuracies(records))} of {len(records)}"
            parameters, accuracy = f"{records[0]['parameters']:,}", _spread(_accuracies(records).values())
            rows.append([method, f"{records[0]['lr']:g}", converged, parameters, accuracy, speed])
    caption = (
        "Test accuracy, mean ± standard deviation over seeds. Seeds: converged of all. "
        "Steps/s: of runs on one thread each, side by side."
    )
    return Table(("weights", "lr", "seeds", "parameters", "accuracy %", "steps/s"), rows, caption)


def _differences(results: Results) -> Table:
    found = {group: _accuracies(records) for group, records in _groups(results).items()}
    trained = {method: found[group] for group in found for method, stage, *_ in [group] if stage == "training"}
    canonical = [method for method in trained if METHODS[method].cuts]
    pairs = [
        (f"{ours} less {theirs}", trained[ours], trained[theirs])
        for ours, theirs in product(canonical, trained)
        if theirs not in canonical
    ]
    pairs += [
        (f"{_name(group)}, at {100 * group[2]:g} % less from scratch", accuracies, found[scratch])
        for group, accuracies in found.items()
        for scratch in [(group[0], "scratch", group[2], "ratio")]
        if group[1] == "truncation" and scratch in found
    ]
    rows = [[name, *_interval(paired_difference(ours, theirs))] for name, ours, theirs in pairs]
    caption = "Test accuracy of one less that of the other, seed by seed, in points."
    return Table(("weights", "difference", "95 % interval"), rows, caption)


def _smaller(results: Results) -> Table:
    groups = _groups(results)
    plain = _accuracies(groups.get(("plain", "training", 1.0, "ratio"), []))
    rows = []
    for group, records in groups.items():
        if group[1] in ("truncation", "scratch"):
            parameters = f"{statistics.mean(record['parameters'] for record in records):,.0f}"
            before = _spread(_accuracies(records, "accuracy_before").values())
            accuracy = _spread(_accuracies(records).values())
            versus = _interval(paired_difference(_accuracies(records), plain))
            rows.append([_name(group), f"{100 * group[2]:g}", parameters, before, accuracy, *versus])
    header = ("weights", "terms %", "parameters", "before", "accuracy %", "less plain", "95 % interval")
    caption = (
        "Before: accuracy as the terms were cut, before fine-tuning. By ratio: that part of the terms of every layer; "
        "by error: one error over all layers, with no more parameters than by ratio. From scratch: trained with as few "
        "terms, by ratio, for as many epochs as training and fine-tuning together. Less plain: the plain networks had "
        "no epochs of fine-tuning."
    )
    return Table(header, rows, caption)


def _name(group: Group) -> str:
    method, stage, _, allocation = group
    return f"{method}, from scratch" if stage == "scratch" else f"{method}, by {allocation}"


def _rates(results: Results, stage: str, caption: str) -> Table:
    tried = {cell: record for cell, record in results.items() if cell.stage == stage}
    losses = mean_losses(tried, lambda cell: (cell.method, cell.fine_tuning_lr or cell.lr))
    rates = sorted({rate for found in losses.values() for rate in found})
    rows = [[method, *(_loss(losses[method].get(rate)) for rate in rates)] for method in METHODS if method in losses]
    return Table(("weights", *(f"lr {rate:g}" for rate in rates)), rows, caption)


def _loss(loss: float | None) -> str:
    return "–" if loss is None or loss == math.inf else f"{loss:.4f}"


def _groups(results: Results) -> dict[Group, list[dict[str, Any]]]:
    """Records of cells that differ by seed alone, larger networks first, of all stages that see the test images."""
    groups: dict[Group, list[dict[str, Any]]] = {}
    for cell, record in results.items():
        if cell.stage in VALIDATED:
            continue
        groups.setdefault((cell.method, cell.stage, cell.kept, cell.allocation), []).append(record)
    methods = list(METHODS)

    def place(group: Group) -> tuple[int, int, str, float]:
        method, stage, kept, allocation = group
        return methods.index(method), STAGES.index(stage), allocation, -kept

    return {group: groups[group] for group in sorted(groups, key=place)}


def _accuracies(records: Iterable[dict[str, Any]], key: str = "accuracy") -> dict[int, float]:
    """Percent by seed, of the runs that converged, and in which that was measured."""
    return {record["seed"]: 100 * record[key] for record in records if record.get(key) is not None}


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{deviation}"


def _interval(found: tuple[float, float, float] | None) -> list[str]:
    """Cells for a difference and its interval."""
    return ["–", "–"] if found is None else [f"{found[0]:+.2f}", f"{found[1]:+.2f} to {found[2]:+.2f}"]


# ------------------------------------------------------------------------------------------------------ the report


def write_canonical_report(path: Path, results: Results, settings: Settings) -> Path:
    """Write the tables, the plot, and what is needed to compute them again, as one HTML file; returns its path."""
    facts = provenance(
        **{name: value for name, value in vars(settings).items() if value is not None},
        optimizer=f"{OPTIMIZER}, no decay, cosine schedule after a warm-up of {100 * WARMUP:g} % of the run",
        validation=f"{100 * VALIDATION:g} % of the training images",
    )
    trained, differences, smaller, *tuning = tables(results)
    plot = Figure(
        _figure(results),
        "Accuracy against parameters, mean and standard deviation over seeds: after fine-tuning, and as the terms "
        "were cut. Dashed: terms shared out by one error over all layers.",
    )
    return write_report(
        path,
        title=f"Canonical networks on {settings.data}",
        summary="Networks with canonical weights, trained at the published ranks and cut afterwards.",
        sections=[
            Section("Trained networks", _TRAINED, [trained, differences]),
            Section("Fewer terms", _SMALLER, [plot, smaller]),
            Section("Learning rates", "", tuning),
        ],
        facts=facts,
    )


_TRAINED = """
One network with three kinds of weights: plain ones, weight-normalized ones, and sums of rank-one terms of the published
ranks, which begin in random directions. All have the same optimizer, epochs, schedule and batches, and each the best
learning rate of the same few. `canonical l1` is the canonical one with a proximal step of an l1 penalty on the weights
of its terms after every step, at the learning rate of the canonical one.
"""

_SMALLER = """
Terms are chosen one by one, each the one that lowers the error of the layer's weight the most; the weights of those
kept are refitted. Fine-tuning trains all that is left, without penalty, from the state that the optimizer had for it,
at one learning rate for all, which no validation split chose. `100 %` is fine-tuning without a cut.
"""


def _figure(results: Results) -> MatplotlibFigure:
    from matplotlib import pyplot

    with figure_style():
        figure, (after, before) = pyplot.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
        _curves(after, results, "accuracy")
        _curves(before, results, "accuracy_before")
        for ax, title in ((after, "after fine-tuning"), (before, "before fine-tuning")):
            ax.set(title=title, xlabel="parameters", xscale="log")
        after.set_ylabel("test accuracy, %")
        if after.get_legend_handles_labels()[0]:
            figure.legend(*after.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    pyplot.close(figure)
    return figure


def _curves(ax: Axes, results: Results, key: str) -> None:
    """A point for each network that was only trained, a curve for those that were cut in one way."""
    curves: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for (method, stage, _, allocation), records in _groups(results).items():
        measured = [record for record in records if record.get(key) is not None]
        if measured:
            values = list(_accuracies(measured, key).values())
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            parameters = statistics.mean(record["parameters"] for record in measured)
            point = (parameters, statistics.mean(values), deviation)
            curves.setdefault((method, stage, allocation), []).append(point)
    for (method, stage, allocation), points in curves.items():
        x, y, spread = zip(*points, strict=True)
        label = {
            "training": method,
            "truncation": f"{method}, cut by {allocation}",
            "scratch": f"{method}, from scratch",
        }[stage]
        style = {"training": "o", "truncation": ".-" if allocation == "ratio" else ".--", "scratch": "s:"}[stage]
        colour = COLOURS["scratch" if stage == "scratch" else method]
        ax.errorbar(x, y, spread, fmt=style, color=colour, capsize=2, label=label)
