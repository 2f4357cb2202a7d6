"""What constraints cost: a step of SNGAN-32's discriminator under each of them, methods in turns in one run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from retract.nets.gan.constraints import CONSTRAINTS, constrain
from retract.nets.gan.sngan import SNGANDiscriminator
from retract.nets.parametrizations.models import shared_frames
from retract.nets.summary import summary

from ..figures import show_figures
from ..report import Table
from ..timing import interleave
from .cell import STIEFEL
from .losses import LOSSES
from .optimizers import NetworkOptimizer

__all__ = ["REFERENCE", "show_step_times", "step_times"]

REFERENCE = "sn"  # torch's spectral normalization
BATCH, RANKS = 64, (16, 64, 128)
ALLOWED = 1.25  # of the reference's time, at rank 64


def show_step_times(methods: list[str], seconds: float) -> None:
    """Print the table."""
    show_figures([step_times(methods, seconds)], [], batch_size=BATCH, seconds=seconds)


def step_times(
    methods: list[str], seconds: float, *, width: int | None = None, ranks: tuple[int, ...] = RANKS
) -> Table:
    """Time a discriminator's steps: hinge loss of 64 images of either kind, backward pass and optimizer.

    Args:
        methods: of `.cell.METHODS`; factored ones are timed at every rank.
        seconds: to spend.
        width: of the discriminator; None for the published one.
        ranks: of factored weights.

    Returns:
        Milliseconds, their ratio to spectral normalization, and that of the multiplications of the layers.
    """
    steps: dict[tuple[str, int | None], Callable[[], None]] = {}
    products: dict[tuple[str, int | None], int] = {}
    for method in dict.fromkeys((REFERENCE, *methods)):
        for rank in ranks if CONSTRAINTS[method.removesuffix(STIEFEL)].factored else (None,):
            steps[method, rank], products[method, rank] = _step(method, rank, width)
    named = {f"{method} {rank}": step for (method, rank), step in steps.items()}
    times = dict(zip(steps, interleave(named, seconds, rounds=5).values(), strict=True))
    base, dense = times[REFERENCE, None].median, products[REFERENCE, None]
    rows = [
        [
            method,
            "–" if rank is None else str(rank),
            f"{1e3 * timing.median:.0f}",
            f"{timing.median / base:.2f}",
            f"{products[method, rank] / dense:.2f}",
        ]
        for (method, rank), timing in times.items()
    ]
    caption = (
        "Step of the discriminator: medians of methods in turns. Ratios are to torch's spectral normalization; "
        f"multiplications are those of the layers. At most {ALLOWED} is wanted at rank 64."
    )
    return Table(("constraint", "rank", "ms", "time, ratio", "multiplications, ratio"), rows, caption)


def _step(method: str, rank: int | None, width: int | None) -> tuple[Callable[[], None], int]:
    """A training step, and the multiplications of all layers over output positions."""
    torch.manual_seed(0)
    model = SNGANDiscriminator(32, width)
    name = method.removesuffix(STIEFEL)
    constrain(model, name, rank=rank, form="householder" if method == name else "stiefel")
    constraint, optimizer = CONSTRAINTS[name], NetworkOptimizer(model, lr=2e-4, steps=10**9)
    images = torch.randn(2 * BATCH, 3, 32, 32)

    def step() -> None:
        with shared_frames(model):
            real, generated = model(images).chunk(2)
        loss = LOSSES["hinge"].discriminator(real, generated)
        if constraint.penalized:
            loss = loss + constraint.penalty(model)
        optimizer.minimise(loss)

    return step, _multiplications(model)


def _multiplications(model: SNGANDiscriminator) -> int:
    """Of the layers as they run, each at the positions of its output."""
    per_position = {layer.name: layer.flops // 2 for layer in summary(model).layers}
    total = 0

    def count(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
            nonlocal total
            total += per_position[name] * (output[0, 0].numel() if output.ndim == 4 else 1)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in per_position]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    model.train()
    return total
