"""What `retract bench lowrank` says of its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import lowrank_compression
from .lowrank_cell import CALIBRATION, MOMENTUM, VALIDATION, WIDTHS, Settings
from .lowrank_compression import DECAY, FINE_TUNING_EPOCHS, RATE, TEST_IMAGES
from .lowrank_errors import INITIALIZATIONS, PROBLEMS
from .lowrank_runs_report import compression_tables, fraction, training_tables
from .paired_statistics import mean_and_error
from .provenance import provenance
from .report import Section, Table, write_report

__all__ = ["TARGETS", "tables", "write_lowrank_report"]

TARGETS = {"relu": 1.05, "relu_dc": 4.0}  # most time over that of an SVD
TARGETS_FROM = 256  # the smallest matrix for which they hold: smaller ones take microseconds

Record = Mapping[str, Any]


def tables(records: Sequence[Record]) -> list[Table]:
    """Those of the parts that were computed: errors, costs; training; compression.

    Args:
        records: of finished cells.
    """
    parts: dict[str, list[Record]] = {name: [] for name in ("errors", "costs", "training", "compression")}
    for record in records:
        parts[record["part"]].append(record)
    found = [_errors(parts["errors"], *problem) for problem in PROBLEMS] + [_costs(parts["costs"])]
    found += [*training_tables(parts["training"]), *compression_tables(parts["compression"])]
    return [table for table in found if table.rows]


# ---------------------------------------------------------------------------------------------------- single layers


def _errors(records: Sequence[Record], weights: str, inputs: str) -> Table:
    """A row for each size and rank."""
    chosen = [record for record in records if (record["weights"], record["inputs"]) == (weights, inputs)]
    names = [name for name in INITIALIZATIONS if any(name in record["errors"] for record in chosen)]
    rows = []
    for record in chosen:
        shown = (_error(record["errors"][name]) for name in names)
        rows.append([str(record["size"]), fraction(record["rank"] / record["size"]), *shown])
    caption = (
        f"Relative error of a layer with its ReLU, {weights} weights, {inputs} inputs, mean ± standard error over "
        "draws. Whitened: in the metric of the inputs' second moments; `bias`: with one that is fitted."
    )
    return Table(("d", "r/d", *names), rows, caption)


def _error(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def _costs(records: Sequence[Record]) -> Table:
    """Medians over that of the SVD."""
    rows = []
    for record in records:
        seconds = record["seconds"]
        ratios = {name: seconds[name][0] / seconds["SVD"][0] for name in INITIALIZATIONS}
        marked = [_marked(name, ratio, record["size"]) for name, ratio in ratios.items()]
        names = [record["dtype"], str(record["size"]), fraction(record["rank"] / record["size"])]
        rows.append([*names, f"{1000 * seconds['SVD'][0]:.3g}", *marked])
    caption = (
        "Time over that of `torch.linalg.svd(full_matrices=False)` of the same matrix, medians, in turns, one thread. "
        f"✓ and ✗: at most {' and '.join(f'{most:g} for {name}' for name, most in TARGETS.items())}, or more."
    )
    return Table(("dtype", "d", "r/d", "SVD ms", *INITIALIZATIONS), rows, caption)


def _marked(name: str, ratio: float, size: int) -> str:
    mark = "" if name not in TARGETS or size < TARGETS_FROM else " ✓" if ratio <= TARGETS[name] else " ✗"
    return f"{ratio:.2f}{mark}"


# ------------------------------------------------------------------------------------------------------ the report


def write_lowrank_report(path: Path, records: Sequence[Record], settings: Settings, text: str) -> Path:
    """Write the tables, and what is needed to compute them again, as one HTML file; returns its path."""
    facts = provenance(
        **{name: value for name, value in vars(settings).items() if value is not None},
        perceptrons=f"{len(WIDTHS)} hidden layers of {WIDTHS[0]}, SGD, momentum {MOMENTUM:g}, constant rate, no decay",
        compression=(
            f"SGD, momentum {MOMENTUM:g}, cosine schedule; dense at rate {RATE:g} with decay {DECAY:g}, "
            f"compressed {FINE_TUNING_EPOCHS} epoch without"
        ),
        calibration=f"{CALIBRATION} training images; of networks to compress {lowrank_compression.CALIBRATION}",
        tests=f"compressed networks: {TEST_IMAGES} test images, drawn at random",
        validation=f"{100 * VALIDATION:g} % of the training images",
    )
    return write_report(
        path,
        title="Low-rank layers by their start",
        summary="Errors and costs of single layers; training from random weights; compression of a trained network.",
        sections=[Section("Results", text, tables(records))],
        facts=facts,
    )
