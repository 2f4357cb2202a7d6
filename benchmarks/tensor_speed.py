"""`retract bench tensor`: what tensorial and canonical convolutions cost, beside dense ones and tensorly-torch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from .figures import show_figures
from .options import FiguresFile, Threads
from .report import Table
from .tensor_methods import DENSE, Method, Sizes, methods, training_pass
from .timing import Timing, interleave

__all__ = ["FULL", "QUICK", "Row", "measure", "tables", "tensor_command"]

FULL = Sizes()
QUICK = Sizes(channels=8, batch=2, maps=6, budget=0.5)


@dataclass(frozen=True)
class Row:
    """One layer: forward and backward."""

    group: str
    method: str
    memory_format: str  # of the input: "contiguous" or "channels_last"
    parameters: float  # as a fraction of the dense layer's
    milliseconds: float  # median
    low: float  # bounds of the middle half of the samples
    high: float
    ratio: float  # to the dense layer with a contiguous input
    note: str = ""


def measure(sizes: Sizes, seconds: float) -> list[Row]:
    """Time everything, in turns, for about ``seconds``."""
    torch.manual_seed(0)
    found = {(one.group, one.name, one.channels_last): one for one in methods(sizes)}
    passes = {" ".join(map(str, key)): training_pass(method, sizes) for key, method in found.items()}
    times = list(interleave(passes, seconds, rounds=5).values())
    baseline = times[[*found].index(("dense", DENSE, False))].median
    dense = 9 * sizes.channels**2
    return [_row(method, timing, baseline, dense) for method, timing in zip(found.values(), times, strict=True)]


def _row(method: Method, timing: Timing, baseline: float, dense: int) -> Row:
    return Row(
        group=method.group,
        method=method.name,
        memory_format="channels_last" if method.channels_last else "contiguous",
        parameters=method.parameters / dense,
        milliseconds=1e3 * timing.median,
        low=1e3 * timing.low,
        high=1e3 * timing.high,
        ratio=timing.median / baseline,
        note=method.note,
    )


def tables(rows: Sequence[Row], sizes: Sizes) -> list[Table]:
    """A table for each group of methods."""
    captions = {
        "dense": f"3x3 convolution of {sizes.channels} channels, {sizes.batch} maps of {sizes.maps} x {sizes.maps}, "
        "float32, forward and backward with the gradient of the input: ms (middle half), ratio to the first line.",
        "tensor network": f"Tensor networks of {100 * sizes.budget:g} % of the dense parameters.",
        "tensorly-torch": "tensorly-torch at its own ranks for that share, its cores drawn anew.",
        "canonical": "Canonical weight normalization. Full rank: as many parameters as the dense layer.",
    }
    columns = ("layer", "input", "parameters", "forward and backward", "ratio", "")
    return [
        Table(columns, [_line(row) for row in rows if row.group == group], caption)
        for group, caption in captions.items()
        if any(row.group == group for row in rows)
    ]


def _line(row: Row) -> list[str]:
    milliseconds = f"{row.milliseconds:.1f} ({row.low:.1f}–{row.high:.1f})"
    return [row.method, row.memory_format, f"{row.parameters:.3f}", milliseconds, f"{row.ratio:.2f}", row.note]


def tensor_command(
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend, all in all; at least five rounds.")] = 120.0,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, whose figures mean nothing: a dry run.")] = False,
    out: FiguresFile = None,
) -> None:
    """Time tensorial and canonical convolutions against dense ones and tensorly-torch's.

    Methods take turns in one run; figures are medians. Everything runs in float32 on the CPU.

    For example:

        retract bench tensor --seconds 300 --threads 2
    """
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = QUICK if quick else FULL
    rows = measure(sizes, seconds)
    show_figures(tables(rows, sizes), [asdict(row) for row in rows], out, seconds=seconds)
