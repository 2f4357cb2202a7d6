"""An experiment of many cells, each computed once, in several processes; a run folder keeps the finished ones.

It can be stopped at any moment, by a signal or by a deadline, and goes on where it stopped when it is asked again.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from .runs import stop_on_signal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Records", "Stopping", "compute", "finished"]

SECONDS_BETWEEN_LOOKS = 0.2

Cell = TypeVar("Cell", bound="DataclassInstance")  # frozen, of plain values
Stopping = Callable[[], bool]


class Records(Protocol):
    """Keeps a record for each finished cell: a `.runs.Run`, or a store of another kind."""

    def log(self, record: dict[str, Any]) -> None:
        """Add one."""

    def metrics(self) -> list[dict[str, Any]]:
        """All of them."""


class _Event(Protocol):
    def is_set(self) -> bool: ...


class _Worker:
    """What a worker process knows: the event by which it is told to stop."""

    stop: _Event | None = None
    parent: int | None = None


def finished(run: Records, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """The records of those of ``cells`` that are finished: their fields, and what was computed."""
    records = run.metrics()
    found = {}
    for cell in cells:
        fields = asdict(cell)
        for record in records:
            if fields.items() <= record.items():
                found[cell] = record
    return found


def compute(
    run: Records,
    cells: Sequence[Cell],
    work: Callable[[Cell, Stopping], dict[str, Any] | None],
    *,
    processes: int,
    deadline: float = math.inf,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> bool:
    """Compute the cells that are not finished, and log each to ``run`` as it ends: its fields and its results.

    Args:
        run: keeps the results, a record a cell.
        cells: frozen dataclasses of plain values, in the order in which they are begun.
        work: from a cell to its results. Runs in a process of its own, so it has a name in its module. It looks
            now and then whether to stop; then it saves what it has, and returns None.
        processes: cells computed at a time.
        deadline: on `time.monotonic`'s clock.
        on_record: called with every finished cell's record.

    Returns:
        Whether all are finished; not so after the deadline, Ctrl-C or SIGTERM.
    """
    known = finished(run, cells)
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # torch imports its compiler at the first optimizer: workers inherit it
    context = get_context()
    event = context.Event()
    workers = ProcessPoolExecutor(processes, context, _begin, (event,))
    with stop_on_signal() as stop, workers as pool:
        pending = {pool.submit(_work, work, cell): cell for cell in cells if cell not in known}
        try:
            while pending:
                if stop.signum is not None or time.monotonic() > deadline:
                    event.set()  # cells not begun yet are given up at once
                for future in wait(pending, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done:
                    cell, result = pending.pop(future), future.result()
                    if result is not None:
                        record = {**asdict(cell), **result}
                        run.log(record)
                        on_record(record)
        except BaseException:
            event.set()  # else the pool would wait for all the others to end
            raise
    return len(finished(run, cells)) == len(cells)


def _begin(stop: _Event) -> None:
    """A worker leaves signals to the process that began it, which a terminal sends them to as well."""
    _Worker.stop, _Worker.parent = stop, os.getppid()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _work(work: Callable[[Cell, Stopping], dict[str, Any] | None], cell: Cell) -> dict[str, Any] | None:
    result = None if _stopping() else work(cell, _stopping)
    if _orphaned():
        os._exit(1)  # it would wait for its next cell for ever
    return result


def _stopping() -> bool:
    return _orphaned() or (_Worker.stop is not None and _Worker.stop.is_set())


def _orphaned() -> bool:
    """Whether the process that began this worker was killed."""
    return os.getppid() != _Worker.parent
