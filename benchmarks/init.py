"""`retract bench init`: initializations of tensorial convolutions, ours beside torch's and tensorly-torch's.

What they do to the variance of a weight; what a deep network of such layers does to signals and gradients; and whether
a deep plain network, without normalisation and skip connections, trains on images. Every initialization has the same
few learning rates, and takes the one that does best on images held out of the training images.
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

from retract.nets.layers.tensor_formats import FORMATS

from .cells import mean_losses
from .grid import compute, finished
from .grid_command import chosen_names, show_end
from .init_cell import Cell, Settings, load_data, train_cell
from .init_depth import measure, measurements
from .init_methods import TRAINED, knows
from .options import BatchSize, DataFolder, DataName, Device, GridFolder, ImageSize, Minutes, Processes, Seeds, Subset
from .runs import Run

__all__ = ["PARTS", "RATES", "best_rates", "init_command", "run_parts"]

PARTS = ("weights", "depth", "training")
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEEDS = (1000, 1001)


# ------------------------------------------------------------------------------------------------------- the grid


def run_parts(run: Run, settings: Settings, parts: list[str], formats: list[str], seeds: int, **options: Any) -> bool:
    """Compute the parts one after the other; ``options`` as :func:`.grid.compute`.

    Returns:
        Whether all cells are finished.
    """
    torch.set_num_threads(1)
    for part in parts:
        if part == "training":
            done = _train(run, settings, formats, seeds, **options)
        else:
            done = compute(run, measurements(part), measure, **options)
        if not done:
            return False
    return True


def _train(run: Run, settings: Settings, formats: list[str], seeds: int, **options: Any) -> bool:
    """Tune and compare all initializations of all formats."""
    load_data(settings)  # before there are workers: they inherit it
    work = partial(train_cell, settings, run.folder)
    tuning = tuning_cells(formats)
    if not compute(run, tuning, work, **options):
        return False
    return compute(run, final_cells(best_rates(finished(run, tuning)), seeds), work, **options)


def tuning_cells(formats: list[str]) -> list[Cell]:
    """Every initialization of every format at every rate."""
    grid = product(TUNING_SEEDS, formats, RATES, TRAINED)
    return [Cell(format, name, lr, seed, True) for seed, format, lr, name in grid if knows(name, format)]


def final_cells(rates: dict[tuple[str, str], float], seeds: int) -> list[Cell]:
    """Every format and initialization at its own rate, seed after seed."""
    return [Cell(*names, lr, seed, False) for seed in range(seeds) for names, lr in rates.items()]


def best_rates(tuned: dict[Cell, dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The rate of the lowest loss on held-out images, in the mean over seeds, for each (format, initialization).

    The lowest rate of all where every one diverged: that, too, is a result.
    """
    losses = mean_losses(tuned, lambda cell: ((cell.format, cell.initialization), cell.lr))
    return {names: min(sorted(rates), key=rates.__getitem__) for names, rates in losses.items()}


# ---------------------------------------------------------------------------------------------------- the command


def init_command(
    parts: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(PARTS)}.", metavar="NAMES")] = ",".join(
        PARTS
    ),
    data: DataName = "digits",
    data_dir: DataFolder = None,
    formats: Annotated[
        str, typer.Option(help=f"To train; comma-separated, of: {', '.join(FORMATS)}.", metavar="NAMES")
    ] = "cp,tensor_train,tucker2",
    depth: Annotated[int, typer.Option(min=1, help="Tensorial layers of the network to train.", metavar="N")] = 30,
    channels: Annotated[int, typer.Option(min=2, help="Channels of the network to train.", metavar="N")] = 24,
    budget: Annotated[
        float, typer.Option(min=0.01, max=1, help="Parameters of a layer, as a fraction of a dense one's.")
    ] = 0.25,
    seeds: Seeds = 2,
    subset: Subset = None,
    image_size: ImageSize = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the comparison.", metavar="N")] = 15,
    tuning_epochs: Annotated[int, typer.Option(min=1, help="Epochs of a tuning run.", metavar="N")] = 6,
    batch_size: BatchSize = 64,
    minutes: Minutes = None,
    processes: Processes = 2,
    device: Device = "cpu",
    out: GridFolder = Path("runs/init"),
) -> None:
    """Compare initializations of tensorial convolutions: ours, torch's core by core, and tensorly-torch's.

    Weights: Var(W) over what a layer behind a ReLU should have. Depth: 16 layers of 64 channels with ReLU, second
    moments of each layer's output and gradient over those of the layer before. Training: a deep plain network on
    images, each initialization with the best of the same learning rates, judged on a fifth of the training images held
    out. Ctrl-C stops at the next step, and the same command goes on.

    For example:

        retract bench init --parts training --data mnist --data-dir ~/data --subset 5000 --epochs 5 --tuning-epochs 2
    """
    from rich.console import Console

    from .init_report import tables, write_init_report

    console = Console()
    folder = None if data_dir is None else str(data_dir.expanduser().absolute())
    settings = Settings(
        data, folder, subset, image_size, depth, channels, budget, epochs, tuning_epochs, batch_size, device
    )
    chosen = chosen_names("--parts", parts, PARTS), chosen_names("--formats", formats, FORMATS)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    if "training" in chosen[0]:
        load_data(settings)  # what cannot be read is an error before there is a folder
    run = Run.open_or_create(out, asdict(settings))

    def show(record: dict[str, Any]) -> None:
        if record["part"] == "training":
            loss = "diverged" if record["train_loss"] is None else f"train loss {record['train_loss']:.4g}"
            console.print(f"{Cell.of(record).name}  {loss}  ({record['seconds']:.0f} s)", highlight=False)

    done = run_parts(run, settings, *chosen, seeds, processes=processes, deadline=deadline, on_record=show)
    found = tables(run.metrics())
    report = write_init_report(out / "report.html", run.metrics(), settings, init_command.__doc__ or "")
    show_end(console, found, report, done=done)
