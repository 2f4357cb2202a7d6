"""`retract bench convergence`: from tuning to comparison, stopped and killed at any moment, and gone on with."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from retract.benchmarks.cli import app
from retract.benchmarks.convergence import command as convergence
from retract.benchmarks.convergence import robustness as convergence_robustness
from retract.benchmarks.convergence import training as convergence_training
from retract.benchmarks.convergence.command import Benchmark
from retract.benchmarks.convergence.methods import STOCHASTIC
from retract.benchmarks.convergence.store import DATABASE, Store
from retract.benchmarks.convergence.training import Settings
from retract.benchmarks.convergence.tuning import TUNING_SEEDS

SETTINGS = Settings("digits", None, 100, None, False, "digitsnet", 2, 64, "cosine", 0.0, "cpu", False)
OPTIONS = ["--protocols", "training", "--methods", "PSISGD", "--subset", "100", "--epochs", "1", "--trials", "1"]
METHODS = ["SGD, decay 5e-4", "PSIAngular"]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "convergence", *map(str, arguments)])


def benchmark(folder, methods=METHODS, seeds=2, trials=3, **options):
    store = Store.open_or_create(folder, {})
    return Benchmark(store, SETTINGS, methods, seeds, trials, {"processes": 1, **options})


def counts(store):
    """Cells by protocol, stage and method."""
    return Counter((record["protocol"], record["stage"], record["method"]) for record in store.metrics())


def test_training_tunes_every_method_alike_then_compares(tmp_path):
    run = benchmark(tmp_path)
    assert run.run(["training"])
    assert counts(run.store) == {
        ("training", stage, method): number for stage, number in (("tuning", 8), ("final", 2)) for method in METHODS
    }
    records = run.store.metrics()
    for method in METHODS:
        own = [record for record in records if record["method"] == method]
        tuning = [record for record in own if record["stage"] == "tuning" and record["epochs"] == 2]
        final = [record for record in own if record["stage"] == "final"]
        assert {record["seed"] for record in tuning} == set(TUNING_SEEDS) and {r["seed"] for r in final} == {0, 1}
        rates = ("lr", "euclidean_lr", "weight_decay")
        assert {tuple(r[rate] for rate in rates) for r in final} == {tuple(r[rate] for rate in rates) for r in tuning}
        assert all(len(run.store.curve(record, "accuracy")) == 2 for record in final)
    assert {record["weight_decay"] for record in records if record["method"] == METHODS[0]} == {5e-4}


def test_a_second_run_computes_nothing_and_more_seeds_only_what_is_new(tmp_path):
    seen = []
    assert benchmark(tmp_path, METHODS[:1]).run(["training"])
    assert benchmark(tmp_path, METHODS[:1], on_record=seen.append).run(["training"])
    assert seen == []
    assert benchmark(tmp_path, METHODS[:1], seeds=3, on_record=seen.append).run(["training"])
    assert [(record["stage"], record["seed"]) for record in seen] == [("final", 2)]


def test_after_the_deadline_nothing_is_begun_and_it_goes_on_later(tmp_path):
    stopped = benchmark(tmp_path, METHODS[:1], deadline=time.monotonic())
    assert not stopped.run(["training"])
    begun = len(stopped.store.metrics())
    assert begun < 10
    assert benchmark(tmp_path, METHODS[:1]).run(["training"])
    assert len(stopped.store.metrics()) == 10


def test_robustness_tunes_as_training_does(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence_robustness, "SCALES", (1.0, 10.0))
    monkeypatch.setattr(convergence_robustness, "FACTORS", (1.0, 1e30))
    all_steps = convergence.equivariance_cells
    monkeypatch.setattr(
        convergence, "equivariance_cells", lambda *given: [replace(cell, steps=2) for cell in all_steps(*given)]
    )
    run = benchmark(tmp_path, METHODS, trials=1)
    assert run.run(["robustness"])
    assert counts(run.store) == {
        **{("training", "tuning", method): 2 for method in METHODS},
        **{("robustness", "equivariance", method): 2 for method in METHODS},
        **{("robustness", "final", method): 8 for method in METHODS},
    }
    status = {(record["method"], record["lr"] > 1e20): record["status"] for record in run.store.metrics()}
    assert set(status.values()) == {"finished", "diverged"}
    assert all((value == "diverged") == high for (_, high), value in status.items())


def test_protocols_of_theorems_tune_as_training_does(tmp_path, monkeypatch):
    """By the loss at the end of the longest runs; methods that they do not have are left out."""
    protocols = convergence.descent.PROTOCOLS
    monkeypatch.setitem(protocols, "toy", replace(protocols["toy"], tuning_steps=9, steps=(20,)))
    run = benchmark(tmp_path, ["GD", "Muon"])
    assert run.run(["toy", "stochastic"])
    assert counts(run.store) == {("toy", stage, "GD"): n for stage, n in (("tuning", 8), ("final", 2), ("theorem", 2))}
    records = run.store.metrics()
    short, whole = ([r for r in records if r["stage"] == "tuning" and r["steps"] == steps] for steps in (3, 9))
    losses = {}
    for record in short:
        losses.setdefault((record["lr"], record["euclidean_lr"]), []).append(record["loss"] or math.inf)
    best = min(losses, key=lambda rates: sum(losses[rates]))
    final = [record for record in records if record["stage"] == "final"]
    assert {(record["lr"], record["euclidean_lr"]) for record in whole + final} == {best}
    assert {record["seed"] for record in whole} == set(TUNING_SEEDS)


def test_the_main_methods_are_methods():
    assert set(convergence.MAIN) < set(STOCHASTIC)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocols", "training,speed"], "--protocols must be of toy, .*, got speed"),
        (["--methods", "SGD;Lion"], "method must be of SGD; .*, got 'Lion'"),
        (["--methods", "SGD, decay x"], "decay of a method must be a number of at least 0, got 'x'"),
        (["--model", "resnet"], "--model must be one of digitsnet, .*, got 'resnet'"),
        (["--model", "mnist_convnet"], "model must have scale-invariant weights, and mnist_convnet has none"),
        (["--schedule", "linear"], "--schedule must be one of constant, cosine, step, got 'linear'"),
        (["--data", "imagenet"], "data must be one of"),
    ],
)
def test_mistakes_are_named_before_there_is_a_folder(tmp_path, arguments, message):
    result = bench(*OPTIONS, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.output)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_and_repeats_nothing(tmp_path):
    """kill -9 while it trains; then the same command ends with every cell once, and another one is refused."""
    arguments = [*OPTIONS, "--seeds", "5", "--processes", "2", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "retract.benchmarks.cli", "bench", "convergence", *arguments])
    while not _finished(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = Store.open(tmp_path).metrics()
    assert 0 < len(before) < 7
    result = bench(*arguments)
    assert result.exit_code == 0, result.output
    after = Store.open(tmp_path).metrics()
    assert after[: len(before)] == before
    assert Counter((record["stage"], record["seed"]) for record in after) == Counter(
        [("tuning", seed) for seed in TUNING_SEEDS] + [("final", seed) for seed in range(5)]
    )
    assert (tmp_path / "report.html").exists()
    refused = bench(*arguments, "--epochs", "2")
    assert refused.exit_code == 2 and "epochs = 1, not 2" in refused.output


def _finished(folder):
    if not (folder / DATABASE).exists():
        return 0
    connection = sqlite3.connect(folder / DATABASE)
    try:
        return connection.execute("select count(*) from cells").fetchone()[0]
    except sqlite3.Error:  # no table yet
        return 0
    finally:
        connection.close()


def test_a_run_that_is_interrupted_keeps_what_is_finished(tmp_path, monkeypatch):
    """Ctrl-C: the grid ends after the cells that are done, and the next run does the rest."""
    seen = []

    def interrupt(record):
        seen.append(record)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(convergence_training, "CHECKPOINTED", 0)
    run = benchmark(tmp_path, METHODS[:1], on_record=interrupt)
    assert not run.run(["training"])
    kept = run.store.metrics()
    assert 0 < len(kept) < 10
    assert benchmark(tmp_path, METHODS[:1]).run(["training"])
    assert run.store.metrics()[: len(kept)] == kept and len(run.store.metrics()) == 10
