"""A grid of cells: each computed once, logged as it ends, and stopped and taken up anywhere."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from retract.benchmarks.grid import compute, finished
from retract.benchmarks.runs import Run


@dataclass(frozen=True)
class Cell:
    base: int
    power: int


CELLS = [Cell(base, power) for base in (2, 3) for power in (1, 2, 3)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "grid", {})


def raise_to_power(calls, cell, stopping):
    """Leaves a mark of every call, since it runs in another process."""
    with calls.open("a") as file:
        file.write(f"{cell}\n")
    return {"value": cell.base**cell.power}


def wait_to_be_stopped(cell, stopping):
    while not stopping():
        time.sleep(0.01)


def fail(cell, stopping):
    if cell == CELLS[0]:
        raise ZeroDivisionError("no such power")
    wait_to_be_stopped(cell, stopping)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_cell_is_computed_once(run, tmp_path, processes):
    calls, seen = tmp_path / "calls", []
    work = partial(raise_to_power, calls)
    assert compute(run, CELLS[:2], work, processes=processes)
    assert compute(run, CELLS, work, processes=processes, on_record=seen.append)
    assert sorted(calls.read_text().splitlines()) == sorted(map(str, CELLS))
    assert {(r["base"], r["power"]) for r in seen} == {(c.base, c.power) for c in CELLS[2:]}
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len(CELLS)
    assert all(record["value"] == record["base"] ** record["power"] for record in records)
    assert {cell: record["value"] for cell, record in finished(run, CELLS[1:3]).items()} == {
        CELLS[1]: 4,
        CELLS[2]: 8,
    }


def test_a_deadline_stops_all_cells(run):
    begun = time.monotonic()
    assert not compute(run, CELLS, wait_to_be_stopped, processes=2, deadline=begun + 0.3)
    assert time.monotonic() - begun < 5
    assert run.metrics() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_cells(run, signum, tmp_path):
    """It comes to this process alone; handlers are as before when it is over."""
    before = signal.getsignal(signum)

    def send(record):
        os.kill(os.getpid(), signum)

    work = partial(raise_then_wait, tmp_path / "calls")
    assert not compute(run, CELLS, work, processes=1, on_record=send)
    assert signal.getsignal(signum) is before
    assert len(run.metrics()) == 1
    assert compute(run, CELLS, partial(raise_to_power, tmp_path / "calls"), processes=1)


def raise_then_wait(calls, cell, stopping):
    if cell == CELLS[0]:
        return raise_to_power(calls, cell, stopping)
    return wait_to_be_stopped(cell, stopping)


def test_an_error_stops_the_others_and_is_raised(run):
    with pytest.raises(ZeroDivisionError, match="no such power"):
        compute(run, CELLS, fail, processes=2)


def write_pid_and_wait(file, cell, stopping):
    file.write_text(str(os.getpid()))
    wait_to_be_stopped(cell, stopping)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_workers_end_with_the_process_that_began_them(run, tmp_path):
    """Killed, it could not tell them to stop."""
    file = tmp_path / "pid"
    work = partial(write_pid_and_wait, file)
    grid = get_context("fork").Process(target=compute, args=(run, CELLS[:1], work), kwargs={"processes": 1})
    grid.start()
    assert within_seconds(20, lambda: file.exists() and file.read_text())
    worker = int(file.read_text())
    assert is_running(worker)
    grid.kill()
    grid.join()
    assert within_seconds(20, lambda: not is_running(worker))


def within_seconds(seconds, condition):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_running(pid):
    """Not a process that has ended and waits for init to notice."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
