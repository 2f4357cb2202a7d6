"""What `retract bench lowrank` says of its results: tables that say plainly what was tested."""

from __future__ import annotations

from retract.benchmarks.lowrank_errors import INITIALIZATIONS
from retract.benchmarks.lowrank_report import tables
from retract.benchmarks.lowrank_runs_report import fraction

# ---------------------------------------------------------------------------------------------------------- tables


def trained(method, seed, loss, *, tuning=False, network="plain", part=1 / 8, lr=0.01):
    accuracy = None if loss is None else 1 - loss
    early = [None if loss is None else 3 * loss, None if loss is None else 2 * loss, None]
    return {
        "part": "training",
        "network": network,
        "fraction": part,
        "method": method,
        "lr": lr,
        "seed": seed,
        "tuning": tuning,
        "early": early,
        "train_loss": loss,
        "unseen_loss": loss,
        "accuracy": accuracy,
        "energy": 0.5 + seed,
        "seconds": 1.0,
    }


def rows(table):
    return {tuple(row[:2]): dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_tables_of_training():
    wobble = [0.0, 0.003, -0.002, 0.001, -0.002]
    records = [trained("spectral", seed, 0.3) for seed in range(5)]
    records += [trained("calibrated", seed, 0.1 + wobble[seed]) for seed in range(5)]
    records += [trained("random", seed, 0.5 + wobble[seed]) for seed in range(5)]
    records += [trained("relu", seed, 0.3 + wobble[seed]) for seed in range(4)] + [trained("relu", 4, None)]
    records += [trained("full rank", seed, 0.05, part=1.0) for seed in range(5)]
    records += [trained("relu", seed, loss, tuning=True, lr=lr) for seed, lr, loss in ((8, 1, None), (8, 0.01, 0.25))]
    runs, differences, short, tried = tables(records)

    found = rows(runs)
    assert list(found) == [("1", "full rank")] + [("1/8", m) for m in ("spectral", "relu", "random", "calibrated")]
    assert found["1/8", "relu"]["seeds"] == "4 of 5"
    assert found["1/8", "calibrated"]["loss, last epoch"] == "0.100 ± 0.001"
    assert found["1/8", "calibrated"]["accuracy %"].startswith("90.00")
    assert found["1/8", "calibrated"]["energy"] == "2.5"
    assert found["1/8", "calibrated"]["loss, step 100"] == "–"

    found = rows(differences)
    assert list(found) == [("1/8", m) for m in ("relu", "random", "calibrated")]
    assert found["1/8", "calibrated"]["loss, last epoch"].startswith("-0.200 ± 0.003, p ")
    for name in ("loss, step 25", "loss, last epoch", "accuracy %"):
        words = {method: found["1/8", method][name].split(": ")[-1] for method in ("relu", "random", "calibrated")}
        assert words == {"relu": "ties", "random": "hurts", "calibrated": "helps"}
    assert rows(short)["plain", "calibrated"]["loss, step 25"] == "helps 1"
    assert rows(short)["plain", "calibrated"]["loss, step 100"] == "–"
    assert tried.header[3:] == ("lr 0.01", "lr 1")
    assert tried.rows == [["plain", "1/8", "relu", "0.25", "–"]]


def compressed(initialization, seed, accuracy):
    return {
        "part": "compression",
        "stage": "compressed",
        "seed": seed,
        "lr": 0.03,
        "budget": 0.2,
        "initialization": initialization,
        "train_loss": 1.0,
        "unseen_loss": 1.0,
        "accuracy": accuracy + 0.2,
        "accuracy_as_made": accuracy,
        "accuracy_before": accuracy + 0.1,
        "parameters": 1000,
        "seconds": 1.0,
    }


def test_tables_of_compression():
    dense = [compressed("", seed, 0.7) | {"stage": "dense", "budget": 1.0, "parameters": 4000} for seed in range(3)]
    tuning = [compressed("relu", 1000, 0.5) | {"stage": "fine-tuning", "unseen_loss": 0.75}]
    found = [compressed("spectral", seed, 0.3) for seed in range(3)]
    found += [compressed("calibrated", seed, 0.4 + seed / 1000) for seed in range(3)]
    accuracies, differences, tried = tables([*dense, *tuning, *found])
    assert accuracies.rows[0][:3] == ["1", "dense", "4,000"]
    assert accuracies.rows[0][4].startswith("90.00")
    assert [row[1] for row in accuracies.rows[1:]] == ["spectral", "calibrated"]
    assert [cell.split(" ")[0] for cell in accuracies.rows[1][4:]] == ["30.00", "40.00", "50.00"]
    assert [row[:2] for row in differences.rows] == [["0.2", "calibrated"]]
    assert all(cell.startswith("+10.10 ± 0.25, p ") and cell.endswith("helps") for cell in differences.rows[0][2:])
    assert tried.rows == [["0.2", "relu", "0.75"]]


def test_tables_of_errors_and_costs():
    errors = {"part": "errors", "size": 64, "rank": 8, "weights": "orthogonal", "inputs": "white"}
    errors["errors"] = {"spectral": [0.5, 0.6], "relu": [0.4]}
    seconds = {name: [2.0, 1.0, 3.0] for name in ("SVD", *INITIALIZATIONS)}
    cost = {"part": "costs", "size": 256, "rank": 16, "dtype": "float32"}
    slow = {**cost, "seconds": seconds | {"relu": [2.2, 2, 3], "relu_dc": [8.0, 7, 9]}}
    small = {**slow, "size": 64}
    first, second = tables([errors, slow, small])
    assert first.rows == [["64", "1/8", "0.5500 ± 0.0500", "0.4000"]]
    assert "orthogonal weights, white inputs" in first.caption
    assert [dict(zip(second.header, row, strict=True))["relu"] for row in second.rows] == ["1.10 ✗", "1.10"]
    assert [dict(zip(second.header, row, strict=True))["relu_dc"] for row in second.rows] == ["4.00 ✓", "4.00"]
    assert second.rows[0][:5] == ["float32", "256", "1/16", "2e+03", "1.00"]


def test_nothing_computed_is_no_table():
    assert tables([]) == []


def test_fractions():
    assert [fraction(value) for value in (1.0, 1 / 16, 1 / 2)] == ["1", "1/16", "1/2"]
