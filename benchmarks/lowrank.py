"""`retract bench lowrank`: low-rank layers by where they start: errors, costs, and what training makes of them.

Errors and costs are of single layers. Training: perceptrons whose hidden layers have a low rank, which every method
makes of the same random weights. Compression: a trained network that every method makes smaller, to several sizes,
before and after an epoch of training. Learning rates are chosen from the same few for every method, on a validation
split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from retract.nets.cnn import MODELS

from . import lowrank_cell, lowrank_compression
from .cells import lowest_rates, mean_losses
from .grid import compute, finished
from .grid_command import chosen_names, show_end
from .lowrank_cell import FULL_RANK, METHODS, NETWORKS, Cell, Settings, load_data
from .lowrank_compression import BUDGETS, INITIALIZATIONS, Compression
from .lowrank_errors import cost_cells, error_cells, measure_costs, measure_errors
from .options import DataFolder, DataName, Device, GridFolder, ImageSize, Minutes, Processes, Subset
from .runs import Run

__all__ = ["PARTS", "RATES", "lowrank_command", "run_parts"]

PARTS = ("errors", "training", "compression")
FRACTIONS = (1 / 16, 1 / 8, 1 / 4)
RATES = (0.003, 0.01, 0.03, 0.1)
TUNING_SEEDS = (1000, 1001)  # of perceptrons; the first, of compressed networks

Results = dict[Cell, dict[str, Any]]


# ------------------------------------------------------------------------------------------------------- the grid


def run_parts(run: Run, settings: Settings, parts: list[str], seeds: int, **options: Any) -> bool:
    """Compute the parts one after the other; ``options`` as :func:`.grid.compute`.

    Returns:
        Whether all cells are finished.
    """
    torch.set_num_threads(1)
    compute_part = {"errors": _measure, "training": _train, "compression": _compress}
    return all(compute_part[part](run, settings, seeds, **options) for part in parts)


def _measure(run: Run, settings: Settings, seeds: int, *, processes: int, **options: Any) -> bool:
    """Errors of single layers; then costs, with nothing beside them."""
    if not compute(run, error_cells(), measure_errors, processes=processes, **options):
        return False
    return compute(run, cost_cells(), measure_costs, processes=1, **options)


def _train(run: Run, settings: Settings, seeds: int, **options: Any) -> bool:
    """Tune and train all methods."""
    load_data(settings)  # before there are workers: they inherit it
    work = partial(lowrank_cell.train_cell, settings)
    tuning = tuning_cells()
    if not compute(run, tuning, work, **options):
        return False
    return compute(run, final_cells(best_rates(finished(run, tuning)), seeds), work, **options)


def tuning_cells() -> list[Cell]:
    """Every method, network and fraction of the rank at every rate."""
    grid = product(TUNING_SEEDS, NETWORKS, _methods(), RATES)
    return [Cell(network, *method, lr, seed, True) for seed, network, method, lr in grid]


def _methods() -> list[tuple[float, str]]:
    return [(1.0, FULL_RANK), *product(FRACTIONS, METHODS)]


def final_cells(rates: dict[tuple[str, float, str], float], seeds: int) -> list[Cell]:
    """Each at its own rate, seed after seed."""
    return [Cell(*what, lr, seed, False) for seed in range(seeds) for what, lr in rates.items()]


def best_rates(tuned: Results) -> dict[tuple[str, float, str], float]:
    """For each network, fraction and method the rate of the lowest loss on the validation split, in the mean over
    seeds.

    The lowest rate of all where every one diverged: that, too, is a result.
    """
    losses = mean_losses(tuned, lambda cell: ((cell.network, cell.fraction, cell.method), cell.lr))
    return {what: min(sorted(rates), key=rates.__getitem__) for what, rates in losses.items()}


def _compress(run: Run, settings: Settings, seeds: int, **options: Any) -> bool:
    """Train dense networks, choose rates for what is made of them, and make and train it."""
    load_data(settings)
    work = partial(lowrank_compression.train_cell, settings, run.folder)
    dense = [Compression("tuning", TUNING_SEEDS[0]), *(Compression("dense", seed) for seed in range(seeds))]
    tuning = fine_tuning_cells()
    if not (compute(run, dense, work, **options) and compute(run, tuning, work, **options)):
        return False
    trained = [c.seed for c, record in finished(run, dense[1:]).items() if record["accuracy"] is not None]
    rates = lowest_rates(mean_losses(finished(run, tuning), lambda cell: ((cell.budget, cell.initialization), cell.lr)))
    return compute(run, compressed_cells(rates, trained), work, **options)


def fine_tuning_cells() -> list[Compression]:
    """Every initialization at every budget and rate."""
    grid = product(BUDGETS, INITIALIZATIONS, RATES)
    return [Compression("fine-tuning", TUNING_SEEDS[0], lr, budget, name) for budget, name, lr in grid]


def compressed_cells(rates: dict[tuple[float, str], float], seeds: Iterable[int]) -> list[Compression]:
    """Each at its own rate, seed after seed."""
    return [Compression("compressed", seed, lr, *made) for seed in seeds for made, lr in rates.items()]


# ---------------------------------------------------------------------------------------------------- the command


def lowrank_command(
    parts: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(PARTS)}.", metavar="NAMES")] = ",".join(
        PARTS
    ),
    data: DataName = "digits",
    data_dir: DataFolder = None,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of the comparisons of trained networks.", metavar="N")] = 5,
    subset: Subset = None,
    image_size: ImageSize = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of perceptrons.", metavar="N")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step of perceptrons.", metavar="N")] = 64,
    model: Annotated[str, typer.Option(help="Network of the zoo to compress.", metavar="NAME")] = "resnet20",
    model_epochs: Annotated[int, typer.Option(min=1, help="Epochs of it before it is.", metavar="N")] = 10,
    model_batch_size: Annotated[int, typer.Option(min=1, help="Images per step of it.", metavar="N")] = 64,
    minutes: Minutes = None,
    processes: Processes = 2,
    device: Device = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="Network to compress: forward in bfloat16 where safe.")] = False,
    out: GridFolder = Path("runs/lowrank"),
) -> None:
    """Compare starts of low-rank layers: the nearest matrix, the nearest function, random ones, and fitted to data.

    Errors: of single layers with their ReLU, and the time to find them over that of an SVD. Training: perceptrons with
    low-rank hidden layers of random weights, with and without BatchNorm. Compression: a trained network, its ranks
    chosen for four sizes, before and after an epoch of training. Learning rates are judged on a tenth of the training
    images held out. Ctrl-C stops, and the same command goes on.

    For example:

        retract bench lowrank --parts training --data mnist --data-dir ~/data --subset 10000
        retract bench lowrank --parts compression --data cifar10 --data-dir ~/data --subset 8000 --amp --seeds 3
    """
    from rich.console import Console

    from .lowrank_report import tables, write_lowrank_report

    console = Console()
    settings = Settings(
        data=data,
        data_dir=None if data_dir is None else str(data_dir.expanduser().absolute()),
        subset=subset,
        image_size=image_size,
        epochs=epochs,
        batch_size=batch_size,
        model=model,
        model_epochs=model_epochs,
        model_batch_size=model_batch_size,
        device=device,
        amp=amp,
    )
    chosen = chosen_names("--parts", parts, PARTS)
    chosen_names("--model", model, MODELS)
    if chosen != ["errors"]:
        load_data(settings)  # what cannot be read is an error before there is a folder
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    run = Run.open_or_create(out, asdict(settings))

    def show(record: dict[str, Any]) -> None:
        if record["part"] in ("training", "compression"):
            accuracy = "diverged" if record["accuracy"] is None else f"{100 * record['accuracy']:.2f} %"
            kind: Any = Cell if record["part"] == "training" else Compression
            console.print(f"{kind.of(record).name}  {accuracy}  ({record['seconds']:.0f} s)", highlight=False)

    done = run_parts(run, settings, chosen, seeds, processes=processes, deadline=deadline, on_record=show)
    report = write_lowrank_report(out / "report.html", run.metrics(), settings, lowrank_command.__doc__ or "")
    show_end(console, tables(run.metrics()), report, done=done)
