"""The protocol "transfer": whether the best learning rate of one network is that of wider, narrower and deeper ones.

Every method is tuned on one network, then trains all of them at all of its learning rates of the scale-invariant
weights, its other settings as tuned. What is compared is the loss on the validation split.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from .methods import Setting, find_method
from .networks import SIZED
from .training import Cell, Settings

__all__ = ["transfer_cells"]

SEEDS = 3


def transfer_cells(settings: Settings, tuned: Mapping[str, Setting], seeds: int) -> list[Cell]:
    """Every network at every learning rate of each method, from three seeds at most."""
    return [
        Cell(
            "transfer",
            method,
            settings.data,
            model,
            lr,
            setting.euclidean_lr,
            setting.weight_decay,
            1.0,
            seed,
            "transfer",
            settings.epochs,
        )
        for (method, setting), model, seed in product(tuned.items(), SIZED, range(min(seeds, SEEDS)))
        for lr in find_method(method).lrs
    ]
