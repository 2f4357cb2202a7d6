"""The protocol "robustness": how far a method may be from its own best learning rate and from the usual weights.

Every method trains at its tuned setting, its learning rate of the scale-invariant weights times factors over four
decades, from scale-invariant weights all times factors over six. BatchNorm makes all starts one function, but for its
epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from .methods import Setting
from .training import Cell, Settings

__all__ = ["FACTORS", "SCALES", "map_cells"]

SCALES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SEEDS = 3  # at most: a method has 63 cells of each
SHORTER = 3  # times than a run of the training protocol


def map_cells(settings: Settings, tuned: Mapping[str, Setting], seeds: int) -> list[Cell]:
    """Every scale with every factor of the learning rate, for every method, from three seeds at most; seed by seed."""
    return [
        Cell(
            "robustness",
            method,
            settings.data,
            settings.model,
            float(f"{setting.lr * factor:.6g}"),
            setting.euclidean_lr,
            setting.weight_decay,
            scale,
            seed,
            "final",
            max(1, settings.epochs // SHORTER),
        )
        for seed, (method, setting) in product(range(min(seeds, SEEDS)), tuned.items())
        for scale, factor in product(SCALES, FACTORS)
    ]
