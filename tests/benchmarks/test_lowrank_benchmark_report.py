"""What `retract bench lowrank` says of its results: tests seed by seed, corrected, and tables that say them plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from retract.benchmarks.lowrank_errors import INITIALIZATIONS
from retract.benchmarks.lowrank_report import tables
from retract.benchmarks.lowrank_runs_report import fraction
from retract.benchmarks.lowrank_statistics import Comparison, compare, holm, mean_and_error

# ------------------------------------------------------------------------------------------------------ statistics


def test_adjusted_p_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_adjusted_p_values_reject_what_the_step_down_procedure_rejects(values, level):
    """Smallest first, each compared with level / (how many are left), until one is not rejected."""
    rejected = set()
    for left, index in zip(range(len(values), 0, -1), np.argsort(values, kind="stable"), strict=True):
        if values[index] * left >= level:
            break
        rejected.add(int(index))
    assert {index for index, p in enumerate(holm(values)) if p < level} == rejected


def test_a_comparison_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.4, 1, 7), rng.normal(0, 1, 7)
    found = compare({"one": (dict(enumerate(ours)), dict(enumerate(theirs)))})["one"]
    expected = ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference - found.half_width == pytest.approx(interval.low)
    assert found.difference + found.half_width == pytest.approx(interval.high)


def test_comparisons_are_of_common_seeds_and_corrected_together():
    a, b = {0: 1.0, 1: 1.2, 2: 0.9, 7: 50.0}, {0: 2.0, 1: 2.3, 2: 1.8, 8: -50.0}
    alone = compare({"a": (a, b)})["a"]
    assert alone.difference == pytest.approx(-1)
    both = compare({"a": (a, b), "b": ({0: 1.0, 1: 3.0}, {0: 2.0, 1: 1.0}), "c": ({0: 1.0}, {0: 2.0})})
    assert list(both) == ["a", "b"]
    assert both["a"].p == pytest.approx(2 * alone.p)


def test_differences_without_spread_are_no_evidence():
    found = compare({"equal": ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}), "shifted": ({0: 0.1, 1: 0.4}, {0: 0.3, 1: 0.6})})
    assert [one.p for one in found.values()] == [1.0, 1.0]
    assert [one.worded(higher_is_better=True) for one in found.values()] == ["ties", "ties"]


def test_words():
    down, up, unsure = Comparison(-1, 0.5, 0.01), Comparison(1, 0.5, 0.04), Comparison(-1, 2, 0.05)
    assert [one.worded(higher_is_better=False) for one in (down, up, unsure)] == ["helps", "hurts", "ties"]
    assert [one.worded(higher_is_better=True) for one in (down, up, unsure)] == ["hurts", "helps", "ties"]


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == pytest.approx((3.0, np.std([1, 2, 3, 6], ddof=1) / 2))
    assert math.isnan(mean_and_error([1.0])[1])


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
