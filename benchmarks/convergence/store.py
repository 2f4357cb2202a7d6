"""What `retract bench convergence` keeps: one SQLite file of finished cells and their curves, for SQL and for reports.

Every finished cell is one transaction in write-ahead mode, so a crash, a kill or a full disk leaves whole cells only.
For example, the mean accuracy of every method:

    sqlite3 results.sqlite "select method, avg(json_extract(results, '$.accuracy')) from cells group by method"
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..runs import Run

__all__ = ["COLUMNS", "DATABASE", "DIVERGED", "FINISHED", "CurvePoint", "Store"]

DATABASE = "results.sqlite"
FINISHED, DIVERGED = "finished", "diverged"
COLUMNS = (
    "protocol",
    "method",
    "data",
    "model",
    "seed",
    "stage",
    "lr",
    "euclidean_lr",
    "weight_decay",
    "start",
    "status",
    "seconds",
)
"""What a cell has a column for, null where it has no such field; the JSON of ``results`` holds all else."""

# A start is a number or a name: without a type, SQLite keeps either as it is.
SCHEMA = f"""
    create table if not exists cells (
        id integer primary key,
        protocol text not null, method text not null, data text, model text, seed integer, stage text,
        lr real, euclidean_lr real, weight_decay real, start,
        status text not null check (status in ('{FINISHED}', '{DIVERGED}')),
        seconds real,
        results text not null check (json_valid(results))
    );
    create index if not exists cells_by_method on cells (protocol, method, stage, seed);
    create table if not exists curves (
        cell integer not null references cells (id), name text not null, step real not null, value real, seconds real
    );
    create index if not exists curves_by_cell on curves (cell, name, step);
"""


class CurvePoint(NamedTuple):
    """A value after so many steps and seconds; None where it was not finite, or not timed."""

    step: float
    value: float | None
    seconds: float | None


class Store:
    """The results of one folder; what `.grid.compute` takes in place of a `.runs.Run`.

    No connection outlives a call: worker processes are forked between calls, and SQLite's connections must not be.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, dict(config)
        with self._transaction() as connection:
            connection.execute("pragma journal_mode = wal")
            connection.executescript(SCHEMA)

    @classmethod
    def open_or_create(cls, folder: str | Path, config: Mapping[str, Any]) -> Store:
        """The store of these options in a folder, made now if there is none.

        Raises:
            ValueError: the folder holds results of other options; the message names the first one that differs.
        """
        return cls(Path(folder), Run.open_or_create(folder, config).config)

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The store that a folder holds.

        Raises:
            ValueError: there is none.
        """
        config = Run.open(folder).config
        if not (Path(folder) / DATABASE).exists():
            raise ValueError(f"{folder} holds no results of `retract bench convergence`: there is no {DATABASE}")
        return cls(Path(folder), config)

    def log(self, record: Mapping[str, Any]) -> None:
        """Keep one finished cell, on disk when this returns.

        Args:
            record: its fields and results, plain values; ``"protocol"`` and ``"method"`` among them. ``"status"`` is
                ``"finished"`` unless it says ``"diverged"``. ``"curves"`` maps names to sequences of (step, value,
                seconds). Numbers that are not finite become None: neither SQL nor JSON has them.

        Raises:
            ValueError: no protocol or method, or a status that is neither.
        """
        plain = {"status": FINISHED, **_finite(dict(record))}
        if missing := [name for name in ("protocol", "method") if not plain.get(name)]:
            raise ValueError(f"a record needs protocol and method, got none for {' and '.join(missing)}")
        if plain["status"] not in (FINISHED, DIVERGED):
            raise ValueError(f"status must be {FINISHED} or {DIVERGED}, got {plain['status']!r}")
        curves = plain.pop("curves", {})
        rest = {name: value for name, value in plain.items() if name not in (*COLUMNS, "id")}
        values = [*(plain.get(name) for name in COLUMNS), json.dumps(rest, allow_nan=False)]
        marks = ", ".join("?" * len(values))
        with self._transaction() as connection:
            cell = connection.execute(
                f"insert into cells ({', '.join(COLUMNS)}, results) values ({marks})", values
            ).lastrowid
            for name, points in curves.items():
                rows = ((cell, name, *_padded(point)) for point in points)
                connection.executemany("insert into curves values (?, ?, ?, ?, ?)", rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Every finished cell's fields and results in one dict each, and its ``id``, in the order they finished."""
        with self._transaction() as connection:
            rows = connection.execute(f"select id, {', '.join(COLUMNS)}, results from cells order by id").fetchall()
        return [{"id": row[0], **dict(zip(COLUMNS, row[1:-1], strict=True)), **json.loads(row[-1])} for row in rows]

    def curve(self, cell: int | Mapping[str, Any], name: str) -> list[CurvePoint]:
        """A curve of a cell, by its steps; empty if it has none of this name.

        Args:
            cell: its ``id``, or a record of `metrics`.
            name: of the curve.
        """
        number = cell if isinstance(cell, int) else cell["id"]
        query = "select step, value, seconds from curves where cell = ? and name = ? order by step"
        with self._transaction() as connection:
            return [CurvePoint(*row) for row in connection.execute(query, (number, name))]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are on disk at the end of the block, all of them or, after an error, none."""
        with closing(sqlite3.connect(self.folder / DATABASE, timeout=60)) as connection, connection:
            yield connection


def _padded(point: Sequence[float | None]) -> tuple[float | None, float | None, float | None]:
    step, value, seconds = (*point, None)[:3]
    return step, value, seconds


def _finite(value: Any) -> Any:
    """The same plain values, with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
