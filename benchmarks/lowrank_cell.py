"""One training run of `retract bench lowrank`: a perceptron whose hidden layers have a low rank, from one start."""

from __future__ import annotations

import copy
import signal
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from retract.nets.init.calibration import calibrate
from retract.nets.init.low_rank import LowRankMethod
from retract.nets.layers.low_rank import low_rank_layer

from .cells import TrainingCell, hold_out
from .data import Dataset, load
from .experiment import usable_device
from .grid import Stopping
from .runs import Interrupted
from .training import DivergedError, Trainer

__all__ = [
    "CALIBRATION",
    "FULL_RANK",
    "LOOKS",
    "METHODS",
    "MOMENTUM",
    "NETWORKS",
    "WIDTHS",
    "Cell",
    "Settings",
    "calibration_batches",
    "load_data",
    "measured_statistics_",
    "perceptron",
    "starts",
    "train_cell",
]

NETWORKS = ("plain", "BatchNorm")
METHODS: dict[str, LowRankMethod] = {
    "spectral": "spectral",
    "scaled": "scaled",
    "norm": "norm",
    "relu": "relu",
    "relu_dc": "relu_dc",
    "random": "spectral",
    "calibrated": "spectral",
}
"""What `low_rank_layer` makes for each; the last two go on from there."""
FULL_RANK = "full rank"
WIDTHS = (256, 256, 256)  # of the hidden layers
MOMENTUM = 0.9
VALIDATION = 0.1  # of the training images
CALIBRATION, CALIBRATION_BATCH = 2000, 500  # training images
LOOKS, WINDOW = (25, 50, 100), 10  # steps after which the loss is looked at, and how many steps its mean is over


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid have in common."""

    data: str
    data_dir: str | None
    subset: int | None
    image_size: int | None
    epochs: int  # of perceptrons
    batch_size: int
    model: str  # to compress
    model_epochs: int
    model_batch_size: int
    device: str
    amp: bool


@dataclass(frozen=True)
class Cell(TrainingCell):
    """One training run. A tuning run trains on less, and is measured on the validation split."""

    network: str
    fraction: float  # rank of each hidden layer over the smaller side of its weight; 1 for full rank
    method: str
    lr: float
    seed: int
    tuning: bool
    part: str = "training"

    @property
    def name(self) -> str:
        """What a run is called when it ends."""
        stage = "tuning" if self.tuning else "final"
        return f"{self.network}-{self.method.replace(' ', '-')}-{self.fraction:g}-{self.lr:g}-{stage}-{self.seed}"


def train_cell(settings: Settings, cell: Cell, stopping: Stopping) -> dict[str, Any] | None:
    """Train one cell and measure it. A run of seconds: one that is stopped begins anew.

    Returns:
        ``early``, the losses around the steps `LOOKS`, None where training was over; ``train_loss`` of the last epoch,
        ``unseen_loss`` and ``accuracy``; ``energy``, the mean square of the logits before the first step over the full
        rank network's; ``seconds``. Losses and accuracy are None if training diverged. The whole is None if it was
        stopped first.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    trainer, energy = _begin(settings, cell)
    losses: list[Tensor] = []

    def look(trainer: Trainer) -> None:
        if len(losses) < max(LOOKS):
            losses.append(trainer.losses[trainer.step - 1])
        if stopping():
            raise Interrupted(signal.SIGINT)

    records: list[dict[str, Any]] = []
    try:
        trainer.fit(on_step=look, on_epoch=records.append)
    except Interrupted:
        return None
    except DivergedError:
        records = [dict.fromkeys(("train_loss", "test_loss", "test_accuracy"))]
    diverged, last = records[-1]["train_loss"] is None, records[-1]
    early = [None if diverged or len(losses) < step else _mean(losses[step - WINDOW : step]) for step in LOOKS]
    return {
        "early": early,
        "train_loss": last["train_loss"],
        "unseen_loss": last["test_loss"],
        "accuracy": last["test_accuracy"],
        "energy": energy,
        "seconds": time.perf_counter() - begin,
    }


def _mean(losses: list[Tensor]) -> float:
    return float(torch.stack(losses).double().mean())


def _begin(settings: Settings, cell: Cell) -> tuple[Trainer, float]:
    """The trainer before the first step, and the energy of its network's outputs."""
    data = load_data(settings)
    if cell.tuning:
        data = hold_out(data, round(VALIDATION * len(data.train_labels)))
    torch.manual_seed(cell.seed)
    reference = perceptron(data, cell.network == "BatchNorm")
    batches = calibration_batches(data, cell.seed)
    measured_statistics_(reference, batches)
    model = starts(reference, cell.method, cell.fraction, batches)
    energy = _energy(model, batches) / _energy(reference, batches)
    model.to(usable_device(settings.device))
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=cell.lr, momentum=MOMENTUM),
        data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        schedule="constant",  # early losses do not depend on how long the run will be
        seed=cell.seed,
        device=settings.device,
        test_every=settings.epochs,
    )
    return trainer, energy


def perceptron(data: Dataset, normalized: bool) -> nn.Sequential:
    """Hidden layers of `WIDTHS` with ReLU, with BatchNorm before it or a bias, and a classifier with a bias.

    Weights are normal and keep variances (He et al., ICCV 2015); biases are zero.
    """
    size = data.train_images[0].numel()
    layers: list[nn.Module] = [nn.Flatten()]
    for width in WIDTHS:
        layers.append(nn.Linear(size, width, bias=not normalized))
        layers += [nn.BatchNorm1d(width), nn.ReLU()] if normalized else [nn.ReLU()]
        size = width
    layers.append(nn.Linear(size, len(data.classes)))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def starts(reference: nn.Sequential, method: str, fraction: float, batches: list[Tensor]) -> nn.Sequential:
    """A copy of a network whose hidden layers have a low rank, as a method makes it of the network's weights.

    ``"random"`` draws factors afresh, of the same variance. ``"calibrated"`` fits the layers on the batches, biases too
    where there are any. The classifier keeps its full rank. BatchNorm has the statistics of its own inputs.
    """
    model = copy.deepcopy(reference)
    if method == FULL_RANK:
        return model
    *hidden, _ = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    for name, layer in hidden:
        low = low_rank_layer(layer, max(1, round(fraction * min(layer.weight.shape))), method=METHODS[method])
        if method == "random":
            low.reset_parameters()
        model.set_submodule(name, low)
    if method == "calibrated":
        calibrate(model, batches, reference=reference)
    else:
        measured_statistics_(model, batches)
    return model


def calibration_batches(data: Dataset, seed: int, images: int = CALIBRATION) -> list[Tensor]:
    """So many training images as a network gets them, or all, drawn at random by the seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_labels), generator=generator)[:images]
    return list(data.normalizer()(data.train_images[chosen]).split(CALIBRATION_BATCH))


@torch.no_grad()
def measured_statistics_(model: nn.Module, batches: list[Tensor]) -> None:
    """Give every BatchNorm the mean of its statistics over the batches; the training mode stays as it is."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    training, momenta = model.training, [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean
    model.train()
    for batch in batches:
        model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(training)


@torch.no_grad()
def _energy(model: nn.Module, batches: list[Tensor]) -> float:
    """Mean square of the outputs in eval mode."""
    model.eval()
    return float(torch.cat([model(batch) for batch in batches]).double().square().mean())


@lru_cache(maxsize=1)
def load_data(settings: Settings) -> Dataset:
    """The data of all cells, read once a process."""
    return load(settings.data, settings.data_dir, subset=settings.subset, image_size=settings.image_size)
