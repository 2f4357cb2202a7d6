"""`retract bench spectra`: what control of the spectrum costs, in weights, convolutions and optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Annotated

import torch
import typer

from .figures import show_figures
from .options import FiguresFile, Threads
from .report import Table
from .spectra_methods import BASELINE, DENSE, TRAININGS, WEIGHTS, Step, convolutions, dense_pass, weight_steps
from .timing import Timing, interleave

__all__ = ["FULL", "QUICK", "Row", "Sizes", "measure", "spectra_command", "tables"]

SLOW = 0.1  # seconds: methods beyond take turns with the baseline alone, so that the others get more rounds


@dataclass(frozen=True)
class Sizes:
    """What is timed: 3x3 convolutions of so many channels, and an SNGAN-32 discriminator."""

    channels: Sequence[int] = (128, 256, 512)
    ranks: Sequence[int] = (16, 64, 128)
    batch: int = 64
    maps: int = 16  # height and width
    width: int | None = None  # of the discriminator; None: the paper's
    discriminator_rank: int = 64


FULL = Sizes()
QUICK = Sizes(channels=(8, 12), ranks=(2, 4), batch=4, maps=6, width=8, discriminator_rank=4)


@dataclass(frozen=True)
class Row:
    """One method at one size; a ``note`` in place of figures where it was not timed."""

    table: str  # "weights", "convolutions" or "training"
    method: str
    channels: int | None = None
    rank: int | None = None
    part: str = ""  # of a training step: "passes" or "step"
    milliseconds: float | None = None  # median
    low: float | None = None  # bounds of the middle half of the samples
    high: float | None = None
    ratio: float | None = None  # weights: to two factors; convolutions: dense over this; training: to the whole step
    note: str = ""


def measure(sizes: Sizes, seconds: float) -> list[Row]:
    """Time everything, about ``seconds`` for each group of methods that take turns."""
    torch.manual_seed(0)
    rows = []
    for channels, rank in product(sizes.channels, sizes.ranks):
        rows += _weights(channels, rank, sizes, seconds)
    for channels, rank in product(sizes.channels, sizes.ranks):
        rows += _convolutions(channels, rank, sizes, seconds)
    return rows + _trainings(sizes, seconds)


def _row(table: str, method: str, timing: Timing, ratio: float, **where: int | str | None) -> Row:
    median, low, high = (1e3 * t for t in (timing.median, timing.low, timing.high))
    return Row(table, method, milliseconds=median, low=low, high=high, ratio=ratio, **where)  # type: ignore[arg-type]


def _weights(channels: int, rank: int, sizes: Sizes, seconds: float) -> list[Row]:
    steps, missing = weight_steps(channels, rank)
    if rank == sizes.ranks[0]:  # it has no rank
        steps[DENSE_PASS] = dense_pass(channels, sizes.batch, sizes.maps)
    slow = {name for name, step in steps.items() if name != BASELINE and _once(step) > SLOW}
    quick = {name: step for name, step in steps.items() if name not in slow}
    groups = [interleave(quick, seconds)]
    if slow:
        groups.append(interleave({name: steps[name] for name in (BASELINE, *sorted(slow))}, 0, rounds=3))
    rows = [Row("weights", name, channels, rank, note=note) for name, note in missing.items()]
    for times in reversed(groups):
        for name, timing in times.items():
            if name != BASELINE or times is groups[0]:
                ratio = timing.median / times[BASELINE].median
                rows.append(_row("weights", name, timing, ratio, channels=channels, rank=rank))
    return rows


DENSE_PASS = "for scale: dense convolution, forward and backward"


def _once(step: Step) -> float:
    """Seconds of the second call."""
    step()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _convolutions(channels: int, rank: int, sizes: Sizes, seconds: float) -> list[Row]:
    times = interleave(convolutions(channels, rank, sizes.batch, sizes.maps), seconds, rounds=5)
    return [
        _row("convolutions", name, timing, times[DENSE].median / timing.median, channels=channels, rank=rank)
        for name, timing in times.items()
    ]


def _trainings(sizes: Sizes, seconds: float) -> list[Row]:
    trainings = {name: make(sizes.width, sizes.discriminator_rank, sizes.batch) for name, make in TRAININGS.items()}
    passes = interleave({name: training.passes for name, training in trainings.items()}, 0, rounds=3)
    steps = interleave({name: training.step for name, training in trainings.items()}, seconds)
    rows = []
    for name in trainings:
        whole = passes[name].median + steps[name].median
        for part, timing in (("passes", passes[name]), ("step", steps[name])):
            rows.append(_row("training", name, timing, timing.median / whole, part=part, rank=sizes.discriminator_rank))
    return rows


# --------------------------------------------------------------------------------------------------- reporting


def tables(rows: Sequence[Row], sizes: Sizes) -> list[Table]:
    """A table of weights and one of convolutions for each number of channels, and the training steps."""
    result = []
    for channels in sizes.channels:
        caption = (
            f"Weight {channels} x {9 * channels} of a 3x3 convolution, float32: ms of forward and backward (middle "
            "half), ratio to the product of two factors. Left out: about a second a call, or more."
        )
        result.append(_by_rank(rows, "weights", channels, (*WEIGHTS, DENSE_PASS), sizes.ranks, caption))
    for channels in sizes.channels:
        caption = (
            f"Forward of a 3x3 convolution, {channels} channels, {sizes.batch} maps of {sizes.maps} x {sizes.maps}: ms "
            "(middle half), how many times as fast as the dense one."
        )
        names = dict.fromkeys(row.method for row in rows if row.table == "convolutions")
        result.append(_by_rank(rows, "convolutions", channels, tuple(names), sizes.ranks, caption))
    return [*result, _training_table(rows, sizes)]


def _by_rank(
    rows: Sequence[Row], table: str, channels: int, names: Sequence[str], ranks: Sequence[int], caption: str
) -> Table:
    found = {(row.method, row.rank): row for row in rows if (row.table, row.channels) == (table, channels)}
    lines = [[name, *(_cell(found.get((name, rank))) for rank in ranks)] for name in names]
    return Table(("method", *(f"rank {rank}" for rank in ranks)), lines, caption)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return row.note or f"{_milliseconds(row)} {row.ratio:.2f}×"


def _milliseconds(row: Row) -> str:
    return f"{row.milliseconds:.2f} ({row.low:.2f}–{row.high:.2f})"


def _training_table(rows: Sequence[Row], sizes: Sizes) -> Table:
    parts = {(row.method, row.part): row for row in rows if row.table == "training"}
    lines = []
    for method in dict.fromkeys(method for method, _ in parts):
        passes, step = parts[method, "passes"], parts[method, "step"]
        lines.append([method, _milliseconds(passes), _milliseconds(step), f"{100 * (step.ratio or 0):.1f} %"])
    caption = (
        f"SNGAN-32 discriminator, all layers at rank {sizes.discriminator_rank}, hinge loss of {sizes.batch} "
        "random images: ms (middle half), and the optimizer's share of the training step."
    )
    return Table(("layers: optimizer", "forward and backward", "optimizer step", "share"), lines, caption)


def spectra_command(
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend on each group of methods.")] = 5.0,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, whose figures mean nothing: a dry run.")] = False,
    out: FiguresFile = None,
) -> None:
    """Time layers of controlled spectrum: their weights, their factored convolutions, their training steps.

    Methods take turns in one run; figures are medians. Everything runs in float32 on the CPU.

    For example:

        retract bench spectra --seconds 10 --threads 1
    """
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = QUICK if quick else FULL
    rows = measure(sizes, seconds)
    show_figures(tables(rows, sizes), [asdict(row) for row in rows], out, seconds_per_group=seconds)
