"""Options that several commands have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = [
    "Amp",
    "BatchSize",
    "DataFolder",
    "DataName",
    "Device",
    "FiguresFile",
    "GridFolder",
    "ImageSize",
    "Minutes",
    "Processes",
    "Seeds",
    "Subset",
    "Threads",
]

DataName: TypeAlias = Annotated[str, typer.Option(help="digits, mnist, cifar10 or svhn.", metavar="NAME")]
DataFolder: TypeAlias = Annotated[
    Path | None, typer.Option(help="As for `retract train`. Default: download.", metavar="PATH")
]
Subset: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Train on N images. Default: on all.", metavar="N")]
ImageSize: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Resize images to N x N. Default: as they are.", metavar="N")
]
BatchSize: TypeAlias = Annotated[int, typer.Option(min=1, help="Images per step.", metavar="N")]
Seeds: TypeAlias = Annotated[int, typer.Option(min=1, help="Seeds of the comparison.", metavar="N")]
Device: TypeAlias = Annotated[str, typer.Option(help="To train on: cpu, cuda, cuda:1, ...", metavar="NAME")]
Amp: TypeAlias = Annotated[bool, typer.Option("--amp", help="Forward pass in bfloat16 where that is safe.")]

# Of grids of many runs.
Minutes: TypeAlias = Annotated[
    float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.", metavar="X")
]
Processes: TypeAlias = Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.", metavar="N")]
GridFolder: TypeAlias = Annotated[
    Path, typer.Option(metavar="FOLDER", help="For report.html, metrics.jsonl (a line a run) and the runs.")
]

# Of timings.
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="CPU threads. Default: torch's own.", show_default=False)
]
FiguresFile: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the figures to a JSON file, too.", show_default=False)
]
