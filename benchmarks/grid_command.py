"""What the commands of all grids share: names that were chosen of some, and what is printed at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .report import Table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["chosen_names", "show_end"]


def chosen_names(option: str, text: str | None, allowed: Iterable[str]) -> list[str]:
    """Comma-separated names; all that are allowed for None.

    Raises:
        ValueError: a name that is not allowed.
    """
    names = list(allowed) if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"{option} must be of {', '.join(allowed)}, got {', '.join(unknown)}")
    return names


def show_end(console: Console, tables: Sequence[Table], report: Path, *, done: bool) -> None:
    """Print tables, whether there is more to do, and where the report lies."""
    for table in tables:
        console.print(table.rich())
    if not done:
        console.print("Stopped before the end: the same command goes on.")
    console.print(f"Report: {report.resolve()}", soft_wrap=True, highlight=False)
