"""The results of `retract bench convergence` as a small text file, for the repository of which the tables are part.

Cells that differ in few fields share the others, one line a cell; numbers have six digits. It reads back as what the
store gives, so that the same code makes the tables of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Exported", "Point", "Results", "export", "read_export"]

DIGITS = 6
SHARED = ("protocol", "stage", "method", "data", "model")
"""Fields by which cells are grouped in the file."""

Record = Mapping[str, Any]
Point = Sequence[float | None]  # step, value, seconds


class Results(Protocol):
    """What tables and figures are made of: the store, or an export of it."""

    def metrics(self) -> list[dict[str, Any]]:
        """Every finished cell: its fields and its results."""

    def curve(self, cell: Mapping[str, Any], name: str) -> Sequence[Point]:
        """(step, value, seconds) by step; empty if the cell has no such curve."""


class Exported:
    """What a file of `export` holds, in the form of a store; ``facts`` say where it comes from."""

    def __init__(self, facts: Mapping[str, str], records: Sequence[dict[str, Any]], curves: Sequence[Record]) -> None:
        self.facts = dict(facts)
        self._records = [{"id": number, **record} for number, record in enumerate(records)]
        self._curves = curves

    def metrics(self) -> list[dict[str, Any]]:
        """Every finished cell: its fields and its results."""
        return [dict(record) for record in self._records]

    def curve(self, cell: Mapping[str, Any], name: str) -> list[Point]:
        """(step, value, seconds) by step; empty if the cell has no such curve. Seconds are None of one not timed."""
        columns = self._curves[cell["id"]].get(name, ())
        return [(*point, None)[:3] for point in zip(*columns, strict=True)]


def export(
    results: Results,
    path: Path,
    *,
    facts: Mapping[str, str],
    curves: Callable[[Record], Mapping[str, Sequence[Point]]],
    without: Callable[[Record], Sequence[str]] = lambda _: (),
    leave_out: Sequence[str] = (),
) -> Path:
    """Write results to ``path``, and return it.

    Args:
        results: to write.
        path: of a JSON file.
        facts: as of `.provenance.provenance`.
        curves: of a cell, those to keep, by name; of all points' numbers or of step and value alone.
        without: of a cell, fields and results to drop; the same of all cells of a protocol.
        leave_out: stages to drop.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in results.metrics():
        if record.get("stage") not in leave_out:
            groups.setdefault(tuple(record.get(name) for name in SHARED), []).append(record)
    blocks = [_block(group, curves, {"id", *without(group[0])}) for group in groups.values()]
    lines = ",\n".join(blocks)
    text = f'{{"facts": {json.dumps(dict(facts), indent=1, ensure_ascii=False)},\n"groups": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read_export(path: Path) -> Exported:
    """What `export` wrote.

    Raises:
        ValueError: the file is not such a one.
    """
    records, curves = [], []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for group in content["groups"]:
            for row, own in zip(group["rows"], group["curves"], strict=True):
                records.append({**group["same"], **dict(zip(group["columns"], row, strict=True))})
                curves.append(own)
        return Exported(content["facts"], records, curves)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no export of `retract bench convergence`: {error}") from error


def _block(
    group: Sequence[Record], curves: Callable[[Record], Mapping[str, Sequence[Point]]], dropped: set[str]
) -> str:
    """Cells of one group: what all share, then a line a cell, then a line a cell's curves."""
    names = [name for name in dict.fromkeys(name for record in group for name in record) if name not in dropped]
    common = [name for name in names if all(name in r and r[name] == group[0].get(name) for r in group)]
    columns = [name for name in names if name not in common]
    parts = {
        "same": _json({name: _rounded(group[0][name]) for name in common}),
        "columns": _json(columns),
        "rows": _lines([[_rounded(record.get(name)) for name in columns] for record in group]),
        "curves": _lines([_columns(curves(record)) for record in group]),
    }
    return "{" + ",\n".join(f'"{name}": {text}' for name, text in parts.items()) + "}"


def _columns(curves: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Names to the steps, the values, and the seconds if there are any, of a cell's curves."""
    return {
        name: [[_rounded(x) for x in column] for column in zip(*curve, strict=True)]
        for name, curve in curves.items()
        if curve
    }


def _lines(rows: Sequence[Any]) -> str:
    return "[\n" + ",\n".join(_json(row) for row in rows) + "\n]"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    """The same plain value with numbers to six digits."""
    if isinstance(value, float):
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
