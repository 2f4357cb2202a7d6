"""`retract bench speed`: a whole optimizer step over a network's parameters, as a ratio to torch's SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from torch import nn

from retract.nets.cnn import MODELS
from retract.optim import PSISGD, PSIAdam, PSIAngular

from . import optimizers
from .figures import show_figures
from .options import FiguresFile, Threads
from .report import Table
from .timing import interleave

__all__ = ["BASELINE", "FLOOR", "METHODS", "Row", "measure", "speed_command"]

Optimizer = torch.optim.Optimizer
BASELINE = "torch SGD foreach"
FLOOR = "memory floor of a fused step"


def _sgd(**options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, **options)


def _psi(**options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: PSISGD(_groups(model), lr=1e-3, momentum=0.9, **options)


def _named(name: str) -> Callable[[nn.Module], Optimizer]:
    return lambda model: optimizers.build(name, model, lr=1e-3)


METHODS: dict[str, Callable[[nn.Module], Optimizer]] = {
    BASELINE: _sgd(foreach=True),
    "torch SGD fused": _sgd(fused=True),
    "torch AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True),
    "PSISGD (default)": _psi(),
    "PSISGD, paper's transport": _psi(transport="paper"),
    "PSISGD fused": _psi(fused=True),
    "PSISGD foreach": _psi(foreach=True),
    "PSISGD foreach, paper's transport": _psi(foreach=True, transport="paper"),
    "PSIAngular": lambda model: PSIAngular(_groups(model), lr=1e-3),
    "PSIAdam": lambda model: PSIAdam(_groups(model), lr=1e-3),
    "geoopt RiemannianSGD, Sphere": _named("geoopt-sphere"),
    "adamp SGDP": _named("sgdp"),
}


@dataclass(frozen=True)
class Row:
    """One method on one network's parameters."""

    model: str
    method: str
    milliseconds: float  # median of whole steps
    low: float  # bounds of the middle half of the samples
    high: float
    ratio: float  # to the baseline's median
    buffers: float  # bytes of optimizer state over bytes of weights


def measure(models: list[str], *, seconds: float, device: str = "cpu", methods: list[str] | None = None) -> list[Row]:
    """Time the chosen methods (all by default; the baseline always) on each network's parameters."""
    chosen = {name: make for name, make in METHODS.items() if methods is None or name in methods or name == BASELINE}
    if device != "cpu":
        chosen.pop("PSISGD fused", None)  # the kernel is the CPU's
    return [row for model in models for row in _rows(model, chosen, seconds, device)]


def _rows(
    name: str, methods: dict[str, Callable[[nn.Module], Optimizer]], seconds: float, device: str
) -> Iterator[Row]:
    made = {method: make(_model(name, device)) for method, make in methods.items()}
    size = sum(p.numel() for p in _model(name, device).parameters())
    steps = {method: optimizer.step for method, optimizer in made.items()} | {FLOOR: _stream(size, device)}
    times = interleave(steps, seconds, device=device)
    for method, time in times.items():
        median, low, high = (1e3 * t for t in (time.median, time.low, time.high))
        buffers = _buffers(made[method]) if method in made else 1.0
        yield Row(name, method, median, low, high, time.median / times[BASELINE].median, buffers)


def _model(name: str, device: str) -> nn.Module:
    """The network with random gradients. ResNet-18 is the CIFAR form, as in most published timings of its step."""
    torch.manual_seed(0)
    model: nn.Module = (MODELS[name](stem="cifar") if name == "resnet18" else MODELS[name]()).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-2
    return model


def _groups(model: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = model.manifold_groups()
    return groups


def _buffers(optimizer: Optimizer) -> float:
    weights = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return float(held / weights)


def _stream(size: int, device: str) -> Callable[[], object]:
    """Read weights, gradients and momenta once and write weights and momenta, by torch's fastest passes over memory."""
    weights, momenta, gradients = (torch.ones(size, device=device) for _ in range(3))

    def step() -> None:
        weights.mul_(1.0)
        momenta.mul_(1.0)
        gradients.sum()

    return step


def table(rows: list[Row]) -> Table:
    """The rows of all networks."""
    cells = []
    for row in rows:
        spread = f"{row.low:.2f}–{row.high:.2f}"
        numbers = [f"{row.milliseconds:.2f}", spread, f"{row.ratio:.2f}", f"{row.buffers:.2f}"]
        cells.append([row.model, row.method, *numbers])
    return Table(("network", "method", "ms", "middle half", "ratio", "state / weights"), cells)


def speed_command(
    models: Annotated[
        str, typer.Option("--models", metavar="NAMES", help="Networks whose parameters to step, comma-separated.")
    ] = "resnet18,resnet20,resnet50",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend on each network.")] = 20.0,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    out: FiguresFile = None,
) -> None:
    """Time one whole optimizer step over a network's parameters: medians, methods taking turns in one run.

    The ratio is to torch.optim.SGD(momentum=0.9, foreach=True). The last row of a network is what its memory allows:
    three arrays of its size read, two of them written.

    For example:

        retract bench speed --models resnet20 --seconds 5
    """
    names = models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"--models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if threads is not None:
        torch.set_num_threads(threads)
    rows = measure(names, seconds=seconds, device=device)
    show_figures([table(rows)], [asdict(row) for row in rows], out, seconds_per_network=seconds, device=device)
