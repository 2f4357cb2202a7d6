"""`retract bench layers`: networks with SVDP and STTP layers, each in both of its forms, beside dense ones.

The two forms span the same weights: Householder coordinates, stepped by torch's SGD, and Stiefel points, stepped by
RiemannianSGD. From the same start, with the same batches, do they reach the same loss? The learning rate of the layers
in question is chosen for every method from the same few, on a validation split; all other weights have the same rate
and decay everywhere. The first and the last layer of a network stay dense.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from retract.nets.cnn import MODELS

from .cells import lowest_rates, mean_losses
from .factorization import SPECTRA
from .grid import compute, finished
from .grid_command import chosen_names, show_end
from .layers_cell import METHODS, Cell, Settings, load_data, train_cell
from .layers_steps import steps_table
from .options import (
    Amp,
    BatchSize,
    DataFolder,
    DataName,
    Device,
    GridFolder,
    ImageSize,
    Minutes,
    Processes,
    Seeds,
    Subset,
)
from .runs import Run

__all__ = ["RATES", "best_rates", "layers_command", "run_grid"]


RATES = (0.01, 0.03, 0.1, 0.3)
TUNING_SEEDS = (1000, 1001)
STEPS_SECONDS = 30.0  # a network


# ------------------------------------------------------------------------------------------------------- the grid


def run_grid(run: Run, settings: Settings, models: list[str], methods: list[str], seeds: int, **options: Any) -> bool:
    """Tune and compare every method on one model after the other; ``options`` as :func:`.grid.compute`.

    Returns:
        Whether all cells are finished.
    """
    torch.set_num_threads(1)
    load_data(settings)  # before there are workers: they inherit it
    work = partial(train_cell, settings, run.folder)
    for model in models:
        tuning = tuning_cells(model, methods)
        if not compute(run, tuning, work, **options):
            return False
        rates = best_rates(finished(run, tuning))
        if not compute(run, final_cells(model, rates, seeds), work, **options):
            return False
    return True


def tuning_cells(model: str, methods: list[str]) -> list[Cell]:
    """Every method at every rate."""
    return [Cell(model, method, lr, seed, True) for seed, lr, method in product(TUNING_SEEDS, RATES, methods)]


def final_cells(model: str, rates: dict[str, float], seeds: int) -> list[Cell]:
    """Every method at its own rate, seed after seed."""
    return [Cell(model, method, lr, seed, False) for seed in range(seeds) for method, lr in rates.items()]


def best_rates(tuned: dict[Cell, dict[str, Any]]) -> dict[str, float]:
    """For each method the rate of the lowest loss on the validation split, in the mean over seeds.

    Raises:
        ValueError: a method diverged at every rate.
    """
    return lowest_rates(mean_losses(tuned, lambda cell: (cell.method, cell.lr)))


# ---------------------------------------------------------------------------------------------------- the command


def layers_command(
    data: DataName = "cifar10",
    data_dir: DataFolder = None,
    models: Annotated[
        str, typer.Option(help="Comma-separated names of the zoo.", metavar="NAMES")
    ] = "resnet20,wrn16_4",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help=f"Comma-separated, of: {', '.join(METHODS)}. Default: all.", show_default=False
        ),
    ] = None,
    seeds: Seeds = 3,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Default: a quarter of the widest layer's outputs.", metavar="R")
    ] = None,
    spectrum: Annotated[str, typer.Option(help=f"{', '.join(SPECTRA)}.", metavar="NAME")] = "lipschitz",
    subset: Subset = None,
    image_size: ImageSize = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the comparison.", metavar="N")] = 15,
    tuning_epochs: Annotated[int, typer.Option(min=1, help="Epochs of a tuning run.", metavar="N")] = 5,
    batch_size: BatchSize = 128,
    minutes: Minutes = None,
    processes: Processes = 2,
    device: Device = "cpu",
    amp: Amp = False,
    steps: Annotated[
        bool, typer.Option("--steps", help="Time training steps on random images instead; half a minute a network.")
    ] = False,
    out: GridFolder = Path("runs/layers"),
) -> None:
    """Train networks with SVDP and STTP layers in Householder and in Stiefel form, and dense ones, and compare them.

    Each method gets the same few learning rates for the layers in question, judged on a tenth of the training images
    held out; then it trains with every seed at its best. Ctrl-C stops at the next step, and the same command goes on.

    For example:

        retract bench layers --data-dir ~/data --subset 10000 --epochs 10 --minutes 60
    """
    from rich.console import Console

    from .layers_report import tables, write_layers_report

    console = Console()
    folder = None if data_dir is None else str(data_dir.expanduser().absolute())
    settings = Settings(
        data, folder, subset, image_size, epochs, tuning_epochs, batch_size, rank, spectrum, device, amp
    )
    chosen = chosen_names("--models", models, MODELS), chosen_names("--methods", methods, METHODS)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    chosen_names("--spectrum", spectrum, SPECTRA)
    if steps:
        console.print(steps_table(settings, *chosen, seconds=STEPS_SECONDS).rich())
        return
    load_data(settings)  # what cannot be read is an error before there is a folder
    run = Run.open_or_create(out, asdict(settings))

    def show(record: dict[str, Any]) -> None:
        loss = "diverged" if record["unseen_loss"] is None else f"train loss {record['train_loss']:.4f}"
        console.print(f"{Cell.of(record).name}  {loss}  ({record['seconds']:.0f} s)", highlight=False)

    done = run_grid(run, settings, *chosen, seeds, processes=processes, deadline=deadline, on_record=show)
    found = tables({Cell.of(record): record for record in run.metrics()})
    report = write_layers_report(out / "report.html", found, settings, layers_command.__doc__ or "")
    show_end(console, found, report, done=done)
