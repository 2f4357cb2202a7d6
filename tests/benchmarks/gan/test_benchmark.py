"""`retract bench gan`: alike but for the constraint, tuning never sees test images, and a stopped grid goes on."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from retract.benchmarks.gan import benchmark as gan_bench
from retract.benchmarks.gan import benchmark_report as gan_bench_report
from retract.benchmarks.gan import cell as gan_cell
from retract.benchmarks.gan import steps as gan_steps
from retract.benchmarks.gan.cell import METHODS, Cell, Settings, config_of, train_cell
from retract.benchmarks.samples.metrics import SampleMetrics

SETTINGS = Settings(
    data="digits",
    data_dir=None,
    subset=100,
    network="digits",
    width=4,
    generator_width=4,
    rank=3,
    loss="hinge",
    steps=4,
    tuning_steps=2,
    discriminator_steps=1,
    batch_size=20,
    ema=0.5,
    metric_samples=50,
    looks=2,
    device="cpu",
    amp=False,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def never():
    return False


def test_methods_differ_in_the_constraint_alone():
    configs = [vars(config_of(SETTINGS, Cell(method, 1e-3, 0))) for method in METHODS]
    assert len({tuple(config.values()) for config in configs}) == len(METHODS) == 17
    for config in configs:
        factored = config["constraint"] not in ("none", "sn", "sr")
        assert config["rank"] == (3 if factored else None)
        assert config["manifold_lr"] == 200 * config["lr"]
        same = {name: value for name, value in config.items() if name not in ("constraint", "form", "rank")}
        assert same == {name: value for name, value in configs[0].items() if name in same}


def test_tuning_runs_are_shorter_and_see_no_test_image(monkeypatch, tmp_path):
    data = gan_cell.load_data(SETTINGS)
    seen = []
    measured = gan_cell.evaluate_samples
    monkeypatch.setattr(
        gan_cell, "evaluate_samples", lambda *args, **options: seen.append(options) or measured(*args, **options)
    )
    for tuning in (True, False):
        found = train_cell(SETTINGS, tmp_path, Cell("sn", 1e-3, 0, tuning), never)
        assert found["curve"][-1][0] == (2 if tuning else 4)
        assert found["unseen_loss"] == found["metrics"]["frechet_distance"]
        assert found["metrics"]["split"] == ("train" if tuning else "test")
    assert [options["split"] for options in seen] == ["train", "test"]
    assert len(data.train_images) == 100


@pytest.mark.parametrize("method", ["none", "svdp-r", "sttp-l (Stiefel)"])
def test_a_stopped_cell_goes_on_to_the_bit(tmp_path, method):
    cell = Cell(method, 1e-3, 0)
    whole = train_cell(SETTINGS, tmp_path / "whole", cell, never)
    left = iter([False, False, True])
    assert train_cell(SETTINGS, tmp_path / "stopped", cell, lambda: next(left)) is None
    resumed = train_cell(SETTINGS, tmp_path / "stopped", cell, never)
    for result in (whole, resumed):
        del result["seconds"], result["steps_per_second"]
    assert whole == resumed
    assert whole["violation"] < 1e-5
    assert whole["spectra"].keys()
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_diverging_cell_is_a_result(tmp_path):
    result = train_cell(SETTINGS, tmp_path, Cell("none", 1e30, 0), never)
    assert result["metrics"] is result["unseen_loss"] is None
    json.dumps(result, allow_nan=False)


def test_best_rates():
    losses = {("sn", 1e-3): 3.0, ("sn", 2e-3): 2.0, ("sn", 3e-3): None, ("none", 1e-3): None, ("none", 2e-3): None}
    tuned = {Cell(method, lr, 1000, True): {"unseen_loss": loss} for (method, lr), loss in losses.items()}
    assert gan_bench.best_rates(tuned) == {"sn": 2e-3, "none": 1e-3}


# ----------------------------------------------------------------------------------------------------- the report


def record(distance, *, lost=False, violation=1e-7):
    values = dict.fromkeys(SampleMetrics.__dataclass_fields__, 0.5)
    metrics = {**values, "frechet_distance": distance, "mode_coverage": 0.9 if lost else 1.0}
    layers = {
        "conv": {"largest": 1.0, "least": 0.25, "stable_rank": 2.0},
        "linear": {"largest": 1.0, "least": 1.0, "stable_rank": 1.0},
    }
    return {
        "metrics": None if distance is None else metrics,
        "unseen_loss": distance,
        "curve": [(1, 9.0), (2, 5.0)],
        "spectra": layers,
        "lipschitz_bound": 3.0,
        "violation": violation,
        "z": 50.0,
        "steps_per_second": 4.0,
        "seconds": 1.0,
    }


def test_tables_of_unfinished_lost_and_diverged_runs(tmp_path):
    results = {Cell("sn", 1e-3, seed): record(3.0 + seed / 10, lost=seed == 1) for seed in range(3)}
    results |= {Cell("svdp-c", 5e-4, seed): record(1.0 + seed / 11) for seed in range(3)}
    results[Cell("none", 1e-3, 0)] = record(None)
    results[Cell("none", 1e-3, 1)] = record(4.0, violation=0.0)
    results[Cell("sn", 1e-3, 1000, True)] = record(5.0)
    samples, differences, spectra, tuning = gan_bench_report.tables(results)
    rows = {row[0]: dict(zip(samples.header, row, strict=True)) for row in samples.rows}
    assert list(rows) == ["none", "sn", "svdp-c"]
    assert rows["none"]["seeds"] == "1 of 2"
    assert rows["sn"]["Fréchet distance"] == "3.10 ± 0.10"
    assert rows["sn"]["lost a class"] == "1 of 3"
    assert [row[0] for row in differences.rows] == ["svdp-c"]
    assert differences.rows[0][1] == "-2.01"
    assert differences.rows[0][-1] == "helps"
    assert spectra.rows[1][1:4] == ["1.0e-07", "1.5 ± 0.0", "2.0 ± 0.0"]
    assert tuning.rows == [["sn", "–", "–", "5.00", "–"]]
    path = gan_bench_report.write_gan_benchmark_report(tmp_path / "report.html", results, SETTINGS, tmp_path)
    assert "svdp-c" in path.read_text(encoding="utf-8")
    assert all(not table.rows for table in gan_bench_report.tables({}))
    gan_bench_report.write_gan_benchmark_report(tmp_path / "empty.html", {}, SETTINGS, tmp_path)


def test_step_times_are_of_every_rank(monkeypatch):
    monkeypatch.setattr(gan_steps, "BATCH", 1)
    table = gan_steps.step_times(["svdp-l", "svdp-l (Stiefel)", "svdp-r"], 0.1, width=8, ranks=(2, 4))
    assert [row[:2] for row in table.rows] == [
        ["sn", "–"],
        *([method, rank] for method in ("svdp-l", "svdp-l (Stiefel)", "svdp-r") for rank in ("2", "4")),
    ]
    assert table.rows[0][3:] == ["1.00", "1.00"]
    small, large = (float(row[4]) for row in table.rows[1:3])
    assert small < large <= 1


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def invoke(monkeypatch):
    """The command with one learning rate and small networks; (exit status, output)."""
    monkeypatch.setattr(gan_bench, "RATES", (1e-3,))
    app = typer.Typer()
    app.command()(gan_bench.gan_benchmark_command)
    small = {"data": "digits", "subset": 100, "width": 4, "generator-width": 4, "steps": 2, "tuning-steps": 1}
    small |= {"batch-size": 20, "metric-samples": 50, "looks": 1, "processes": 1}
    options = [str(part) for name, value in small.items() for part in (f"--{name}", value)]

    def run(*arguments):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*options, *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split()), result.exception

    return run


def test_the_grid_is_computed_once_and_can_be_extended(invoke, tmp_path):
    out = tmp_path / "grid"
    arguments = ("--methods", "sn,svdp-c", "--out", out)
    status, output, error = invoke(*arguments, "--seeds", 1, "--minutes", 0)
    assert status == 0, error
    assert "Stopped before the end: the same command goes on." in output
    status, output, error = invoke(*arguments, "--seeds", 1)
    assert status == 0, error
    before = (out / "metrics.jsonl").read_bytes()
    assert len(before.splitlines()) == 2 + 2
    assert "svdp-c-0.001-final-0 Fréchet distance" in output
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    status, output, error = invoke(*arguments, "--seeds", 2)
    assert status == 0, error
    after = (out / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == 2 + 4
    assert "beside sn" in output
    assert isinstance(invoke("--methods", "sn", "--out", out, "--steps", 3)[2], ValueError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "sn,svdp"), "--methods must be of none, sn"),
        (("--network", "biggan"), "--network must be one of digits"),
        (("--data", "faces"), "faces"),
    ],
)
def test_wrong_arguments_leave_no_folder(invoke, tmp_path, arguments, message):
    status, _, error = invoke(*arguments, "--out", tmp_path / "grid")
    assert status != 0
    assert message in str(error)
    assert not (tmp_path / "grid").exists()


def test_step_times_by_the_command(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(gan_steps, "BATCH", 1)
    shown = gan_steps.step_times
    monkeypatch.setattr(gan_steps, "step_times", lambda methods, seconds: shown(methods, seconds, width=8, ranks=(2,)))
    status, output, error = invoke("--methods", "svdp-c", "--step-times", "--seconds", 0.1, "--out", tmp_path / "none")
    assert status == 0, error
    assert "multiplications" in output
    assert not (tmp_path / "none").exists()
