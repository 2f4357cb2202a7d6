"""``retract demo``: one network, two initializations that compute the same function, torch's SGD and PSISGD.

Each filter feeds a BatchNorm, so multiplying it by a positive number changes nothing that the network
computes. The second initialization is the first with every filter multiplied by 10^U(-1.5, 1.5). SGD trains
the two differently; PSISGD cannot tell them apart.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from rich.console import Console

    from .data import Dataset

__all__ = ["INITS", "OPTIMIZERS", "Precision", "Run", "Settings", "demo_command", "run_demo"]

OPTIMIZERS = ("SGD", "PSISGD")
INITS = ("usual", "rescaled")


class Precision(StrEnum):
    """Floating-point types the demo trains in."""

    float32 = "float32"
    float64 = "float64"

    @property
    def dtype(self) -> torch.dtype:
        """As torch names it."""
        return torch.float64 if self is Precision.float64 else torch.float32


@dataclass(frozen=True)
class Settings:
    """What is common to all runs of one demo."""

    epochs: int = 12
    seed: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int = 64
    precisions: tuple[Precision, ...] = tuple(Precision)


@dataclass
class Run:
    """One training run: the loss of every batch, a list for each epoch, and the test accuracy at the end."""

    optimizer: str
    init: str
    precision: Precision
    epochs: list[list[float]] = field(default_factory=list)
    accuracy: float = float("nan")

    @property
    def losses(self) -> list[float]:
        """The loss of every batch, in order."""
        return [loss for epoch in self.epochs for loss in epoch]


def run_demo(
    settings: Settings,
    on_start: Callable[[Run, int], None] = lambda run, steps: None,
    on_step: Callable[[float], None] = lambda loss: None,
) -> list[Run]:
    """Run every precision x optimizer x initialization, on the same batches.

    Args:
        settings: what is common to all runs.
        on_start: is told of each run and its number of steps when it starts.
        on_step: is told of each loss.

    Returns:
        The runs, in that order.
    """
    from .data import digits

    data, models, runs = digits.read(), initial_models(settings), []
    for precision, optimizer, init in product(settings.precisions, OPTIMIZERS, INITS):
        run = Run(optimizer, init, precision)
        on_start(run, settings.epochs * steps_per_epoch(data, settings))
        train(run, copy.deepcopy(models[init]).to(precision.dtype), data, settings, on_step)
        runs.append(run)
    return runs


def initial_models(settings: Settings) -> dict[str, nn.Module]:
    """The two starting points in float64: equal as functions, different as tensors."""
    from retract.nets.cnn import digitsnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        usual = digitsnet(num_classes=10, in_channels=1).double()
    rescaled = copy.deepcopy(usual)
    rescale_filters(rescaled.manifold_groups(), torch.Generator().manual_seed(settings.seed))
    return {"usual": usual, "rescaled": rescaled}


@torch.no_grad()
def rescale_filters(groups: list[dict[str, Any]], generator: torch.Generator, decades: float = 1.5) -> None:
    """Multiply every scale group of the weights on a manifold by its own 10^U(-decades, decades), in place.

    What the network computes in train mode stays, but for BatchNorm's epsilon.
    """
    for group in groups:
        if (manifold := group.get("manifold")) is None:
            continue
        for _, weight in group["params"]:
            uniform = torch.rand(manifold.num_scales(weight.shape), generator=generator, dtype=weight.dtype)
            weight.copy_(manifold.act(weight, 10 ** (decades * (2 * uniform - 1))))


def train(run: Run, model: nn.Module, data: Dataset, settings: Settings, on_step: Callable[[float], None]) -> None:
    """Train ``model`` with a cosine schedule and fill ``run``; ``on_step`` is told of each loss."""
    images = data.normalizer()(data.train_images).to(run.precision.dtype)
    steps = steps_per_epoch(data, settings)
    optimizer = build_optimizer(run.optimizer, model, images[: settings.batch_size], settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for _ in range(settings.epochs):
        run.epochs.append([])
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: steps * settings.batch_size].split(settings.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), data.train_labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            run.epochs[-1].append(loss.item())
            on_step(loss.item())
    run.accuracy = test_accuracy(model, data, run.precision.dtype)


def build_optimizer(name: str, model: nn.Module, example: Tensor, settings: Settings) -> torch.optim.Optimizer:
    """SGD, or the swap: register the scale-invariant weights, then put PSISGD in SGD's place."""
    from retract.nets import register_scale_invariant
    from retract.optim import PSISGD

    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
    register_scale_invariant(model, example, canonical=True)
    return PSISGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)


def steps_per_epoch(data: Dataset, settings: Settings) -> int:
    """Whole batches in an epoch; the last, smaller one is left out."""
    return len(data.train_labels) // settings.batch_size


@torch.no_grad()
def test_accuracy(model: nn.Module, data: Dataset, dtype: torch.dtype) -> float:
    """The fraction of test images that ``model`` in eval mode labels right."""
    logits: Tensor = model.eval()(data.normalizer()(data.test_images).to(dtype))
    return (logits.argmax(1) == data.test_labels).double().mean().item()


def write_metrics(path: Path, runs: list[Run]) -> None:
    """One JSON line for every step of every run, and one for the test accuracy of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for run in runs:
            name = {"optimizer": run.optimizer, "init": run.init, "dtype": run.precision}
            for step, loss in enumerate(run.losses, 1):
                file.write(json.dumps({**name, "step": step, "loss": loss}) + "\n")
            file.write(json.dumps({**name, "test_accuracy": run.accuracy}) + "\n")


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for report.html and metrics.jsonl.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of the initialization, rescaling and batches.")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of every run (cosine, momentum 0.9).")] = 0.1,
    dtype: Annotated[
        list[Precision] | None, typer.Option(help="Precision to train in; repeat for several. Default: both.")
    ] = None,
) -> None:
    """Train a small network on 8x8 digits with SGD and PSISGD, each from two initializations of one function.

    Prints two tables and writes OUT/report.html, one file to open in a browser. Takes about a minute on two
    cores and downloads nothing.
    """
    from rich.console import Console

    from .demo_report import tables, write_demo_report

    torch.set_num_threads(1)  # for 8x8 images, threads cost more than they save
    precisions = tuple(dict.fromkeys(dtype or Precision))
    settings = Settings(epochs=epochs, seed=seed, lr=lr, precisions=precisions)
    console = Console()
    runs = _run_with_progress(settings, console)
    write_metrics(out / "metrics.jsonl", runs)
    report = write_demo_report(out / "report.html", runs, settings)
    for table in tables(runs):
        console.print(table.rich())
    console.print(f"Report: {report.resolve()}", soft_wrap=True, highlight=False)


def _run_with_progress(settings: Settings, console: Console) -> list[Run]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def on_start(run: Run, steps: int) -> None:
            label = f"{run.precision} {run.optimizer:6} {run.init}"
            progress.add_task(label, total=steps, loss=float("nan"))

        def on_step(loss: float) -> None:
            progress.update(progress.task_ids[-1], advance=1, loss=loss)

        return run_demo(settings, on_start, on_step)
