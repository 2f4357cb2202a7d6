"""What `retract bench layers` says of its results."""

from __future__ import annotations

import statistics
from itertools import product
from pathlib import Path
from typing import Any

from .layers import RATES
from .layers_cell import DECAY, EUCLIDEAN_RATE, METHODS, MOMENTUM, Cell, Settings
from .provenance import provenance
from .report import Section, Table, write_report

__all__ = ["tables", "write_layers_report"]

Results = dict[Cell, dict[str, Any]]


def tables(results: Results) -> list[Table]:
    """Losses and accuracy of every method; the forms compared; speed and drift; the learning rates tried.

    Args:
        results: the records of finished cells.
    """
    return [_losses(results), _forms(results), _costs(results), _tuning(results)]


def _losses(results: Results) -> Table:
    """Mean and standard deviation over seeds."""
    rows = []
    for model, method, records in _final(results):
        converged = [record for record in records if record["train_loss"] is not None]
        loss = _spread([record["train_loss"] for record in converged], 4)
        accuracy = _spread([100 * record["accuracy"] for record in converged], 2)
        rows.append([model, method, f"{records[0]['lr']:g}", f"{len(converged)} of {len(records)}", loss, accuracy])
    header = ("model", "layers", "lr", "seeds", "train loss", "accuracy %")
    caption = "Seeds: converged of all. Train loss: mean over the last epoch. ±: standard deviation over seeds."
    return Table(header, rows, caption)


def _costs(results: Results) -> Table:
    """Speed, compression, and how far the layers are from what they promise."""
    rows = []
    for model, method, records in _final(results):
        speeds = [record["steps_per_second"] for record in records if record["steps_per_second"] is not None]
        drift = [[r[key] for r in records if r[key] is not None] for key in ("orthonormality_error", "cap_error")]
        figures = [f"{max(values):.1e}" if values else "–" for values in drift]
        speed = f"{statistics.median(speeds):.2f}" if speeds else "–"
        rows.append([model, method, speed, f"{records[0]['compression']:.1f}", *figures])
    header = ("model", "layers", "steps/s", "Z %", "|UᵀU - I|", "|sigma_1 - cap|")
    caption = (
        "Steps/s: of runs on one thread each, side by side. Z: degrees of freedom in percent of the dense network's. "
        "The errors are the largest of all layers and seeds at the end."
    )
    return Table(header, rows, caption)


def _final(results: Results) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(model, method, records of the compared runs), in the order in which they were begun."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell, record in results.items():
        if not cell.tuning:
            groups.setdefault((cell.model, cell.method), []).append(record)
    order = list(METHODS)
    return [(*names, groups[names]) for names in sorted(groups, key=lambda names: (names[0], order.index(names[1])))]


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _forms(results: Results) -> Table:
    """Whether the two forms of a kind of layer reach the same loss."""
    found = {(model, method): records for model, method, records in _final(results)}
    rows = []
    for model in dict.fromkeys(model for model, _ in found):
        for kind in ("SVDP", "STTP"):
            pair = [found.get((model, f"{kind} {form}"), []) for form in ("Householder", "Stiefel")]
            losses = [[r["train_loss"] for r in records if r["train_loss"] is not None] for records in pair]
            if min(map(len, losses)) < 2:
                continue
            low, high = _difference(*losses)
            difference = statistics.mean(losses[1]) - statistics.mean(losses[0])
            answer = "yes" if low <= 0 <= high else "no"
            rows.append([model, kind, f"{difference:+.4f}", f"{low:+.4f} to {high:+.4f}", answer])
    header = ("model", "layers", "Stiefel less Householder", "95 % interval", "within noise")
    return Table(header, rows, "Difference of the mean train loss, Welch's interval for it, and whether 0 lies inside.")


def _difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """Welch's 95 % confidence interval for mean(b) - mean(a)."""
    from scipy.stats import ttest_ind

    interval = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def _tuning(results: Results) -> Table:
    """Loss on the validation split at every learning rate."""
    rows = []
    for model, method in product(sorted({cell.model for cell in results}), METHODS):
        tuned = [
            (c.lr, r["unseen_loss"]) for c, r in results.items() if c.tuning and (c.model, c.method) == (model, method)
        ]
        if tuned:
            rows.append([model, method, *(_mean([loss for rate, loss in tuned if rate == lr]) for lr in RATES)])
    header = ("model", "layers", *(f"lr {lr:g}" for lr in RATES))
    return Table(header, rows, "Loss on the validation split, mean over seeds; –: diverged, or not tried yet.")


def _mean(losses: list[float | None]) -> str:
    finite = [loss for loss in losses if loss is not None]
    return f"{statistics.mean(finite):.3f}" if losses and len(finite) == len(losses) else "–"


def write_layers_report(path: Path, found: list[Table], settings: Settings, text: str) -> Path:
    """Write the tables, and what is needed to compute them again, as one HTML file; returns its path."""
    common = {"momentum": MOMENTUM, "weight_decay": DECAY, "rate_of_other_weights": EUCLIDEAN_RATE}
    facts = provenance(**{name: value for name, value in vars(settings).items() if value is not None}, **common)
    summary = "Each method at the best of a few learning rates of its layers, chosen on a validation split."
    title = f"SVDP and STTP layers on {settings.data}"
    return write_report(path, title=title, summary=summary, sections=[Section("Results", text, found)], facts=facts)
