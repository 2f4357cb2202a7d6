"""The runs that theorems speak of: their cells, what they record, and that they do what the theorems say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from retract.benchmarks.convergence.descent import (
    LOOKS,
    PROTOCOLS,
    DescentCell,
    final_cells,
    run_cell,
    theorem_cells,
    tuning_cell,
)
from retract.benchmarks.convergence.methods import Setting
from retract.benchmarks.convergence.problems import PROBLEMS, make_problem
from retract.benchmarks.convergence.smoothness import smoothness
from retract.benchmarks.convergence.tuning import Trial


@pytest.fixture(autouse=True)
def _fewer_images(monkeypatch):
    """150 of the data, for speed."""

    def fewer(make):
        def made(generator):
            problem = make(generator)
            return replace(problem, inputs=problem.inputs[:150], targets=problem.targets[:150])

        return made

    for name, make in list(PROBLEMS.items()):
        monkeypatch.setitem(PROBLEMS, name, fewer(make))


def never():
    return False


def cell(method="PSIGD", protocol="descent", stage="final", lr=0.3, other=0.1, steps=12, **fields):
    data = PROTOCOLS[protocol].data
    return DescentCell(protocol, method, stage, lr, other, fields.pop("seed", 0), steps, data=data, **fields)


def values(record, name):
    return [value for _, value, _ in record["curves"][name]]


# ------------------------------------------------------------------------------------------------------- the cells


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_method_has_a_grid_of_half_decades_without_decay(protocol):
    grids = [method.grid for method in PROTOCOLS[protocol].methods.values()]
    assert all(len(set(grid)) == len(grid) >= 18 for grid in grids)
    assert {setting.weight_decay for grid in grids for setting in grid} == {0.0}
    if protocol != "stochastic":
        assert len({len(grid) for grid in grids}) == 1


def test_a_trial_is_a_run_of_so_many_ninths_of_the_steps():
    setting = Setting(0.3, 0.1, 0.0)
    cells = [tuning_cell("descent", "GD", Trial(setting, ninths, 1001)) for ninths in (1, 3, 9)]
    assert [found.steps for found in cells] == [111, 333, 1000]
    assert cells[0] == DescentCell("descent", "GD", "tuning", 0.3, 0.1, 1001, 111, data="digits")


def test_final_runs_have_the_tuned_rates():
    finals = final_cells("descent", {"GD": Setting(0.3, 0.1, 0.0), "PSIGD": Setting(1.0, 0.3, 0.0)}, 3)
    assert finals == [
        DescentCell("descent", name, "final", *rates, seed, 2000, data="digits")
        for name, rates in (("GD", (0.3, 0.1)), ("PSIGD", (1.0, 0.3)))
        for seed in range(3)
    ]


def test_stochastic_rates_go_down_with_the_root_of_the_steps():
    finals = final_cells("stochastic", {"SGD": Setting(0.1, 0.3, 0.0)}, 1)
    protocol = PROTOCOLS["stochastic"]
    assert [found.steps for found in finals] == list(protocol.steps)
    for found in finals:
        factor = math.sqrt(protocol.tuning_steps / found.steps)
        assert (found.lr, found.euclidean_lr) == pytest.approx((0.1 * factor, 0.3 * factor))


def test_theorems_are_tried_from_unit_norms_by_methods_without_momentum():
    cells = theorem_cells("descent", 2, ["PSIGD", "Adam", "GD"])
    assert [(found.method, found.seed, found.start) for found in cells] == [
        (method, seed, "unit") for method in ("GD", "PSIGD") for seed in range(2)
    ]
    assert theorem_cells("descent", 2, ["Adam"]) == [] == theorem_cells("stochastic", 2, ["SGD"])


# --------------------------------------------------------------------------------------------------- full-batch runs


@pytest.mark.parametrize(("method", "momentum"), [("GD", 0.0), ("GD momentum", 0.9)])
def test_gradient_descent_by_hand(method, momentum):
    problem, losses, squares = make_problem("digits", 0), [], []
    invariant, others = problem.weights
    weights, rates = [*invariant, *others], [0.3] * len(invariant) + [0.1] * len(others)
    velocities = [torch.zeros_like(weight) for weight in weights]
    for _ in range(9):
        loss = problem.loss()
        gradients = torch.autograd.grad(loss, weights)
        losses.append(loss.item())
        squares.append(sum(float(gradient.square().sum()) for gradient in gradients))
        with torch.no_grad():
            for weight, velocity, gradient, rate in zip(weights, velocities, gradients, rates, strict=True):
                weight -= rate * velocity.mul_(momentum).add_(gradient)
    record = run_cell(cell(method, steps=9), never)
    assert values(record, "loss") == pytest.approx(losses, rel=1e-10)
    assert values(record, "euclidean_gradient_squared") == pytest.approx(squares, rel=1e-10)
    assert record["loss"] == pytest.approx(losses[-1], rel=1e-10)
    assert record["min_euclidean_gradient_squared"] == pytest.approx(min(squares), rel=1e-10)


@pytest.mark.parametrize("protocol", ["toy", "descent"])
@pytest.mark.parametrize("method", ["GD momentum", "PSIGD", "PSIGD momentum", "Adam"])
def test_what_a_run_records(protocol, method):
    lr = 0.01 if method == "Adam" else 0.03
    record = run_cell(cell(method, protocol, lr=lr, other=0.01, steps=30), never)
    assert record["status"] == "finished" and record["seconds"] > 0
    json.dumps(record, allow_nan=False)
    least, every = values(record, "min_gradient_squared"), values(record, "gradient_squared")
    assert [step for step, _, _ in record["curves"]["loss"]][:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert record["curves"]["loss"][-1][0] == 30
    assert least == sorted(least, reverse=True) and all(a <= b for a, b in zip(least, every, strict=True))
    assert record["min_gradient_squared"] == least[-1] <= record["mean_gradient_squared"]
    assert values(record, "loss")[-1] == record["loss"] < values(record, "loss")[0]
    clock = [seconds for _, _, seconds in record["curves"]["loss"]]
    assert clock == sorted(clock) and clock[-1] <= record["seconds"]


def test_tuning_runs_keep_no_curves():
    record = run_cell(cell(stage="tuning"), never)
    assert "curves" not in record and record["loss"] == run_cell(cell(), never)["loss"]


def test_the_scale_of_the_start_is_seen_by_gradient_descent_alone():
    for method, alike in (("PSIGD", True), ("PSIGD momentum", True), ("GD", False)):
        usual, rescaled = (run_cell(cell(method, start=start), never) for start in ("usual", "rescaled"))
        same = values(rescaled, "loss") == pytest.approx(values(usual, "loss"), rel=1e-7)
        assert same == alike


def test_riemannian_descent_is_psi_descent_on_these_weights():
    psi, riemannian = (run_cell(cell(method, "toy", other=0.03), never) for method in ("PSIGD", "RiemannianGD"))
    assert values(riemannian, "loss") == pytest.approx(values(psi, "loss"), rel=1e-10)


def test_a_run_that_diverges_says_so():
    asked = []
    record = run_cell(cell("GD", "toy", other=10.0, steps=2000), lambda: bool(asked.append(1)))
    assert record["status"] == "diverged"
    assert len(asked) < 20  # it ends there
    assert record["loss"] is None and record["min_gradient_squared"] is None and record["mean_square_norm"] is None
    json.dumps(record, allow_nan=False)
    assert values(record, "loss")[0] < 1e3


def test_a_run_stops_when_told():
    assert run_cell(cell(), lambda: True) is None
    assert run_cell(cell("SGD", "stochastic"), lambda: True) is None
    answers = iter([False, True])
    assert run_cell(cell(steps=60), lambda: next(answers)) is None


# -------------------------------------------------------------------------------------------------- theorem's steps


@pytest.mark.parametrize("method", ["GD", "PSIGD"])
@pytest.mark.parametrize("protocol", ["toy", "descent"])
def test_the_theorems_bound_holds(protocol, method):
    """The loss falls by at least half a step times the squared gradient, each time; so the bound holds for every T."""
    record = run_cell(replace(theorem_cells(protocol, 1, [method])[0], steps=25), never)
    losses, squares = values(record, "loss"), values(record, "gradient_squared")
    constant = record["smoothness"]
    steps = [step for step, _, _ in record["curves"]["loss"]]
    for index in range(8):  # consecutive ones
        assert losses[index + 1] <= losses[index] - squares[index] / (2 * 1.15 * constant)
    for step, least in zip(steps, values(record, "min_gradient_squared"), strict=True):
        assert least <= 2 * constant * losses[0] / step
    assert record["bound"] == pytest.approx(2 * constant * losses[0] / 25)
    assert record["min_gradient_squared"] <= record["mean_gradient_squared"] <= record["bound"]


def test_the_theorems_steps_are_those_of_the_constants_at_the_start():
    record = run_cell(replace(theorem_cells("descent", 1, ["GD"])[0], steps=4), never)
    known = smoothness(make_problem("digits", 0, "unit"))
    assert (record["step"], record["euclidean_step"]) == pytest.approx((known.step, known.euclidean_step), rel=1e-6)
    by_number = run_cell(cell("GD", lr=known.step, other=known.euclidean_step, steps=4, start="unit"), never)
    assert values(by_number, "loss") == pytest.approx(values(record, "loss"), rel=1e-6)
    looked = record["curves"]["smoothness"]
    assert [step for step, _, _ in looked] == [1, 1, 4] and looked[0][1] == pytest.approx(known.largest, rel=1e-6)


def test_norms_grow_in_gradient_descent_alone():
    """Lemma 1: by the squares of the steps."""
    descent, psi = (run_cell(replace(found, steps=3), never) for found in theorem_cells("descent", 1, ["GD", "PSIGD"]))
    assert values(psi, "mean_square_norm") == pytest.approx([1, 1, 1], rel=1e-12)
    grown = values(descent, "mean_square_norm")
    assert grown[0] == pytest.approx(1, rel=1e-12) and 1 < grown[1] < grown[2]
    assert values(descent, "loss")[:2] == pytest.approx(values(psi, "loss")[:2], rel=1e-10)


# -------------------------------------------------------------------------------------------------- stochastic runs


def test_stochastic_descent_by_hand():
    problem, losses = make_problem("digits", 5), []
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(5)
    for step in range(2 * LOOKS):
        if step % 2 == 0:
            losses.append(problem.loss().item())
        batch = torch.randint(150, (64,), generator=generator)
        optimizer.zero_grad()
        problem.loss(batch).backward()
        optimizer.step()
    record = run_cell(cell("SGD without momentum", "stochastic", lr=0.05, other=0.05, steps=2 * LOOKS, seed=5), never)
    assert record["loss"] == pytest.approx(losses[-1], rel=1e-9)
    looked = record["curves"]["loss"]
    assert [step for step, _, _ in looked][:3] == [1, 3, 5] and looked[-1][0] == 2 * LOOKS - 1
    assert [value for _, value, _ in looked] == pytest.approx([losses[step // 2] for step, _, _ in looked], rel=1e-9)


@pytest.mark.parametrize("method", PROTOCOLS["stochastic"].methods)
def test_every_stochastic_method_learns(method):
    setting = PROTOCOLS["stochastic"].methods[method]
    record = run_cell(cell(method, "stochastic", lr=setting.lrs[2], other=setting.euclidean_lrs[1], steps=100), never)
    assert record["status"] == "finished"
    assert record["loss"] < 0.7 * values(record, "loss")[0]
    assert record["min_gradient_squared"] <= record["mean_gradient_squared"]
