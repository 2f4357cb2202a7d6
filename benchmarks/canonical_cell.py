"""One training run of `retract bench canonical`: a network with plain, weight-normalized or canonical weights, or a
canonical one whose terms were cut after training.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from retract.nets._canonical_layers import CanonicalLayer, canonical_layers, ranks_by_error, ranks_by_ratio
from retract.nets._truncation import Truncation, shrink_terms_, truncate
from retract.nets.cnn import MODELS
from retract.nets.parametrizations.canonical import canonical_weight_norm
from retract.nets.parametrizations.models import canonical_weights

from . import optimizers
from .cells import TrainingCell, fit_cell, hold_out, open_cell
from .data import Dataset, load
from .experiment import usable_device
from .grid import Stopping
from .runs import Run
from .training import Trainer

__all__ = ["METHODS", "STAGES", "Cell", "Method", "Settings", "load_data", "train_cell"]


class Method(NamedTuple):
    """The weights of a network, as its builder names them; the ways in which terms are cut, if it has any; and whether
    an l1 penalty presses on them.
    """

    weights: str
    cuts: tuple[str, ...] = ()
    pressed: bool = False


METHODS = {
    "plain": Method("plain"),
    "weight norm": Method("weight_norm"),
    "canonical": Method("canonical", ("ratio", "error")),
    "canonical l1": Method("canonical", ("error",), pressed=True),
}
STAGES = ("tuning", "fine-tuning", "training", "truncation", "scratch")
VALIDATED = ("tuning", "fine-tuning")  # stages that choose a learning rate, on the validation split
OPTIMIZER = "adamw"  # without decay it is Adam, as in the published experiments
VALIDATION = 0.1  # of the training images
WARMUP = 0.05  # of a run: the learning rate grows
BISECTIONS = 20  # of the error that fits a number of parameters


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid have in common."""

    data: str
    data_dir: str | None
    model: str
    subset: int | None
    image_size: int | None
    epochs: int
    tuning_epochs: int
    fine_tuning_epochs: int
    batch_size: int
    pressure: float  # of the l1 penalty: the threshold of a step, in learning rates
    device: str
    amp: bool


@dataclass(frozen=True)
class Cell(TrainingCell):
    """One training run.

    A "truncation" begins with the trained network of its method, rate and seed, and fine-tunes what is left of it, at a
    rate of its own; "scratch" trains a network of as many terms from its beginning, for as many epochs as both
    together. ``kept`` is the fraction of the terms, ``allocation`` how it is shared out: by "ratio" in every layer, or
    by one "error" over all layers, with as many parameters or fewer. "tuning" and "fine-tuning" are the training and
    the truncation that choose these rates, and are measured on the validation split.
    """

    method: str
    lr: float
    seed: int
    stage: str = "training"
    kept: float = 1.0
    allocation: str = "ratio"
    fine_tuning_lr: float | None = None

    @property
    def name(self) -> str:
        """A name for its folder."""
        part = "" if self.stage in ("tuning", "training") else f"-{self.kept:g}-{self.allocation}"
        part += "" if self.fine_tuning_lr is None else f"-{self.fine_tuning_lr:g}"
        return f"{self.method.replace(' ', '-')}-{self.lr:g}-{self.stage}{part}-{self.seed}"

    @property
    def parent(self) -> Cell:
        """The run in which the network of a truncation was trained."""
        return Cell(self.method, self.lr, self.seed, "tuning" if self.stage == "fine-tuning" else "training")


def train_cell(settings: Settings, folder: Path, cell: Cell, stopping: Stopping) -> dict[str, Any] | None:
    """Train one cell in a folder of its own, from its last checkpoint if it was begun before, and measure it.

    The checkpoint of a canonical network that was trained whole stays in its folder, for truncations.

    Returns:
        Its results, with losses and accuracy None if it diverged; None if it was stopped first.
    """
    torch.set_num_threads(1)
    data = load_data(settings)
    if cell.stage in VALIDATED:
        data = hold_out(data, round(VALIDATION * len(data.train_labels)))
    trainer, facts = _begin(settings, folder, cell, data)
    run = open_cell(folder, cell, trainer)
    if (found := fit_cell(trainer, run, stopping, _pressure(settings, cell))) is None:
        return None
    seconds = [record["seconds"] for record in run.metrics()]
    if cell.stage not in ("tuning", "training") or not METHODS[cell.method].cuts:
        run.remove_checkpoint()
    return {
        **found,
        "parameters": _count(trainer.model),
        "steps_per_second": trainer.steps_per_epoch / statistics.median(seconds) if seconds else None,
        "seconds": sum(seconds),
        **facts,
    }


def _pressure(settings: Settings, cell: Cell) -> Callable[[Trainer], None] | None:
    """The proximal step of the l1 penalty, which follows every step while a network is trained.

    There is none in fine-tuning, when the terms are chosen.
    """
    if not METHODS[cell.method].pressed or cell.stage not in ("tuning", "training"):
        return None
    return lambda trainer: shrink_terms_(trainer.model, settings.pressure * trainer.optimizer.param_groups[0]["lr"])


def _begin(settings: Settings, folder: Path, cell: Cell, data: Dataset) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a cell before its first step, and what can be measured then."""
    torch.manual_seed(cell.seed)
    model = build_model(settings, cell, data)
    if cell.fine_tuning_lr is None:
        return _trainer(settings, cell, data, model, build_optimizer(model, cell.lr)), {}
    optimizer = build_optimizer(model, cell.lr)
    state = Run.open(folder / "cells" / cell.parent.name).load_checkpoint()
    if state is None:
        raise ValueError(f"{folder / 'cells' / cell.parent.name} has no checkpoint of the trained network")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    cut = cut_terms(model, cell.kept, cell.allocation)
    fresh = build_optimizer(cut.model, cell.fine_tuning_lr)
    cut.carry_state(optimizer, fresh)
    trainer = _trainer(settings, cell, data, cut.model, fresh)
    loss, accuracy = trainer.evaluate()
    ranks = {layer.name: layer.new_rank for layer in cut.layers}
    return trainer, {"loss_before": loss, "accuracy_before": accuracy, "ranks": ranks}


def build_model(settings: Settings, cell: Cell, data: Dataset) -> nn.Module:
    """The network of a cell before its first step; of a truncation, before the cut."""
    make = partial(MODELS[settings.model], num_classes=len(data.classes), in_channels=data.image_shape[0])
    model: nn.Module = make(weights=METHODS[cell.method].weights)
    if cell.stage == "scratch":
        ranks = {name.rpartition(".")[0]: canonical.rank for name, canonical, _ in canonical_weights(model)}
        model = make(weights="plain")
        for name, rank in ranks.items():
            canonical_weight_norm(model.get_submodule(name), max(1, int(cell.kept * rank)))
    return model.to(usable_device(settings.device))


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The same for all cells but for the rate."""
    return optimizers.build(OPTIMIZER, model, lr=lr)


@torch.no_grad()
def cut_terms(model: nn.Module, kept: float, allocation: str) -> Truncation[nn.Module]:
    """A fraction of the terms of every layer; or by one error over all layers, as small as the parameters allow."""
    if allocation == "ratio" or kept == 1:
        return truncate(model, ratio=kept)
    layers = canonical_layers(model)
    best = ranks_by_ratio(layers, kept)
    allowed, low, high = _terms_cost(layers, best), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        ranks = ranks_by_error(layers, middle)
        if _terms_cost(layers, ranks) > allowed:
            low = middle
        else:
            high, best = middle, ranks
    return truncate(model, ranks={layer.name: rank for layer, rank in zip(layers, best, strict=True)})


def _terms_cost(layers: list[CanonicalLayer], ranks: list[int]) -> int:
    return sum(layer.parameters_per_term * rank for layer, rank in zip(layers, ranks, strict=True))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trainer(
    settings: Settings, cell: Cell, data: Dataset, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Trainer:
    epochs = {
        "tuning": settings.tuning_epochs,
        "fine-tuning": settings.fine_tuning_epochs,
        "training": settings.epochs,
        "truncation": settings.fine_tuning_epochs,
        "scratch": settings.epochs + settings.fine_tuning_epochs,
    }[cell.stage]
    torch.manual_seed(cell.seed)  # dropout, alike for all weights
    return Trainer(
        model,
        optimizer,
        data,
        epochs=epochs,
        batch_size=settings.batch_size,
        warmup=WARMUP * epochs,
        augment=data.flip,
        seed=cell.seed,
        device=settings.device,
        amp=settings.amp,
        test_every=epochs,
    )


@lru_cache(maxsize=1)
def load_data(settings: Settings) -> Dataset:
    """The data of all cells, read once a process."""
    return load(settings.data, settings.data_dir, subset=settings.subset, image_size=settings.image_size)
