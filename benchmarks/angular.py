"""`retract bench angular`: the choices in PSIAngular, each against what it was chosen over, on digits."""

from __future__ import annotations

import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from retract.optim import PSIAngular
from retract.optim._scale import ScaleBlock, scale_blocks

from .digits import Trial, train
from .options import Processes
from .provenance import provenance
from .report import Table

__all__ = ["VARIANTS", "Variant", "angular_command"]

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
EUCLIDEAN_RATE = 0.3


@dataclass(frozen=True)
class Variant:
    """What a filter averages, how far it turns, and whether a zero gradient stops it."""

    average: str = "directions"  # or "gradients"
    angle: str = "filter"  # or "layer": lr is the root mean square over the layer, each filter's by its momentum
    idle: str = "stay"  # or "drift": go on along the momentum
    averages_past: bool = True


VARIANTS = {
    "as shipped": Variant(),
    "averages gradients": Variant(average="gradients"),
    "… one angle a layer": Variant(average="gradients", angle="layer"),
    "no averaging": Variant(averages_past=False),
    "drifts without a gradient": Variant(idle="drift"),
}


class _Angular(PSIAngular):
    """PSIAngular, written out with its alternatives. As shipped it is checked to be PSIAngular."""

    def __init__(self, params: Any, variant: Variant, **options: Any) -> None:
        self.variant = variant
        super().__init__(params, momentum=0.9 if variant.averages_past else 0.0, **options)

    def turn(self, group: dict[str, Any], *, check_finite: bool) -> None:
        for block in scale_blocks(self.scaled_parameters(group, ("momentum_buffer", "carry")), stack=False):
            self._turn_block(block, group["lr"], group["momentum"])

    def _turn_block(self, block: ScaleBlock, lr: float, momentum: float) -> None:
        assert block.momentum is not None and block.carry is not None
        radius, buffer = block.radius(), block.momentum
        gradient, signal = block.grad, block.norm(block.grad)
        if self.variant.average == "directions":
            gradient = gradient / signal.clamp_min(1e-30)
        buffer.mul_(block.carry * momentum).add_(gradient, alpha=1 - momentum)
        length = block.norm(block.project_(buffer, radius))
        angle = self._angles(length * radius, lr)
        if self.variant.idle == "stay":
            angle = angle * (signal > 0)
        block.weight.mul_(angle.cos()).addcmul_(buffer, -angle.sin() * radius / length.clamp_min(1e-30))
        block.carry.copy_(1 / angle.cos())

    def _angles(self, size: Tensor, lr: float) -> Tensor:
        if self.variant.angle == "filter":
            return (size > 0).to(size.dtype) * lr
        return (lr * size / size.square().mean().sqrt().clamp_min(1e-30)).clamp_max(math.pi / 2 - 0.01)


def _last_loss(job: tuple[str, float, int]) -> float:
    name, lr, seed = job

    def make(model: Any, example: Tensor) -> torch.optim.Optimizer:
        return _Angular(model.manifold_groups(), VARIANTS[name], lr=lr, euclidean_lr=EUCLIDEAN_RATE)

    return train(Trial(name, lr, EUCLIDEAN_RATE, "usual", seed, True), make).last_loss


def angular_command(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every setting.")] = 3,
    processes: Processes = 2,
) -> None:
    """Compare PSIAngular's choices with their alternatives: training loss of the last of 12 epochs on 8x8 digits."""
    from rich import print as show

    jobs = list(product(VARIANTS, RATES, range(seeds)))
    with ProcessPoolExecutor(processes) as pool:
        losses = dict(zip(jobs, pool.map(_last_loss, jobs), strict=True))
    rows = []
    for name in VARIANTS:
        means = [statistics.mean(losses[name, lr, seed] for seed in range(seeds)) for lr in RATES]
        rows.append([name, *(f"{mean:.4f}" for mean in means)])
    show(Table(("variant", *(f"lr {lr:g}" for lr in RATES)), rows, "Mean over seeds of the last epoch's loss.").rich())
    for name, value in provenance(seeds=seeds, euclidean_lr=EUCLIDEAN_RATE).items():
        show(f"{name}: {value}")
