"""The report of `retract bench convergence`, from its store or from an export of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..provenance import provenance
from ..report import Section, Table, write_report
from . import report_rates, report_training
from .export import Point, Results, export
from .rates import WINDOW
from .report_equivariance import equivariance_sections
from .report_published import published_sections
from .report_rates import SMOOTHNESS, rate_sections
from .report_robustness import robustness_sections
from .report_training import training_sections
from .report_transfer import transfer_sections
from .summary import by_method, converged, grouped

__all__ = ["EXPORT", "REPORT", "report_sections", "write_convergence_report"]

REPORT, EXPORT = "report.html", "export.json"
UNTOLD = ("reason", "epochs", "loss", "mean_gradient_squared")
"""Results that no table shows."""
OF_TRAINING = ("best_accuracy", "area", "train_loss", "unseen_loss")
"""Those of which the tables of robustness show none."""

Record = Mapping[str, Any]


def report_sections(results: Results, *, effects: bool = True) -> list[Section]:
    """What was run, then the protocols' sections, of those that have finished cells.

    Args:
        results: a store, or an export of one.
        effects: with tables of p-values and effect sizes, a row for each test.
    """
    return [
        Section("What was run", _RUN.strip(), [_overview(results.metrics())]),
        *rate_sections(results),
        *training_sections(results, effects=effects),
        *published_sections(results),
        *equivariance_sections(results),
        *robustness_sections(results),
        *transfer_sections(results),
    ]


_RUN = """
Every method has its learning rate of the scale-invariant weights, that of all others and its decay, if its name
fixes none, tuned in as many trials as every other, on images or seeds that the final runs do not have. Runs are paired
by seed.
"""


def _overview(records: Sequence[Record]) -> Table:
    """What of each protocol is finished."""
    final = [record for record in records if record["stage"] != "tuning"]
    rows = []
    for (protocol, data), own in grouped(final, lambda record: (record["protocol"], record["data"])).items():
        methods, models = by_method(own), dict.fromkeys(str(record["model"]) for record in own)
        counts = [len(runs) for runs in methods.values()]
        most = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}"
        diverged = len(own) - len(converged(own))
        hours = sum(record["seconds"] or 0.0 for record in own) / 3600
        sizes = "; ".join(models) if len(models) < 3 else f"{len(models)} networks"
        rows.append([protocol, data, sizes, str(len(methods)), most, str(diverged), f"{hours:.2f}"])
    header = ("protocol", "data", "network", "methods", "runs of a method", "diverged", "hours on one thread")
    return Table(header, rows, "Runs that are finished, tuning apart. Those that diverged are among them.")


def write_convergence_report(
    folder: Path, results: Results, *, description: str, facts: Mapping[str, object] | None = None
) -> Path:
    """Write ``report.html``, one file that opens offline, and ``export.json``, what documents are made of.

    Args:
        folder: of the results.
        results: finished cells, of any protocols.
        description: of the command, at the top of the page.
        facts: what a reader needs to repeat it, beside command, versions and machine.

    Returns:
        The report's path.
    """
    records = results.metrics()
    known = provenance(**{"tuning": tuning_runs(records), "time": time_of_runs(records), **(facts or {})})
    export(
        results, folder / EXPORT, facts=known, curves=partial(_curves, results), without=_untold, leave_out=("tuning",)
    )
    return write_report(
        folder / REPORT,
        title="Which optimizer gets there first",
        summary=description,
        sections=report_sections(results),
        facts=known,
    )


def tuning_runs(records: Sequence[Record]) -> str:
    """How many finished tuning runs every method has: "training: 24 of each method"."""
    tuning = [record for record in records if record["stage"] == "tuning"]
    found = []
    for protocol, own in grouped(tuning, lambda record: str(record["protocol"])).items():
        counts = sorted({len(runs) for runs in by_method(own).values()})
        many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        found.append(f"{protocol}: {many} runs of each method")
    return "; ".join(found) or "none"


def time_of_runs(records: Sequence[Record]) -> str:
    """What all runs took together: "1.3 hours on one thread, 0.8 of them tuning"."""
    hours = [
        sum(r["seconds"] or 0.0 for r in records if (r["stage"] == "tuning") == tuning) / 3600
        for tuning in (False, True)
    ]
    return f"{sum(hours):.2f} hours on one thread, {hours[1]:.2f} of them tuning"


def _untold(record: Record) -> tuple[str, ...]:
    return (*UNTOLD, *OF_TRAINING) if record["protocol"] == "robustness" else UNTOLD


def _curves(results: Results, record: Record) -> dict[str, Sequence[Point]]:
    """The curves of a cell, as far as tables are made of them."""
    if record["protocol"] in ("stochastic", "robustness", "transfer"):
        return {}
    if record["protocol"] == "training":
        return {name: results.curve(record, name) for name in report_training.CURVES}
    whole = {name: results.curve(record, name) for name in report_rates.CURVES}
    return {
        name: [point[:2] for point in curve if (point[0] or 0) * WINDOW >= (curve[-1][0] or 0) or name == SMOOTHNESS]
        for name, curve in whole.items()
    }
