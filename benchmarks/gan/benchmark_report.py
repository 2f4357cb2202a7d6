"""What `retract bench gan` says of its results: tables, curves, and samples of every constraint."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cells import mean_losses
from ..paired_statistics import compare
from ..provenance import provenance
from ..report import SERIES, Figure, Section, Table, figure_style, write_report
from .benchmark import RATES
from .cell import MANIFOLD_RATIO, METHODS, Cell, Settings
from .observer import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["BASELINE", "tables", "write_gan_benchmark_report"]

Results = dict[Cell, dict[str, Any]]

BASELINE = "sn"


def tables(results: Results) -> list[Table]:
    """Samples, differences from spectral normalization, spectra, and the learning rates tried.

    Args:
        results: the records of finished cells.
    """
    return [_samples(results), _differences(results), _spectra(results), _tuning(results)]


# ------------------------------------------------------------------------------------------------------ the tables


def _samples(results: Results) -> Table:
    rows = []
    for method, records in _final(results).items():
        found = [record["metrics"] for record in records.values() if record["metrics"] is not None]
        lost = sum(metrics["mode_coverage"] < 1 for metrics in found)
        metrics = [
            _spread([one[name] for one in found], digits)
            for name, digits in (("frechet_distance", 2), ("precision", 2), ("recall", 2), ("coverage", 2))
        ]
        cell = next(cell for cell in results if cell.method == method and not cell.tuning)
        finished = f"{len(found)} of {len(records)}"
        rows.append([method, f"{cell.lr:g}", finished, *metrics, f"{lost} of {len(found)}"])
    caption = (
        "Against test images, in the features of a classifier: mean ± standard deviation over seeds. Seeds: those that "
        "did not end in NaN, of all. Lost a class: runs whose samples miss one of the data's classes."
    )
    header = ("constraint", "lr", "seeds", "Fréchet distance", "precision", "recall", "coverage", "lost a class")
    return Table(header, rows, caption)


def _differences(results: Results) -> Table:
    final = {method: _distances(records) for method, records in _final(results).items()}
    base = final.get(BASELINE, {})
    found = compare({method: (ours, base) for method, ours in final.items() if method != BASELINE})
    rows = [
        [
            method,
            f"{one.difference:+.2f}",
            f"{one.difference - one.half_width:+.2f} to {one.difference + one.half_width:+.2f}",
            f"{one.p:.3f}",
            one.worded(higher_is_better=False),
        ]
        for method, one in found.items()
    ]
    caption = (
        f"Fréchet distance less that under {BASELINE}, seed by seed; p-values of paired t-tests, corrected for all of "
        "them by Holm's procedure."
    )
    return Table(("constraint", "difference", "95 % interval", "p", f"beside {BASELINE}"), rows, caption)


def _spectra(results: Results) -> Table:
    rows = []
    for method, records in _final(results).items():
        measured = [record for record in records.values() if record["spectra"] is not None]
        layers = [list(record["spectra"].values()) for record in measured]
        ranks = [statistics.mean(layer["stable_rank"] for layer in one) for one in layers]
        least = [min(layer["stable_rank"] for layer in one if _has_several(layer)) for one in layers]
        violations = [record["violation"] for record in measured]
        speeds = [record["steps_per_second"] for record in measured]
        rows.append(
            [
                method,
                f"{max(violations):.1e}" if violations else "–",
                _spread(ranks, 1),
                _spread(least, 1),
                _spread([record["lipschitz_bound"] for record in measured], 3, significant=True),
                f"{next(iter(records.values()))['z']:.1f}",
                f"{statistics.median(speeds):.2f}" if speeds else "–",
            ]
        )
    header = ("constraint", "violation", "stable rank", "least", "Lipschitz bound", "Z %", "steps/s")
    caption = (
        "Of the discriminator. Violation: the most that a singular value was off what the constraint allows, at any "
        "record of any run. Stable rank, at the end: mean over layers, and of the layer that has least but the last. "
        "Steps/s: of the generator, on one thread, side by side."
    )
    return Table(header, rows, caption)


def _has_several(layer: dict[str, float]) -> bool:
    """Whether a layer has more than one singular value; that of a single score has not."""
    return layer["largest"] != layer["least"] or layer["stable_rank"] > 1


def _tuning(results: Results) -> Table:
    losses = mean_losses({c: r for c, r in results.items() if c.tuning}, lambda cell: (cell.method, cell.lr))
    rows = [[method, *(_loss(losses[method].get(lr)) for lr in RATES)] for method in METHODS if method in losses]
    caption = (
        "Fréchet distance to training images after the tuning runs; –: diverged, or not tried yet. RiemannianSGD has "
        f"{MANIFOLD_RATIO:g} times the rate."
    )
    return Table(("constraint", *(f"lr {lr:g}" for lr in RATES)), rows, caption)


def _loss(loss: float | None) -> str:
    return "–" if loss is None or loss == math.inf else f"{loss:.2f}"


def _final(results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """Records of final runs by seed, for each constraint."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for cell, record in results.items():
        if not cell.tuning:
            groups.setdefault(cell.method, {})[cell.seed] = record
    return {method: groups[method] for method in METHODS if method in groups}


def _distances(records: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {seed: record["unseen_loss"] for seed, record in records.items() if record["unseen_loss"] is not None}


def _spread(values: Iterable[float], digits: int, *, significant: bool = False) -> str:
    found, style = list(values), f".{digits}{'g' if significant else 'f'}"
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):{style}}" if len(found) > 1 else ""
    return f"{statistics.mean(found):{style}}{deviation}"


# ------------------------------------------------------------------------------------------------------ the report


def write_gan_benchmark_report(path: Path, results: Results, settings: Settings, folder: Path) -> Path:
    """Write tables, curves, samples, and what is needed to compute them again, as one HTML file; returns its path.

    Args:
        path: of the file.
        results: the records of finished cells.
        settings: of the grid.
        folder: of the grid, where the pictures of runs are.
    """
    samples, differences, spectra, tuning = tables(results)
    summary = f"{settings.network}, discriminator of width {settings.width}, {settings.steps} steps of the generator."
    sections = [
        Section("Samples", _TEXT, [samples, differences, Figure(_curves(results), _CURVES_CAPTION)]),
        Section("Spectra and cost", "", [spectra]),
        Section("Pictures", "", _pictures(results, folder)),
        Section("Learning rates", "", [tuning]),
    ]
    return write_report(
        path,
        title=f"GANs on {settings.data} with a reduced discriminator",
        summary=summary,
        sections=sections,
        facts=provenance(**{name: value for name, value in vars(settings).items() if value is not None}),
    )


def _curves(results: Results) -> MatplotlibFigure:
    """Fréchet distance to training images against steps, mean over seeds; one panel for dense and factored weights."""
    from matplotlib import pyplot

    final = _final(results)
    panels = [[m for m in final if "-" not in m], [m for m in final if m.startswith("svdp")]]
    panels.append([m for m in final if m not in panels[0] and m not in panels[1]])
    panels = [methods for methods in panels if methods] or [[]]
    with figure_style():
        figure, axes = pyplot.subplots(1, len(panels), figsize=(9.2, 3.2), sharey=True, squeeze=False)
        for ax, methods in zip(axes[0], panels, strict=True):
            for place, method in enumerate(methods):
                points: dict[int, list[float]] = {}
                for record in final[method].values():
                    for step, distance in record["curve"]:
                        points.setdefault(step, []).append(distance)
                means = [statistics.mean(distances) for distances in points.values()]
                style = "-" if place < len(SERIES) else "--"
                ax.plot(list(points), means, style, color=SERIES[place % len(SERIES)], label=method)
            ax.set_xlabel("step")
            ax.set_yscale("log")
            if methods:
                ax.legend(fontsize="small")
        axes[0][0].set_ylabel("Fréchet distance")
    pyplot.close(figure)
    return figure


def _pictures(results: Results, folder: Path) -> list[Figure]:
    """The last samples of the first seed of every constraint, side by side."""
    from matplotlib import pyplot

    found = {}
    for cell in results:
        if not cell.tuning and cell.seed == 0 and (shown := pictures(folder / "cells" / cell.name)):
            found[cell.method] = shown[-1]
    names = [method for method in METHODS if method in found]
    figures = []
    for begin in range(0, len(names), 3):
        row = names[begin : begin + 3]
        with figure_style():
            figure, axes = pyplot.subplots(1, 3, figsize=(9.2, 3.5))
            for ax, method in zip(axes, row, strict=False):
                ax.imshow(pyplot.imread(found[method]), cmap="gray", interpolation="nearest")
                ax.set_title(method)
            for ax in axes:
                ax.axis("off")
        pyplot.close(figure)
        figures.append(Figure(figure, "Samples after the last step, seed 0, of the same latent vectors."))
    return figures


_CURVES_CAPTION = "Fréchet distance to training images, mean over the seeds that got there."
_TEXT = """
A generator against a discriminator of a quarter of its usual width, under every constraint on the spectra of its
weights (`retract.nets.gan.CONSTRAINTS`), with the same data, steps and seeds. Each has the best of the same learning
rates, by the samples of a shorter run. In Stiefel form, points on manifolds are stepped by RiemannianSGD.
"""
