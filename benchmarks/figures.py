"""The end of a benchmark without a run folder: its tables, where they come from, and the figures as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .provenance import provenance
from .report import Table

__all__ = ["show_figures"]


def show_figures(
    tables: Sequence[Table], rows: Sequence[Mapping[str, Any]], out: Path | None = None, **facts: object
) -> None:
    """Print tables and what is needed to compute them again.

    Args:
        tables: to print.
        rows: the figures, plain values.
        out: a JSON file to write facts and rows to.
        facts: of `provenance`.
    """
    from rich import print as show

    for table in tables:
        show(table.rich())
    known = provenance(**facts)
    show("\n".join(f"{name}: {value}" for name, value in known.items()))
    if out is not None:
        out.write_text(json.dumps({**known, "rows": list(rows)}, indent=1) + "\n")
