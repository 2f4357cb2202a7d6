"""Whether a method's training depends on scales that do not matter: two starts, one function, the same batches.

In float64, with an epsilon of BatchNorm that is as good as none. The second start is the first with every scale group
of the scale-invariant weights multiplied by a number of its own. An equivariant method has the same losses from both;
factors that are powers of two do not even change the rounding, so the losses are then equal to the bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retract.nets.cnn import ZooModel

from ..cells import TrainingCell
from ..demo import rescale_filters
from ..grid import Stopping
from ..training import NOT_FINITE
from .methods import Setting, find_method
from .store import DIVERGED, FINISHED
from .training import Settings, load_data, make_network

__all__ = ["STARTS", "EquivarianceCell", "equivariance_cells", "run_equivariance"]

STARTS = ("powers of two", "filters")
EPSILON = 1e-300
STEPS = 100
LARGEST_POWER = 5


@dataclass(frozen=True)
class EquivarianceCell(TrainingCell):
    """A method at its tuned setting, and the factors of the second start, 2^-5..2^5 or 10^U(-1.5, 1.5)."""

    protocol: str
    method: str
    data: str
    model: str
    lr: float
    euclidean_lr: float
    weight_decay: float
    start: str  # of `STARTS`
    seed: int
    stage: str
    steps: int = STEPS


def equivariance_cells(settings: Settings, tuned: Mapping[str, Setting]) -> list[EquivarianceCell]:
    """Both starts for every method, at its tuned setting."""
    return [
        EquivarianceCell(
            "robustness",
            method,
            settings.data,
            settings.model,
            setting.lr,
            setting.euclidean_lr,
            setting.weight_decay,
            start,
            0,
            "equivariance",
        )
        for (method, setting), start in product(tuned.items(), STARTS)
    ]


def run_equivariance(settings: Settings, cell: EquivarianceCell, stopping: Stopping) -> dict[str, Any] | None:
    """Train from both starts.

    Returns:
        ``max_difference``, the largest between two losses of one step, relative to the first loss; ``equal``, whether
        all are the same to the bit; ``seconds``; the curves ``usual`` and ``rescaled`` of the losses. None if it was
        stopped first.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    data = load_data(settings)
    torch.manual_seed(cell.seed)
    usual = make_network(cell.model, data).double()
    for module in usual.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = EPSILON
    rescaled = copy.deepcopy(usual)
    _rescale(rescaled, cell)
    images = data.normalizer()(data.train_images).double()
    generator = torch.Generator().manual_seed(cell.seed)
    batches = [torch.randperm(len(images), generator=generator)[: settings.batch_size] for _ in range(cell.steps)]
    losses = []
    for model in (usual, rescaled):
        found = _losses(cell, model, images, data.train_labels, batches, stopping)
        if found is None:
            return None
        losses.append(found)
    a, b = (torch.tensor(found, dtype=torch.float64) for found in losses)
    difference = (a - b).abs().max() / a[0]
    return {
        "status": FINISHED if bool(torch.isfinite(difference)) else DIVERGED,
        "max_difference": float(difference),
        "equal": torch.equal(a, b),
        "seconds": time.perf_counter() - begin,
        "curves": {name: list(enumerate(found)) for name, found in zip(("usual", "rescaled"), losses, strict=True)},
    }


@torch.no_grad()
def _rescale(model: Any, cell: EquivarianceCell) -> None:
    generator = torch.Generator().manual_seed(cell.seed)
    groups = model.manifold_groups()
    if cell.start == "filters":
        rescale_filters(groups, generator)
    elif cell.start == "powers of two":
        for group in groups:
            for _, weight in group["params"] if "manifold" in group else ():
                scales = group["manifold"].num_scales(weight.shape)
                powers = torch.randint(-LARGEST_POWER, LARGEST_POWER + 1, (scales,), generator=generator)
                weight.copy_(group["manifold"].act(weight, 2.0 ** powers.to(weight.dtype)))
    else:
        raise ValueError(f"start must be of {', '.join(STARTS)}, got {cell.start!r}")


def _losses(
    cell: EquivarianceCell, model: ZooModel, images: Tensor, labels: Tensor, batches: list[Tensor], stopping: Stopping
) -> list[float] | None:
    """The loss at every step, constant learning rates; NaN from where it is not finite on. PSI norms stay as given."""
    setting = Setting(cell.lr, cell.euclidean_lr, cell.weight_decay)
    optimizer = find_method(cell.method).build(model, setting, canonical=False)
    losses: list[float] = []
    for batch in batches:
        if stopping():
            return None
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        losses.append(loss.item())
        try:
            optimizer.step()
        except NOT_FINITE:
            break
    return losses + [float("nan")] * (len(batches) - len(losses))
