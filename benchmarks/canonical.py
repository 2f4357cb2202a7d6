"""`retract bench canonical`: canonical networks beside plain and weight-normalized ones, and what is left of them when
their terms are cut.

All begin at random and are trained alike, with Adam at the best of the same few learning rates on a validation split.
Then a part of the terms of each canonical network is kept, by the same fraction in every layer, or by one error over
all layers with as many parameters; and it is fine-tuned in all of its weights, from the state that the optimizer had
for them, at a learning rate that was chosen on the validation split, too. Networks of as few terms that are trained
from scratch, for as long, show what the terms cut away were for.
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

from .canonical_cell import METHODS, Cell, Settings, load_data, train_cell
from .cells import lowest_rates, mean_losses
from .grid import compute, finished
from .grid_command import chosen_names, show_end
from .options import Amp, BatchSize, DataFolder, Device, GridFolder, ImageSize, Minutes, Processes, Seeds, Subset
from .runs import Run

__all__ = ["MODELS", "RATES", "TUNED", "best_fine_tuning_rates", "best_rates", "canonical_command", "run_grid"]

MODELS = ("mnist_convnet", "cifar_alexnet")
RATES = (3e-4, 1e-3, 3e-3)
FINE_TUNING_FACTORS = (1 / 3, 1.0, 10 / 3)  # of the rate at which a network was trained
FINE_TUNED = 0.5  # the fraction of the terms for which one of them is chosen
TUNING_SEED = 1000
KEPT = "0.75,0.5,0.25,0.1"
TUNED = {"canonical l1": "canonical"}  # a method that has the learning rate of another


# ------------------------------------------------------------------------------------------------------- the grid


def run_grid(
    run: Run, settings: Settings, methods: list[str], kept: list[float], seeds: int, scratch: bool, **options: Any
) -> bool:
    """Tune and train every method, then cut the terms of those that have any; ``options`` as :func:`.grid.compute`.

    Returns:
        Whether all cells are finished.
    """
    torch.set_num_threads(1)
    load_data(settings)  # before there are workers: they inherit it
    work = partial(train_cell, settings, run.folder)
    tuning = tuning_cells(methods)
    if not compute(run, tuning, work, **options):
        return False
    rates = best_rates(finished(run, tuning), methods)
    fine_tuning = fine_tuning_cells(rates)
    training = training_cells(rates, seeds)
    if not compute(run, [*fine_tuning, *training], work, **options):
        return False
    trained = [cell for cell, record in finished(run, training).items() if record["accuracy"] is not None]
    fine = best_fine_tuning_rates(finished(run, fine_tuning), methods)
    return compute(run, smaller_cells(trained, kept, fine, scratch), work, **options)


def tuning_cells(methods: list[str]) -> list[Cell]:
    """Every method that has a rate of its own, at every rate."""
    own = dict.fromkeys(TUNED.get(method, method) for method in methods)
    return [Cell(method, lr, TUNING_SEED, "tuning") for lr, method in product(RATES, own)]


def fine_tuning_cells(rates: dict[str, float]) -> list[Cell]:
    """Every method that is cut and has a rate of its own, cut by ratio, at every rate of fine-tuning."""
    return [
        Cell(method, lr, TUNING_SEED, "fine-tuning", FINE_TUNED, "ratio", float(f"{factor * lr:.3g}"))
        for method, lr in rates.items()
        if METHODS[method].cuts and method not in TUNED
        for factor in FINE_TUNING_FACTORS
    ]


def training_cells(rates: dict[str, float], seeds: int) -> list[Cell]:
    """Every method at its rate, seed after seed."""
    return [Cell(method, lr, seed) for seed in range(seeds) for method, lr in rates.items()]


def smaller_cells(trained: list[Cell], kept: list[float], fine: dict[str, float], scratch: bool) -> list[Cell]:
    """The truncations of trained networks; after them networks of as few terms from scratch, if they are wanted.

    All terms, kept, are a truncation too: they show what fine-tuning alone is good for. ``fine`` has the rates of
    fine-tuning.
    """
    cells = []
    for cell in trained:
        method = METHODS[cell.method]
        cuts = [(part, cut) for part, cut in product(kept, method.cuts)] + [(1.0, cut) for cut in method.cuts[:1]]
        rate = fine.get(cell.method)
        cells += [Cell(cell.method, cell.lr, cell.seed, "truncation", *cut, rate) for cut in cuts]
        if scratch and method.cuts and not method.pressed:
            cells += [Cell(cell.method, cell.lr, cell.seed, "scratch", part) for part in kept]
    return cells


def best_rates(tuned: dict[Cell, dict[str, Any]], methods: list[str]) -> dict[str, float]:
    """For each of ``methods`` the rate of the lowest loss on the validation split.

    Raises:
        ValueError: a method diverged at every rate.
    """
    best = lowest_rates(mean_losses(tuned, lambda cell: (cell.method, cell.lr)))
    return {method: best[TUNED.get(method, method)] for method in methods}


def best_fine_tuning_rates(tuned: dict[Cell, dict[str, Any]], methods: list[str]) -> dict[str, float]:
    """The same of fine-tuning, for those of ``methods`` that are cut."""
    best = lowest_rates(mean_losses(tuned, lambda cell: (cell.method, cell.fine_tuning_lr or 0.0)))
    return {method: best[TUNED.get(method, method)] for method in methods if METHODS[method].cuts}


# ---------------------------------------------------------------------------------------------------- the command


def canonical_command(
    data: Annotated[str, typer.Option(help="mnist, cifar10 or svhn.", metavar="NAME")] = "mnist",
    data_dir: DataFolder = None,
    model: Annotated[
        str | None,
        typer.Option(help="mnist_convnet or cifar_alexnet. Default: the one for the images.", metavar="NAME"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help=f"Comma-separated, of: {', '.join(METHODS)}. Default: all.", show_default=False
        ),
    ] = None,
    kept: Annotated[str, typer.Option(help="Fractions of the terms that are kept.", metavar="X,Y")] = KEPT,
    scratch: Annotated[
        bool, typer.Option("--scratch/--no-scratch", help="Train networks of as few terms from scratch, too.")
    ] = False,
    seeds: Seeds = 3,
    subset: Subset = None,
    image_size: ImageSize = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.", metavar="N")] = 4,
    tuning_epochs: Annotated[int, typer.Option(min=1, help="Epochs of a tuning run.", metavar="N")] = 1,
    fine_tuning_epochs: Annotated[int, typer.Option(min=1, help="Epochs after a truncation.", metavar="N")] = 3,
    batch_size: BatchSize = 128,
    pressure: Annotated[
        float,
        typer.Option(
            min=0,
            help="Of the l1 penalty: a step has a threshold of X times the learning rate.",
            metavar="X",
        ),
    ] = 0.2,
    minutes: Minutes = None,
    processes: Processes = 2,
    device: Device = "cpu",
    amp: Amp = False,
    out: GridFolder = Path("runs/canonical"),
) -> None:
    """Train plain, weight-normalized and canonical networks, cut the terms of these, fine-tune, and compare.

    Learning rates are chosen on a tenth of the training images held out. Ctrl-C stops at the next step, and the same
    command goes on.

    For example:

        retract bench canonical --data-dir ~/data --amp

        retract bench canonical --data cifar10 --data-dir ~/data --amp --subset 6000 --epochs 15 --seeds 2
    """
    from rich.console import Console

    from .canonical_report import tables, write_canonical_report

    console = Console()
    settings = Settings(
        data=data,
        data_dir=None if data_dir is None else str(data_dir.expanduser().absolute()),
        model=model or ("mnist_convnet" if data == "mnist" else "cifar_alexnet"),
        subset=subset,
        image_size=image_size,
        epochs=epochs,
        tuning_epochs=tuning_epochs,
        fine_tuning_epochs=fine_tuning_epochs,
        batch_size=batch_size,
        pressure=pressure,
        device=device,
        amp=amp,
    )
    if settings.model not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {settings.model!r}")
    chosen = chosen_names("--methods", methods, METHODS), _fractions(kept)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    load_data(settings)  # what cannot be read is an error before there is a folder
    run = Run.open_or_create(out, asdict(settings))

    def show(record: dict[str, Any]) -> None:
        accuracy = "diverged" if record["accuracy"] is None else f"{100 * record['accuracy']:.2f} %"
        console.print(f"{Cell.of(record).name}  {accuracy}  ({record['seconds']:.0f} s)", highlight=False)

    options: dict[str, Any] = {"processes": processes, "deadline": deadline, "on_record": show}
    done = run_grid(run, settings, *chosen, seeds, scratch, **options)
    results = {Cell.of(record): record for record in run.metrics()}
    report = write_canonical_report(out / "report.html", results, settings)
    show_end(console, tables(results), report, done=done)


def _fractions(text: str) -> list[float]:
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if not fractions or not all(0 < part < 1 for part in fractions):
        raise ValueError(f"--kept must be fractions between 0 and 1, such as 0.5,0.25, got {text!r}")
    return fractions
