"""One momentum step on a Stiefel matrix: retract's verbs against geoopt's Riemannian SGD, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import geoopt
import torch
import typer
from torch import Tensor

from retract.manifolds import Stiefel

from .figures import show_figures
from .options import Threads
from .report import Table
from .timing import interleave

__all__ = ["SIZES", "Row", "run", "stiefel_command"]

SIZES = ((144, 16), (576, 64), (1152, 128), (4608, 512))
BASELINE = "geoopt RiemannianSGD, EuclideanStiefel"
FLOOR = "floor: four matrix products"

Step = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """Time of one step of one method on one size."""

    size: tuple[int, int]
    method: str
    milliseconds: float  # median
    speedup: float  # the baseline's median over this one
    error: float  # max |XᵀX - I| after all timed steps


def run(
    sizes: Sequence[tuple[int, int]] = SIZES,
    *,
    seconds: float = 3.0,
    lr: float = 0.1,
    momentum: float = 0.9,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Row]:
    """Time every method on every size, interleaved, about ``seconds`` for each size (at least 10 rounds).

    Gradients are fixed Gaussian matrices of norm 1, so that steps have the length they have in training.
    """
    return [row for size in sizes for row in _rows(size, seconds, lr, momentum, dtype, seed)]


def _rows(
    size: tuple[int, int], seconds: float, lr: float, momentum: float, dtype: torch.dtype, seed: int
) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(seed)
    start = Stiefel().random(*size, dtype=dtype, generator=generator).as_subclass(Tensor)
    gradient = torch.randn(*size, dtype=dtype, generator=generator)
    gradient /= torch.linalg.vector_norm(gradient)
    methods = {BASELINE: _geoopt_step(start, gradient, lr, momentum)}
    for retraction in ("qr", "polar", "cayley"):
        manifold = Stiefel(retraction)
        methods[f"{retraction}, momentum transported"] = _transported_step(manifold, start, gradient, lr, momentum)
        methods[f"{retraction}, one projection"] = _projected_step(manifold, start, gradient, lr, momentum)
    methods[FLOOR] = _products(start, gradient)
    times = interleave({name: step for name, (_, step) in methods.items()}, seconds)
    for name, (point, _) in methods.items():
        speedup = times[BASELINE].median / times[name].median
        yield Row(size, name, 1e3 * times[name].median, speedup, _orthonormality_error(point))


def _geoopt_step(start: Tensor, gradient: Tensor, lr: float, momentum: float) -> tuple[Tensor, Step]:
    point = geoopt.ManifoldParameter(start.clone(), manifold=geoopt.Stiefel(canonical=False))
    point.grad = gradient.clone()
    optimizer = geoopt.optim.RiemannianSGD([point], lr=lr, momentum=momentum)
    return point, optimizer.step


def _transported_step(
    manifold: Stiefel, start: Tensor, gradient: Tensor, lr: float, momentum: float
) -> tuple[Tensor, Step]:
    """Project the gradient, add it to the momentum, retract, transport: the textbook step."""
    point, buffer = start.clone(), torch.zeros_like(start)

    def step() -> None:
        buffer.mul_(momentum).add_(manifold.egrad2rgrad(point, gradient))
        moved, carried = manifold.retr_transp(point, -lr * buffer, buffer)
        point.copy_(moved)
        buffer.copy_(carried)

    return point, step


def _projected_step(
    manifold: Stiefel, start: Tensor, gradient: Tensor, lr: float, momentum: float
) -> tuple[Tensor, Step]:
    """The same iterates: projection is linear, so one of the momentum and the gradient together is enough."""
    point, buffer = start.clone(), torch.zeros_like(start)

    def step() -> None:
        buffer.mul_(momentum).add_(gradient)
        buffer.copy_(manifold.proju(point, buffer))
        point.copy_(manifold.retr(point, -lr * buffer))

    return point, step


def _products(start: Tensor, gradient: Tensor) -> tuple[Tensor, Step]:
    """What a projection and a QR retraction by Cholesky cannot do without: two products of frames, two with p x p."""
    out, square = torch.empty_like(start), torch.empty(2 * start.shape[-1:], dtype=start.dtype)

    def step() -> None:
        for _ in range(2):
            torch.mm(start.mT, gradient, out=square)
            torch.mm(start, square, out=out)

    return start, step


def _orthonormality_error(point: Tensor) -> float:
    frame = point.detach().as_subclass(Tensor).double()
    return float((frame.mT @ frame - torch.eye(frame.shape[-1], dtype=frame.dtype)).abs().max())


def stiefel_command(
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend on each size.")] = 10.0,
    threads: Threads = None,
) -> None:
    """Time one momentum step on Stiefel matrices in float32, against geoopt's RiemannianSGD, taking turns in one run.

    RiemannianSGD on our Stiefel takes the step of one projection: projecting the sum of momentum and gradient
    transports the one and projects the other at once.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    rows = [
        ["x".join(map(str, row.size)), row.method, f"{row.milliseconds:.3f}", f"{row.speedup:.2f}", f"{row.error:.1e}"]
        for row in run(seconds=seconds)
    ]
    show_figures([Table(("size", "method", "ms", "speed-up", "max |XᵀX - I|"), rows)], [], seconds_per_size=seconds)
