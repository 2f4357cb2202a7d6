"""The protocol "transfer": whether the best learning rate of one network is that of wider, narrower and deeper ones.

Every method is tuned on one network, then trains all of them at all of its learning rates of the scale-invariant
weights, its other settings as tuned. What is compared is the loss on the validation split.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from .methods import Setting, find_method
from .networks import BASE, SIZED
from .training import Cell, Settings

__all__ = ["Transferred", "transfer_cells", "transferred"]

SEEDS = 3


@dataclass(frozen=True)
class Transferred:
    """One method on one network: mean losses over seeds on the validation split; infinite if a run diverged."""

    best_lr: float
    best_loss: float
    base_lr: float  # the best one of the network that was tuned
    base_lr_loss: float


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


def transferred(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Transferred]:
    """By method and network, what the best learning rate of `.networks.BASE` is worth elsewhere.

    Args:
        records: of the store; others than of this protocol are passed over, and methods whose base is not finished.
    """
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for record in records:
        if (record["protocol"], record["stage"]) == ("transfer", "transfer"):
            loss = math.inf if record["unseen_loss"] is None else record["unseen_loss"]
            losses.setdefault((record["method"], record["model"]), {}).setdefault(record["lr"], []).append(loss)
    means = {key: {lr: statistics.fmean(values) for lr, values in rates.items()} for key, rates in losses.items()}
    found = {}
    for (method, model), rates in means.items():
        base = means.get((method, BASE))
        if base is None:
            continue
        best, base_lr = min(rates, key=rates.__getitem__), min(base, key=base.__getitem__)
        found[method, model] = Transferred(best, rates[best], base_lr, rates.get(base_lr, math.inf))
    return found
