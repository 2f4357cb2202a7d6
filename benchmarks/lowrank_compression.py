"""Networks of `retract bench lowrank` that are trained first and made smaller afterwards, then trained on a little."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retract.nets.cnn import MODELS
from retract.nets.compress import factorize
from retract.nets.init.calibration import calibrate

from .cells import TrainingCell, fit_cell, hold_out, open_cell
from .data import Dataset
from .experiment import usable_device
from .grid import Stopping
from .lowrank_cell import MOMENTUM, VALIDATION, Settings, calibration_batches, load_data, measured_statistics_
from .runs import Run
from .training import Trainer

__all__ = ["BUDGETS", "DECAY", "FINE_TUNING_EPOCHS", "INITIALIZATIONS", "RATE", "Compression", "compress", "train_cell"]

BUDGETS = (0.5, 0.35, 0.2, 0.1)  # of the parameters of the layers that become low-rank
INITIALIZATIONS = ("spectral", "relu", "relu_dc", "calibrated")
RATE, DECAY, WARMUP = 0.1, 5e-4, 0.05  # of the dense network; the warm-up as a part of its epochs
FINE_TUNING_EPOCHS = 1
CALIBRATION = 500  # training images, of many positions each
TEST_IMAGES = 5000  # drawn at random, the same for all: every compressed network is tested three times
VALIDATED = ("tuning", "fine-tuning")  # stages that choose a learning rate, on the validation split


@dataclass(frozen=True)
class Compression(TrainingCell):
    """One run: a dense network ("dense") or one that was made of it and is trained on ("compressed").

    "tuning" and "fine-tuning" are the same on fewer images, measured on the validation split, to choose the rate of
    "compressed". A dense network has ``budget`` 1 and no ``initialization``.
    """

    stage: str
    seed: int
    lr: float = RATE
    budget: float = 1.0
    initialization: str = ""
    part: str = "compression"

    @property
    def name(self) -> str:
        """A name for its folder."""
        made = f"-{self.initialization}-{self.budget:g}" if self.initialization else ""
        return f"{self.stage}{made}-{self.lr:g}-{self.seed}"

    @property
    def parent(self) -> Compression:
        """The run of the dense network that this one is made of."""
        return Compression("tuning" if self.stage in VALIDATED else "dense", self.seed)


def train_cell(settings: Settings, folder: Path, cell: Compression, stopping: Stopping) -> dict[str, Any] | None:
    """Train one cell in a folder of its own, from its last checkpoint if it was begun before, and measure it.

    The checkpoint of a dense network stays in its folder, for those that are made of it.

    Returns:
        ``train_loss``, ``unseen_loss`` and ``accuracy``, None if it diverged; ``parameters``, ``seconds``; of one made
        of a dense network also ``accuracy_as_made`` and ``accuracy_before``, before training, with BatchNorm statistics
        as the initialization left them and as measured on training images. None if it was stopped first.
    """
    torch.set_num_threads(1)
    data = load_data(settings)
    if cell.stage in VALIDATED:
        data = hold_out(data, round(VALIDATION * len(data.train_labels)))
    data = _fewer_tests(data)
    trainer, facts = _begin(settings, folder, cell, data)
    run = open_cell(folder, cell, trainer)
    if (found := fit_cell(trainer, run, stopping)) is None:
        return None
    if cell.initialization:
        run.remove_checkpoint()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    seconds = sum(record["seconds"] for record in run.metrics())
    return {**found, **facts, "parameters": parameters, "seconds": seconds}


def _fewer_tests(data: Dataset) -> Dataset:
    order = torch.randperm(len(data.test_labels), generator=torch.Generator().manual_seed(0))[:TEST_IMAGES]
    return replace(data, test_images=data.test_images[order], test_labels=data.test_labels[order])


def _begin(settings: Settings, folder: Path, cell: Compression, data: Dataset) -> tuple[Trainer, dict[str, float]]:
    """The trainer of a cell before its first step, and what can be measured then."""
    torch.manual_seed(cell.seed)
    model: nn.Module = MODELS[settings.model](num_classes=len(data.classes), in_channels=data.image_shape[0])
    device = usable_device(settings.device)
    model.to(device)
    if not cell.initialization:
        return _trainer(settings, cell, data, model), {}
    state = Run.open(folder / "cells" / cell.parent.name).load_checkpoint()
    if state is None:
        raise ValueError(f"{folder / 'cells' / cell.parent.name} has no checkpoint of the trained network")
    model.load_state_dict(state["model"])
    batches = [batch.to(device) for batch in calibration_batches(data, cell.seed, CALIBRATION)]
    trainer = _trainer(settings, cell, data, compress(model.eval(), cell.initialization, cell.budget, batches))
    facts = {"accuracy_as_made": trainer.evaluate()[1]}
    measured_statistics_(trainer.model, batches)
    return trainer, {**facts, "accuracy_before": trainer.evaluate()[1]}


def compress(model: nn.Module, initialization: str, budget: float, batches: list[Tensor]) -> nn.Module:
    """Give all layers of a trained network but the first and the last a low rank, in place, from one of the starts.

    Ranks depend on the weights and the budget alone. ``"calibrated"`` fits the layers on the batches.
    """
    first, *_, last = (name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    calibrated = initialization == "calibrated"
    reference = copy.deepcopy(model)
    start = "spectral" if calibrated else initialization
    factorize(model, "lowrank", budget=budget, init=start, skip=(first, last))
    if calibrated:
        calibrate(model, batches, reference=reference)
    return model


def _trainer(settings: Settings, cell: Compression, data: Dataset, model: nn.Module) -> Trainer:
    """The dense network has weight decay; one epoch of factors goes without."""
    epochs, decay = (FINE_TUNING_EPOCHS, 0.0) if cell.initialization else (settings.model_epochs, DECAY)
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=cell.lr, momentum=MOMENTUM, weight_decay=decay),
        data,
        epochs=epochs,
        batch_size=settings.model_batch_size,
        warmup=WARMUP * epochs,
        augment=data.flip,
        seed=cell.seed,
        device=settings.device,
        amp=settings.amp,
        test_every=epochs,
    )
