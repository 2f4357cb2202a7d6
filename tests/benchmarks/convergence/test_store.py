"""The store of the convergence benchmark: whole cells or none, whatever kills the process; SQL sees what was logged."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import pytest

from retract.benchmarks.convergence.store import COLUMNS, DATABASE, Store
from retract.benchmarks.grid import compute, finished

CELL = {"protocol": "training", "method": "SGD", "seed": 0, "lr": 0.1, "start": 1.0}
CURVE = [(1, 0.5, 2.0), (2, float("nan"), 4.0), (3, 0.25)]


@pytest.fixture
def store(tmp_path):
    return Store.open_or_create(tmp_path, {"epochs": 3})


@dataclass(frozen=True)
class Cell:
    protocol: str
    method: str
    lr: float
    seed: int
    start: float | str
    epochs: int


def diverge_where_the_rate_is_high(cell, stopping):
    status = "diverged" if cell.lr > 1 else "finished"
    return {"status": status, "loss": float("nan") if cell.lr > 1 else cell.lr, "curves": {"loss": [(1, cell.lr)]}}


def test_what_goes_in_comes_out(store):
    store.log({**CELL, "accuracy": 0.5, "reason": None, "curves": {"loss": CURVE, "none": []}})
    store.log({**CELL, "start": "filters", "status": "diverged", "loss": float("inf"), "list": [1, float("nan")]})
    first, second = Store.open(store.folder).metrics()
    assert first == {**dict.fromkeys(COLUMNS), **CELL, "id": 1, "status": "finished", "accuracy": 0.5, "reason": None}
    assert (second["start"], second["status"], second["loss"], second["list"]) == (
        "filters",
        "diverged",
        None,
        [1, None],
    )
    assert store.curve(first, "loss") == store.curve(1, "loss") == [(1, 0.5, 2.0), (2, None, 4.0), (3, 0.25, None)]
    assert store.curve(second, "loss") == store.curve(first, "none") == store.curve(first, "other") == []


def test_sql_reads_it_beside_a_writer(store):
    store.log({**CELL, "accuracy": 0.5})
    with sqlite3.connect(store.folder / DATABASE) as reader:
        query = "select method, avg(json_extract(results, '$.accuracy')) from cells group by method"
        assert reader.execute(query).fetchall() == [("SGD", 0.5)]
        store.log({**CELL, "accuracy": 1.0})
        assert reader.execute(query).fetchall() == [("SGD", 0.75)]
        assert reader.execute("pragma journal_mode").fetchone() == ("wal",)
    reader.close()


def test_grids_run_on_it_and_diverged_cells_are_kept_and_not_repeated(store):
    starts = (1.0, "filters", 1e-3)
    cells = [Cell("training", "SGD", lr, seed, start, 3) for lr in (0.1, 3.0) for seed in (0, 1) for start in starts]
    seen = []
    assert compute(store, cells, diverge_where_the_rate_is_high, processes=2, on_record=seen.append)
    assert compute(store, cells, diverge_where_the_rate_is_high, processes=2, on_record=seen.append)
    assert len(seen) == len(cells) == len(store.metrics())
    records = finished(store, cells)
    assert {cell: records[cell]["status"] for cell in cells} == {
        cell: "diverged" if cell.lr == 3 else "finished" for cell in cells
    }
    assert all(store.curve(records[cell], "loss") == [(1, cell.lr, None)] for cell in cells)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"method": "SGD"}, "a record needs protocol and method, got none for protocol"),
        ({"protocol": "toy"}, "a record needs protocol and method, got none for method"),
        ({**CELL, "status": "failed"}, "status must be finished or diverged, got 'failed'"),
    ],
)
def test_records_that_are_refused(store, record, message):
    with pytest.raises(ValueError, match=message):
        store.log(record)
    assert store.metrics() == []


def test_a_cell_whose_curve_cannot_be_written_is_not_there_at_all(store):
    with pytest.raises(sqlite3.Error):
        store.log({**CELL, "curves": {"good": [(1, 0.5)], "bad": [(None, 0.5)]}})
    assert store.metrics() == [] and store.curve(1, "good") == []


def test_other_options_are_refused_by_name(store):
    with pytest.raises(ValueError, match="epochs = 3, not 4"):
        Store.open_or_create(store.folder, {"epochs": 4})
    assert Store.open_or_create(store.folder, {"epochs": 3}).config == {"epochs": 3}


def test_a_folder_without_results(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        Store.open(tmp_path)
    Store.open_or_create(tmp_path, {})
    (tmp_path / DATABASE).unlink()
    with pytest.raises(ValueError, match=f"there is no {DATABASE}"):
        Store.open(tmp_path)


def test_a_killed_writer_leaves_whole_cells_and_the_next_one_goes_on(tmp_path):
    """kill -9 in the middle of writing: every cell that is there has all of its curve."""
    points = 2000
    writer = textwrap.dedent(f"""
        import sys
        from retract.benchmarks.convergence.store import Store
        store = Store.open_or_create(sys.argv[1], {{}})
        for seed in range(100_000):
            curve = [(step, 0.5, 0.0) for step in range({points})]
            store.log({{**{CELL!r}, "seed": seed, "curves": {{"loss": curve}}}})
    """)
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _cells(tmp_path):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = Store.open_or_create(tmp_path, {})
    records = store.metrics()
    assert records and [record["seed"] for record in records] == list(range(len(records)))
    assert all(len(store.curve(record, "loss")) == points for record in records)
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        assert connection.execute("select count(*) from curves").fetchone() == (points * len(records),)
    connection.close()
    store.log(CELL)
    assert len(store.metrics()) == len(records) + 1


def _cells(folder):
    if not (folder / DATABASE).exists():
        return 0
    try:
        connection = sqlite3.connect(folder / DATABASE)
        return connection.execute("select count(*) from cells").fetchone()[0]
    except sqlite3.Error:  # no table yet
        return 0
    finally:
        connection.close()
