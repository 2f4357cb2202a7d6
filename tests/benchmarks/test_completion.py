"""`retract bench completion`: its problems, starts and methods are what it says; and its finding, once, in small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from retract.benchmarks import completion
from retract.benchmarks import completion_methods as methods
from retract.benchmarks.cli import app
from retract.benchmarks.completion_methods import METHODS, Problem, Watch

SHAPE, RANK = (30, 24), 3


def problem(condition: float = 10.0, oversampling: float | None = None, seed: int = 0) -> Problem:
    return Problem.draw(SHAPE, RANK, condition, oversampling, torch.Generator().manual_seed(seed))


def random_start(drawn: Problem) -> methods.Factors:
    return methods.random_start(drawn, torch.Generator().manual_seed(1))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "SHAPE", SHAPE)
    monkeypatch.setattr(completion, "RANK", RANK)


# ------------------------------------------------------------------------------------------ problems and starts


def test_targets_have_the_condition_and_entries_the_share() -> None:
    drawn = problem(1e3, 2.5)
    values = torch.linalg.svdvals(drawn.target)
    torch.testing.assert_close(values[:3], torch.tensor([1, 1e3**-0.5, 1e-3], dtype=torch.float64))
    assert values[3] < 1e-14
    observed = drawn.weights > 0
    assert int(observed.sum()) == round(2.5 * RANK * (sum(SHAPE) - RANK))
    torch.testing.assert_close(drawn.weights.mean(), torch.tensor(1.0, dtype=torch.float64))
    assert len(drawn.weights.unique()) == 2
    assert torch.equal(problem().weights, torch.ones(SHAPE, dtype=torch.float64))
    assert int((problem(10, 1e3).weights == 1).sum()) == math.prod(SHAPE)


def test_gradient_is_that_of_the_loss() -> None:
    drawn = problem(10, 3)
    matrix = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(drawn.loss(matrix), matrix)
    torch.testing.assert_close(drawn.gradient(matrix.detach()), gradient)


def test_a_grown_start_has_the_rank_and_sees_observed_entries_alone() -> None:
    drawn = problem(1e3, 4)
    start = methods.grown_start(drawn)
    assert [tuple(factor.shape) for factor in start] == [(30, 3), (3,), (24, 3)]
    other = drawn.target + (drawn.weights == 0) * torch.randn(SHAPE, dtype=torch.float64)
    for one, two in zip(start, methods.grown_start(Problem(other, drawn.weights, RANK)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
    error = torch.linalg.norm(methods._svd_product(start) - drawn.target)
    assert error < torch.linalg.norm(methods._svd_product(random_start(drawn)) - drawn.target) / 10


# ------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_start_and_solves_an_easy_problem(method: str) -> None:
    drawn = problem(3.0)
    start = random_start(drawn)
    watch = Watch(drawn, 1e-8)
    METHODS[method](drawn, start, 300, watch)
    first = torch.linalg.norm(methods._svd_product(start) - drawn.target) / torch.linalg.norm(drawn.target)
    assert watch.errors[0] == pytest.approx(float(first), rel=1e-12)
    assert watch.errors[-1] <= 1e-8 < min(watch.errors[:-1])
    assert watch.seconds[0] == 0
    assert watch.seconds == sorted(watch.seconds)


def test_two_factors_start_balanced() -> None:
    start = random_start(problem())
    a, b = methods._balanced(start)
    torch.testing.assert_close(a @ b.mT, methods._svd_product(start))
    torch.testing.assert_close(a.mT @ a, b.mT @ b)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stops_after_the_iterations_it_is_given(method: str) -> None:
    drawn = problem(1e3, 2)
    watch = Watch(drawn, 0.0)
    METHODS[method](drawn, random_start(drawn), 7, watch)
    assert len(watch.errors) == 8


def test_measuring_takes_none_of_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([5.0, 7.0, 8.0, 11.0, 11.5, 20.0])  # around each measurement
    monkeypatch.setattr(methods.time, "perf_counter", lambda: next(ticks))
    drawn = problem()
    watch = Watch(drawn, 1e-8)
    assert watch(0 * drawn.target) and watch(0.5 * drawn.target)
    assert not watch(drawn.target)
    assert watch.seconds == [0.0, 1.0, 1.5]
    assert watch.errors[:2] == pytest.approx([1, 0.5])


def test_scaled_gradient_is_the_gradient_of_its_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, u, v, g, h = (torch.randn(rows, 2, dtype=torch.float64, generator=generator) for rows in (5, 4, 5, 4, 5, 4))
    scaled_g, scaled_h = methods.ScaledFactors().egrad2rgrad((a, b), (g, h))
    inner = ((u.mT @ scaled_g) * (b.mT @ b)).sum() + ((v.mT @ scaled_h) * (a.mT @ a)).sum()
    torch.testing.assert_close(inner, (g * u).sum() + (h * v).sum())


# --------------------------------------------------------------------------------------------------- the finding


def test_rate_of_a_geometric_sequence() -> None:
    assert completion.fitted_rate([3 * 0.8**k for k in range(20)]) == pytest.approx(0.8)
    assert completion.fitted_rate([1, 1, 1, 1, 0.5, 0.25, 0.125, 0.0625]) == pytest.approx(0.5)
    assert completion.fitted_rate([1, 0.25]) == pytest.approx(0.25)


@pytest.mark.usefixtures("_small")
def test_the_condition_slows_two_factors_and_not_the_manifold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "SETTINGS", completion.SETTINGS[:2])
    runs = completion.measure([10, 1000], seeds=1, iterations=150)
    digits = {(run.setting, run.method, run.condition): -1 / math.log10(run.rate) for run in runs}
    for setting in completion.SETTINGS:
        for method, bound in (("RiemannianGD on SVDSpectral", 2), ("two factors, ScaledGD", 3)):
            assert digits[setting.name, method, 1000] < bound * digits[setting.name, method, 10]
        plain = "two factors, gradient descent"
        assert digits[setting.name, plain, 1000] > 10 * digits[setting.name, plain, 10]
    for run in runs:
        if run.method.startswith("RiemannianGD"):
            assert run.iterations is not None
            assert run.errors[run.iterations] <= 1e-6 < run.errors[run.iterations - 1]


# --------------------------------------------------------------------------------------------------- the command


def run(method: str, condition: float, seed: int, iterations: int | None, rate: float) -> completion.Run:
    name = completion.SETTINGS[0].name
    seconds = None if iterations is None else iterations / 100
    return completion.Run(name, condition, method, seed, [1.0, 3e-4], iterations, seconds, rate)


def test_tables_say_who_did_not_arrive_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "SETTINGS", completion.SETTINGS[:1])
    ours, plain, scaled, pymanopts = METHODS
    runs = [run(ours, c, seed, 10 + seed, 0.1) for c in (10, 1000) for seed in range(3)]
    runs += [run(plain, 10, seed, 50, 0.9) for seed in range(3)] + [run(plain, 1000, s, None, 0.999) for s in range(3)]
    runs += [run(scaled, c, seed, 30 if seed else None, 1.0) for c in (10, 1000) for seed in range(3)]
    (table,) = completion.tables(runs, 400)
    assert "after 400 iterations" in table.caption
    assert table.rows == [
        [ours, "iterations", "10–12", "10–12", ""],
        ["", "seconds", "0.1–0.12", "0.1–0.12", ""],
        ["", "rate", "0.1000", "0.1000", "1.0×"],
        [plain, "iterations", "50", "> 400 (3e-04)", ""],
        ["", "seconds", "0.5", "–", ""],
        ["", "rate", "0.9000", "0.9990", "105×"],
        [scaled, "iterations", "30 (2 of 3)", "30 (2 of 3)", ""],
        ["", "seconds", "–", "–", ""],
        ["", "rate", "1.0000", "1.0000", "∞"],
        [pymanopts, "not installed", "–", "–", "–"],
    ]


@pytest.mark.usefixtures("_small")
def test_pymanopt_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    runs = completion.measure([10], seeds=1, iterations=2)
    assert {run.method for run in runs} == {name for name in METHODS if "pymanopt" not in name}


@pytest.mark.usefixtures("_small")
def test_processes_change_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "SETTINGS", completion.SETTINGS[:1])
    one, two = (completion.measure([10], seeds=2, iterations=4, processes=count) for count in (1, 2))
    assert [(run.method, run.seed, run.rate) for run in one] == [(run.method, run.seed, run.rate) for run in two]


@pytest.mark.usefixtures("_small")
def test_command_prints_tables_and_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "SETTINGS", completion.SETTINGS[:1])
    out, page = tmp_path / "runs.json", tmp_path / "page.html"
    arguments = [
        "bench",
        "completion",
        "--conditions",
        "10,100",
        "--seeds",
        "1",
        "--iterations",
        "20",
        "--processes",
        "1",
    ]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert "condition 100" in " ".join(result.output.split())
    written = json.loads(out.read_text())
    assert len(written["rows"]) == 2 * len(METHODS)
    assert all(len(row["errors"]) == 2 for row in written["rows"])
    assert page.read_text().count("<svg") == 1


@pytest.mark.parametrize("conditions", ["ten", "0.5", "", "inf"])
def test_wrong_conditions_are_refused(conditions: str) -> None:
    result = CliRunner().invoke(app, ["bench", "completion", "--conditions", conditions])
    assert result.exit_code == 2
    assert "--conditions" in result.output
