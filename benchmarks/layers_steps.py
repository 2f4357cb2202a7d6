"""Training steps a second of networks of spectral layers, methods in turns: on a free machine the runs' own speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from retract.nets.cnn import INPUT_SHAPES, MODELS

from .layers_cell import Cell, Settings, prepare
from .report import Table
from .timing import interleave

__all__ = ["steps_table"]

CLASSES = 10


def steps_table(settings: Settings, models: list[str], methods: list[str], seconds: float) -> Table:
    """Time forward and backward pass and step, on random images, for about ``seconds`` a network; one CPU thread."""
    torch.set_num_threads(1)
    rows = []
    for model in models:
        steps = {method: _step(settings, model, method) for method in methods}
        times = interleave(steps, seconds, rounds=5, device=settings.device)
        rows.append([model, *(f"{1 / timing.median:.2f}" for timing in times.values())])
    precision = "bfloat16" if settings.amp else "float32"
    return Table(("steps/s", *methods), rows, f"Medians; batches of {settings.batch_size} random images, {precision}.")


def _step(settings: Settings, model: str, method: str) -> Callable[[], None]:
    torch.manual_seed(0)
    network = MODELS[model](num_classes=CLASSES).to(settings.device)
    optimizer = prepare(settings, Cell(model, method, lr=0.01, seed=0, tuning=False), network)
    images = torch.randn(settings.batch_size, *INPUT_SHAPES[model], device=settings.device)
    labels = torch.randint(CLASSES, (settings.batch_size,), device=settings.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.amp):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return step
