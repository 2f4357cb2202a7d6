"""One training run of `retract bench layers`: a network whose inner layers are dense, SVDP or STTP, in either form."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from retract.manifolds.spectrum import Bounded, Identity, Lipschitz, Spectrum
from retract.nets.cnn import MODELS
from retract.nets.parametrizations import spectral_weights
from retract.nets.summary import summary

from . import optimizers
from .cells import TrainingCell, fit_cell, hold_out, open_cell
from .data import Dataset, load
from .experiment import usable_device
from .factorization import Factorization
from .grid import Stopping
from .training import Trainer

__all__ = ["METHODS", "Cell", "Method", "Settings", "load_data", "prepare", "train_cell"]


class Method(NamedTuple):
    """Kind and form of the layers (None: dense), and the optimizer, by its name in :mod:`.optimizers`."""

    kind: str | None
    form: str | None
    optimizer: str


METHODS = {
    "dense": Method(None, None, "sgd"),
    "SVDP Householder": Method("svdp", "householder", "sgd"),
    "SVDP Stiefel": Method("svdp", "stiefel", "riemannian-sgd"),
    "STTP Householder": Method("sttp", "householder", "sgd"),
    "STTP Stiefel": Method("sttp", "stiefel", "riemannian-sgd"),
}
EUCLIDEAN_RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
VALIDATION = 0.1  # of the training images


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid have in common."""

    data: str
    data_dir: str | None
    subset: int | None
    image_size: int | None
    epochs: int
    tuning_epochs: int
    batch_size: int
    rank: int | None  # None: a quarter of the widest layer
    spectrum: str
    device: str
    amp: bool


@dataclass(frozen=True)
class Cell(TrainingCell):
    """One training run. A tuning run trains on less, and is measured on the validation split."""

    model: str
    method: str
    lr: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """A name for its folder."""
        stage = "tuning" if self.tuning else "final"
        return f"{self.model}-{self.method.lower().replace(' ', '-')}-{self.lr:g}-{stage}-{self.seed}"


def train_cell(settings: Settings, folder: Path, cell: Cell, stopping: Stopping) -> dict[str, Any] | None:
    """Train one cell in a folder of its own, from its last checkpoint if it was begun before, and measure it.

    Returns:
        Its results, with losses None if it diverged; None if it was stopped first.
    """
    torch.set_num_threads(1)
    trainer = _trainer(settings, cell)
    run = open_cell(folder, cell, trainer)
    if (found := fit_cell(trainer, run, stopping)) is None:
        return None
    seconds = [record["seconds"] for record in run.metrics()]
    run.remove_checkpoint()
    return {
        **found,
        "steps_per_second": trainer.steps_per_epoch / statistics.median(seconds) if seconds else None,
        "seconds": sum(seconds),
        **measure(trainer.model),
    }


def _trainer(settings: Settings, cell: Cell) -> Trainer:
    data = load_data(settings)
    if cell.tuning:
        data = hold_out(data, round(VALIDATION * len(data.train_labels)))
    torch.manual_seed(cell.seed)
    model = MODELS[cell.model](num_classes=len(data.classes), in_channels=data.image_shape[0])
    device = usable_device(settings.device)
    epochs = settings.tuning_epochs if cell.tuning else settings.epochs
    optimizer = prepare(settings, cell, model.to(device))
    return Trainer(
        model,
        optimizer,
        data,
        epochs=epochs,
        batch_size=settings.batch_size,
        augment=data.flip,
        seed=cell.seed,
        device=device,
        amp=settings.amp,
        test_every=epochs,
    )


def prepare(settings: Settings, cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    """Factorize the layers between the first and the last, if so; the optimizer that steps them at the cell's rate."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    first, *inner, last = layers
    method = METHODS[cell.method]
    options: dict[str, Any] = {"momentum": MOMENTUM, "weight_decay": DECAY}
    if method.kind is None or method.form is None:
        own = {id(layers[name].weight) for name in inner}
        tuned = [weight for weight in model.parameters() if id(weight) in own]
        others = [weight for weight in model.parameters() if id(weight) not in own]
        groups: list[dict[str, Any]] = [{"params": tuned}, {"params": others, "lr": EUCLIDEAN_RATE}]
        return torch.optim.SGD(groups, lr=cell.lr, **options)
    rank = settings.rank or max(len(layers[name].weight) for name in inner) // 4
    Factorization(method.kind, rank, settings.spectrum, method.form, (first, last)).apply(model)
    return optimizers.build(method.optimizer, model, lr=cell.lr, euclidean_lr=EUCLIDEAN_RATE, **options)


@lru_cache(maxsize=1)
def load_data(settings: Settings) -> Dataset:
    """The data of all cells, read once a process."""
    return load(settings.data, settings.data_dir, subset=settings.subset, image_size=settings.image_size)


@torch.no_grad()
def measure(model: nn.Module) -> dict[str, float | None]:
    """How compressed a network is, and how far its factored layers are from what they promise (None if it has none).

    ``orthonormality_error`` is the largest entry of |UᵀU - I| and |VᵀV - I| over all layers, ``cap_error`` the largest
    |sigma_1 - cap| (for a bounded spectrum, by how much sigma_1 exceeds it), in float64 from weights as trained.
    """
    orthonormality, cap = [], []
    for _, parametrization, weights in spectral_weights(model):
        u, s, v = (factor.double() for factor in parametrization.factors(*weights))
        for frame in (u, v):
            orthonormality.append((frame.mT @ frame - torch.eye(s.numel(), device=s.device)).abs().amax().item())
        excess = _excess(parametrization.spectrum, torch.linalg.matrix_norm((u * s) @ v.mT, 2).item())
        if excess is not None:
            cap.append(excess)
    return {
        "compression": summary(model).compression,
        "orthonormality_error": max(orthonormality, default=None),
        "cap_error": max(cap, default=None),
    }


def _excess(spectrum: Spectrum, largest: float) -> float | None:
    """How far the largest singular value is from its cap; None where there is none."""
    match spectrum:
        case Identity():
            return abs(largest - 1)
        case Lipschitz():
            return abs(largest - spectrum.c)
        case Bounded():
            return max(0.0, largest - spectrum.high)
    return None
