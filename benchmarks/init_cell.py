"""One training run of `retract bench init`: a deep plain network of tensorial convolutions, from one initialization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retract.nets.layers.tensor import TensorConv2d
from retract.nets.layers.tensor_formats import tensor_network

from .cells import TrainingCell, fit_cell, hold_out, open_cell
from .data import Dataset, load
from .experiment import usable_device
from .grid import Stopping
from .init_methods import INITIALIZATIONS
from .training import Trainer

__all__ = ["Cell", "Settings", "load_data", "plain_network", "train_cell"]

VALIDATION = 0.2  # of the training images
SMALLEST = 8  # maps that are still halved: the zeros around smaller ones would be most of what a kernel sees
WARMUP = 1.0  # epochs


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid have in common."""

    data: str
    data_dir: str | None
    subset: int | None
    image_size: int | None
    depth: int  # tensorial layers
    channels: int
    budget: float  # of the parameters of a dense layer
    epochs: int
    tuning_epochs: int
    batch_size: int
    device: str


@dataclass(frozen=True)
class Cell(TrainingCell):
    """One training run. A tuning run is shorter, and is measured on images that are held out of the training images."""

    format: str
    initialization: str
    lr: float
    seed: int
    tuning: bool
    part: str = "training"

    @property
    def name(self) -> str:
        """A name for its folder."""
        words = "".join(c if c.isalnum() else " " for c in self.initialization).split()
        return "-".join([self.format, *words, f"{self.lr:g}", "tuning" if self.tuning else "final", str(self.seed)])


def train_cell(settings: Settings, folder: Path, cell: Cell, stopping: Stopping) -> dict[str, Any] | None:
    """Train one cell in a folder of its own, from its last checkpoint if it was begun before.

    Returns:
        Its results, with losses and accuracy None if it diverged; None if it was stopped first.
    """
    torch.set_num_threads(1)
    trainer = _trainer(settings, cell)
    run = open_cell(folder, cell, trainer)
    if (found := fit_cell(trainer, run, stopping)) is None:
        return None
    curve = [record["train_loss"] for record in run.metrics()]
    run.remove_checkpoint()
    return {
        **found,
        "curve": curve,
        "seconds": sum(record["seconds"] for record in run.metrics()),
    }


def _trainer(settings: Settings, cell: Cell) -> Trainer:
    data = load_data(settings)
    if cell.tuning:
        data = hold_out(data, round(VALIDATION * len(data.train_labels)))
    torch.manual_seed(cell.seed)
    model = plain_network(settings, data, cell.format, cell.initialization).to(usable_device(settings.device))
    epochs = settings.tuning_epochs if cell.tuning else settings.epochs
    return Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=cell.lr),
        data,
        epochs=epochs,
        batch_size=settings.batch_size,
        warmup=min(WARMUP, epochs / 2),
        seed=cell.seed,
        device=settings.device,
        test_every=epochs,
    )


def plain_network(settings: Settings, data: Dataset, format: str, initialization: str) -> nn.Sequential:
    """A convolution and a classifier, both dense, and between them tensorial convolutions with ReLU, and nothing else.

    There is no normalisation and no skip connection. The maps, of 8 or more pixels, are halved by the first convolution
    if images have 16 or more, and by the tensorial ones at a third and at two thirds of the depth. The dense layers are
    the same from every initialization: their weights keep variances, as He et al. would have them; biases are zero.
    """
    colours, height, width = data.image_shape
    size, stride = min(height, width), 1
    if size >= 2 * SMALLEST:
        size, stride = -(-size // 2), 2
    network = tensor_network(format, (settings.channels, settings.channels, 3, 3), budget=settings.budget)
    first = nn.Conv2d(colours, settings.channels, 3, stride=stride, padding=1)
    nn.init.kaiming_normal_(first.weight, nonlinearity="linear")
    nn.init.zeros_(first.bias)  # type: ignore[arg-type]
    layers: list[nn.Module] = [first, nn.ReLU()]
    for index in range(settings.depth):
        halve = size >= SMALLEST and index in (settings.depth // 3, 2 * settings.depth // 3)
        layer = TensorConv2d(network, stride=2 if halve else 1, padding=1)
        INITIALIZATIONS[initialization](layer, format, size)
        layers += [layer, nn.ReLU()]
        size = -(-size // 2) if halve else size
    last = nn.Linear(settings.channels, len(data.classes))
    nn.init.kaiming_normal_(last.weight, nonlinearity="linear")
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


@lru_cache(maxsize=1)
def load_data(settings: Settings) -> Dataset:
    """The data of all cells, read once a process."""
    return load(settings.data, settings.data_dir, subset=settings.subset, image_size=settings.image_size)
