"""What the training runs of all grids have in common: cells known by their fields, training that can be stopped."""

from __future__ import annotations

import math
import signal
import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch

from .data import Dataset
from .grid import Stopping
from .runs import Interrupted, Run
from .training import DivergedError, Trainer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["TrainingCell", "fit_cell", "hold_out", "lowest_rates", "mean_losses", "open_cell"]


Cell = TypeVar("Cell")
Key = TypeVar("Key", bound=Hashable)


class TrainingCell:
    """Base of the dataclasses that name one training run of a grid."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The cell of a line of results."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})  # type: ignore[arg-type]  # a dataclass


class Resumable(Protocol):
    """A trainer of any kind."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""


def open_cell(folder: Path, cell: DataclassInstance, trainer: Resumable) -> Run:
    """The folder of a cell's own in that of its grid, and the trainer at its last checkpoint if it was begun before."""
    name: str = cell.name  # type: ignore[attr-defined]
    run = Run.open_or_create(folder / "cells" / name, asdict(cell))
    if (state := run.load_checkpoint()) is not None:
        trainer.load_state_dict(state)
    return run


def fit_cell(
    trainer: Trainer, run: Run, stopping: Stopping, after_step: Callable[[Trainer], None] | None = None
) -> dict[str, Any] | None:
    """Train to the end, unless it is to stop before.

    Returns:
        ``train_loss``, ``unseen_loss`` and ``accuracy`` of the last epoch, None each if training diverged; None if it
        was stopped.
    """

    def look(trainer: Trainer) -> None:
        if after_step is not None:
            after_step(trainer)
        if stopping():
            raise Interrupted(signal.SIGINT)

    try:
        trainer.fit(run, on_step=look)
    except Interrupted:
        return None
    except DivergedError:
        return dict.fromkeys(("train_loss", "unseen_loss", "accuracy"))
    last = run.metrics()[-1]
    return {
        "train_loss": last["train_loss"],
        "unseen_loss": last["test_loss"],
        "accuracy": last["test_accuracy"],
    }


def hold_out(data: Dataset, size: int) -> Dataset:
    """The same task with ``size`` of its training images, drawn at random, in place of the test images."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    unseen, rest = order[:size], order[size:]
    return replace(
        data,
        train_images=data.train_images[rest],
        train_labels=data.train_labels[rest],
        test_images=data.train_images[unseen],
        test_labels=data.train_labels[unseen],
    )


def mean_losses(
    tuned: Mapping[Cell, Mapping[str, Any]], key: Callable[[Cell], tuple[Key, float]]
) -> dict[Key, dict[float, float]]:
    """Mean loss on held-out images over seeds, by what is tuned and by learning rate; infinite if a run diverged.

    Args:
        tuned: records of tuning runs.
        key: what a run tunes, and the learning rate that it tries.
    """
    losses: dict[Key, dict[float, list[float]]] = {}
    for cell, record in tuned.items():
        what, lr = key(cell)
        loss = math.inf if record["unseen_loss"] is None else record["unseen_loss"]
        losses.setdefault(what, {}).setdefault(lr, []).append(loss)
    return {what: {lr: statistics.mean(found) for lr, found in rates.items()} for what, rates in losses.items()}


def lowest_rates(losses: Mapping[Key, Mapping[float, float]]) -> dict[Key, float]:
    """The learning rate of the lowest of these losses, for each that is tuned.

    Raises:
        ValueError: one diverged at every rate.
    """
    for what, rates in losses.items():
        if min(rates.values()) == math.inf:
            raise ValueError(f"{what} diverged at every learning rate of {', '.join(f'{lr:g}' for lr in rates)}")
    return {what: min(rates, key=rates.__getitem__) for what, rates in losses.items()}
