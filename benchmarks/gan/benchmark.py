"""`retract bench gan`: what constraints on a discriminator's spectra do to the samples of a GAN.

The published experiment with a reduced discriminator (Obukhov et al., AISTATS 2021, table 1), at a size that two cores
can do: the same networks, data and steps under every constraint, each at the best of the same few learning rates,
judged by the distance of a shorter run's samples to the training images. Final samples are compared with test images.
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

from retract.nets.gan.networks import GANS

from ..cells import mean_losses
from ..grid import compute, finished
from ..grid_command import chosen_names, show_end
from ..options import BatchSize, DataFolder, DataName, Device, GridFolder, Minutes, Processes, Seeds
from ..runs import Run
from ..samples.classifier import feature_classifier
from ..samples.statistics import data_statistics
from .cell import METHODS, Cell, Settings, load_data, train_cell
from .experiment import default_network

__all__ = ["RATES", "best_rates", "gan_benchmark_command", "run_grid"]

RATES = (2e-4, 5e-4, 1e-3, 2e-3)
TUNING_SEEDS = (1000,)
#: Of discriminators; the published collapse is at a quarter of the width.
QUARTER_WIDTHS = {"digits": 8, "dcgan28": 16, "dcgan32": 16, "sngan32": 32, "sngan48": 256}


# ------------------------------------------------------------------------------------------------------- the grid


def run_grid(run: Run, settings: Settings, methods: list[str], seeds: int, **options: Any) -> bool:
    """Tune and train under every constraint; ``options`` as :func:`.grid.compute`.

    Returns:
        Whether all cells are finished.
    """
    torch.set_num_threads(1)
    data = load_data(settings)  # before there are workers: they inherit it
    classifier = feature_classifier(data)  # and find in the cache what samples are compared with
    for split in ("train", "test"):
        data_statistics(data, classifier, split)
    work = partial(train_cell, settings, run.folder)
    tuning = tuning_cells(methods)
    if not compute(run, tuning, work, **options):
        return False
    return compute(run, final_cells(best_rates(finished(run, tuning)), seeds), work, **options)


def tuning_cells(methods: list[str]) -> list[Cell]:
    """Every constraint at every rate."""
    return [Cell(method, lr, seed, True) for seed, lr, method in product(TUNING_SEEDS, RATES, methods)]


def final_cells(rates: dict[str, float], seeds: int) -> list[Cell]:
    """Every constraint at its own rate, seed after seed."""
    return [Cell(method, lr, seed) for seed in range(seeds) for method, lr in rates.items()]


def best_rates(tuned: dict[Cell, dict[str, Any]]) -> dict[str, float]:
    """For each constraint the rate of the lowest Fréchet distance, in the mean over seeds.

    The lowest rate of all where every one diverged: that, too, is a result.
    """
    losses = mean_losses(tuned, lambda cell: (cell.method, cell.lr))
    return {method: min(sorted(rates), key=rates.__getitem__) for method, rates in losses.items()}


# ---------------------------------------------------------------------------------------------------- the command


def gan_benchmark_command(
    data: DataName = "mnist",
    data_dir: DataFolder = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, of: {', '.join(METHODS)}. Default: all.", metavar="NAMES", show_default=False
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(GANS)}. Default: the one for the images.", metavar="NAME"),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of the discriminator. Default: a quarter of its usual one.", metavar="N")
    ] = None,
    generator_width: Annotated[
        int | None, typer.Option(min=1, help="Of the generator. Default: its usual one.", metavar="N")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of factored weights. Default: 64.", metavar="R")] = None,
    subset: Annotated[int | None, typer.Option(min=1, help="Learn N images. Default: all.", metavar="N")] = None,
    loss: Annotated[str, typer.Option(help="hinge or non-saturating.", metavar="NAME")] = "hinge",
    steps: Annotated[int, typer.Option(min=1, help="Of the generator.", metavar="N")] = 2000,
    tuning_steps: Annotated[int, typer.Option(min=1, help="Of a tuning run.", metavar="N")] = 600,
    discriminator_steps: Annotated[int, typer.Option(min=1, help="For each of the generator.", metavar="N")] = 2,
    batch_size: BatchSize = 64,
    ema: Annotated[float, typer.Option(min=0, max=1, help="As for `retract gan`.", metavar="X")] = 0.99,
    metric_samples: Annotated[int, typer.Option(min=10, help="To compare with the data.", metavar="N")] = 5000,
    looks: Annotated[int, typer.Option(min=1, help="At spectra and samples, in a run.", metavar="N")] = 10,
    seeds: Seeds = 3,
    minutes: Minutes = None,
    processes: Processes = 2,
    device: Device = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="Networks in bfloat16 where that is safe.")] = False,
    step_times: Annotated[
        bool, typer.Option("--step-times", help="Time a step of SNGAN-32's discriminator instead; run nothing beside.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="To spend on --step-times.", metavar="X")] = 120.0,
    out: GridFolder = Path("runs/gan-benchmark"),
) -> None:
    """Train GANs with a reduced discriminator under every constraint on its spectra, and compare their samples.

    Says how far samples are from test images, in the features of a classifier trained on the same data, how many runs
    lost a class, whether singular values kept to what the constraint allows, and what a step costs. Ctrl-C stops at the
    next step, and the same command goes on.

    For example:

        retract bench gan --data-dir ~/data --methods "sn, svdp-c, sttp-c, svdp-c (Stiefel)"

        retract bench gan --step-times
    """
    from rich.console import Console

    from .benchmark_report import tables, write_gan_benchmark_report
    from .steps import show_step_times

    chosen = chosen_names("--methods", methods, METHODS)
    if step_times:
        show_step_times(chosen, seconds)
        return
    console = Console()
    name = network or default_network(data)
    if name not in GANS:
        raise ValueError(f"--network must be one of {', '.join(GANS)}, got {name!r}")
    settings = Settings(
        data=data,
        data_dir=None if data_dir is None else str(data_dir.expanduser().absolute()),
        subset=subset,
        network=name,
        width=width or QUARTER_WIDTHS[name],
        generator_width=generator_width,
        rank=rank,
        loss=loss,
        steps=steps,
        tuning_steps=tuning_steps,
        discriminator_steps=discriminator_steps,
        batch_size=batch_size,
        ema=ema,
        metric_samples=metric_samples,
        looks=looks,
        device=device,
        amp=amp,
    )
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    load_data(settings)  # what cannot be read is an error before there is a folder
    run = Run.open_or_create(out, asdict(settings))

    def show(record: dict[str, Any]) -> None:
        found = "diverged" if record["metrics"] is None else f"Fréchet distance {record['unseen_loss']:.4g}"
        console.print(f"{Cell.of(record).name}  {found}  ({record['seconds']:.0f} s)", highlight=False)

    done = run_grid(run, settings, chosen, seeds, processes=processes, deadline=deadline, on_record=show)
    results = {Cell.of(record): record for record in run.metrics()}
    report = write_gan_benchmark_report(out / "report.html", results, settings, out)
    show_end(console, tables(results), report, done=done)
