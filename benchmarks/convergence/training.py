"""Training a network by one of the convergence benchmark's methods: its cells, their runs, and what curves say.

All protocols that train (training, robustness, transfer) run these cells. Network, batches and their order depend on
the seed alone, so that methods are paired by it.
"""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import update_bn

from retract.nets.cnn import MODELS, ZooModel

from ..cells import TrainingCell, hold_out, open_cell
from ..data import Dataset, load
from ..experiment import usable_device
from ..grid import Stopping
from ..runs import Interrupted
from ..training import DivergedError, Trainer
from .methods import Setting, find_method
from .networks import sized_cnn
from .store import DIVERGED, FINISHED

__all__ = [
    "Cell",
    "RefusedError",
    "Settings",
    "begin",
    "first_reaching",
    "load_data",
    "make_network",
    "scale_weights_",
    "train_cell",
]

VALIDATION = 0.1  # of the training images
EXAMPLES = 32  # images to measure a network with
CHECKPOINTED = 100_000  # images seen by a run that is worth going on with; a shorter one begins anew


@dataclass(frozen=True)
class Settings:
    """What all cells of a store have in common and what decides their results."""

    data: str
    data_dir: str | None
    subset: int | None
    image_size: int | None
    augment: bool
    model: str
    epochs: int
    batch_size: int
    schedule: str
    warmup: float
    device: str
    amp: bool
    test_every: int = 1


@dataclass(frozen=True)
class Cell(TrainingCell):
    """One training run. Runs of a stage other than "final" train on less, and are measured on the validation split."""

    protocol: str
    method: str
    data: str
    model: str
    lr: float
    euclidean_lr: float
    weight_decay: float
    start: float  # factor of all scale-invariant weights
    seed: int
    stage: str
    epochs: int

    @property
    def setting(self) -> Setting:
        """Rates and decay."""
        return Setting(self.lr, self.euclidean_lr, self.weight_decay)

    @property
    def name(self) -> str:
        """What a run is called when it ends, and its folder while it trains."""
        method = "".join(character if character.isalnum() else "-" for character in self.method)
        numbers = f"{self.lr:g}-{self.euclidean_lr:g}-{self.weight_decay:g}"
        start = "" if self.start == 1 else f"-from-{self.start:g}"
        what = f"{self.protocol}-{self.stage}-{self.model}-{method}"
        return f"{what}-{numbers}{start}-{self.epochs}-epochs-{self.seed}"


class RefusedError(ValueError):
    """A method does not take a learning rate: PSIAngular no right angle. Such a cell counts as diverged."""


def train_cell(settings: Settings, folder: Path, cell: Cell, stopping: Stopping) -> dict[str, Any] | None:
    """Train one cell to its end, or to where training diverges.

    Returns:
        ``status``; ``accuracy`` and ``best_accuracy`` (fractions), ``area``, the mean accuracy over looks;
        ``train_loss`` and ``unseen_loss`` of the last epoch; all None if training diverged. ``reason``, why it did;
        ``seconds`` of training alone; ``curves`` by epoch. The whole is None if it was stopped first.
    """
    torch.set_num_threads(1)
    try:
        trainer = begin(settings, cell)
    except RefusedError as error:
        return _results([], str(error))
    run = None
    if cell.epochs * len(trainer.data.train_labels) >= CHECKPOINTED:
        run = open_cell(folder, cell, trainer)
    records = [] if run is None else run.metrics()
    reason = None
    try:
        trainer.fit(run, on_step=_stop_when(stopping), on_epoch=records.append)
    except Interrupted:
        return None
    except DivergedError as error:
        reason = str(error)
    if run is not None:
        run.remove_checkpoint()
    return _results(records, reason)


def _stop_when(stopping: Stopping) -> Callable[[Trainer], None]:
    def look(trainer: Trainer) -> None:
        if stopping():
            raise Interrupted(signal.SIGINT)

    return look


def begin(settings: Settings, cell: Cell) -> Trainer:
    """The trainer of a cell before its first step.

    Raises:
        RefusedError: the method refuses the learning rate.
    """
    data = load_data(settings)
    if cell.stage != "final":
        data = hold_out(data, round(VALIDATION * len(data.train_labels)))
    device = usable_device(settings.device)
    torch.manual_seed(cell.seed)
    model = make_network(cell.model, data)
    example = data.normalizer()(data.train_images[:EXAMPLES])
    scale_weights_(model, cell.start)
    model.to(device)
    try:
        optimizer = find_method(cell.method).build(model, cell.setting)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    # BatchNorm's statistics are of none yet, or of weights of other norms: an evaluation would not be of what trains.
    update_bn([example.to(device)], model)
    return Trainer(
        model,
        optimizer,
        data,
        epochs=cell.epochs,
        batch_size=settings.batch_size,
        schedule=settings.schedule,
        warmup=settings.warmup * cell.epochs / settings.epochs,  # of a shorter run the same part
        augment=settings.augment,
        seed=cell.seed,
        device=device,
        amp=settings.amp,
        test_every=settings.test_every,
    )


@lru_cache(maxsize=1)
def load_data(settings: Settings) -> Dataset:
    """The data of all cells, read once a process."""
    return load(settings.data, settings.data_dir, subset=settings.subset, image_size=settings.image_size)


def make_network(name: str, data: Dataset) -> ZooModel:
    """A network of the zoo, or one of `.networks.SIZED`, for a data set.

    Raises:
        ValueError: it has no scale-invariant weights.
    """
    make: Callable[..., ZooModel] = MODELS[name] if name in MODELS else sized_cnn(name)
    model = make(num_classes=len(data.classes), in_channels=data.image_shape[0])
    if not model.manifolds():
        raise ValueError(f"model must have scale-invariant weights, and {name} has none")
    return model


@torch.no_grad()
def scale_weights_(model: ZooModel, factor: float) -> None:
    """Multiply all scale-invariant weights: what the network computes stays, but for BatchNorm's epsilon."""
    for group in model.manifold_groups():
        for _, weight in group["params"] if "manifold" in group else ():
            weight.mul_(factor)


# ------------------------------------------------------------------------------------------------------ the results


def _results(records: Sequence[dict[str, Any]], reason: str | None) -> dict[str, Any]:
    ends = [sum(record["seconds"] for record in records[: index + 1]) for index in range(len(records))]
    curves = {
        name: [(record["epoch"], record[key], end) for record, end in zip(records, ends, strict=True) if key in record]
        for name, key in (
            ("train_loss", "train_loss"),
            ("unseen_loss", "test_loss"),
            ("accuracy", "test_accuracy"),
        )
    }
    if reason is not None:
        numbers: dict[str, Any] = dict.fromkeys(("accuracy", "best_accuracy", "area", "train_loss", "unseen_loss"))
    else:
        last = records[-1]
        accuracies = [record["test_accuracy"] for record in records if "test_accuracy" in record]
        numbers = {
            "accuracy": last["test_accuracy"],
            "best_accuracy": max(accuracies),
            "area": statistics.mean(accuracies),
            "train_loss": last["train_loss"],
            "unseen_loss": last["test_loss"],
        }
    status = FINISHED if reason is None else DIVERGED
    return {"status": status, **numbers, "reason": reason, "seconds": ends[-1] if ends else 0.0, "curves": curves}


def first_reaching(points: Sequence[Sequence[float | None]], target: float) -> tuple[float, float | None] | None:
    """(step, seconds) of the first point of a curve at or above a target; None if none is."""
    for step, value, seconds in points:
        if step is not None and value is not None and value >= target:
            return step, seconds
    return None
