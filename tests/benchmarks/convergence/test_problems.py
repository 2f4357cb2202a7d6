"""What descends in the convergence benchmark: problems that are exactly scale-invariant, and their constants."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from retract.benchmarks.convergence.problems import PROBLEMS, STARTS, Perceptron, Problem, make_problem
from retract.benchmarks.convergence.smoothness import Smoothness, smoothness
from retract.benchmarks.convergence.trace import Trace
from retract.benchmarks.demo import rescale_filters
from retract.nets import scale_invariant_groups


def small_problem(seed=0):
    torch.manual_seed(seed)
    inputs, targets = torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,))
    return Problem(Perceptron((3, 4, 5, 2), F.elu).double(), inputs, targets, F.cross_entropy)


def with_gradient(problem):
    problem.loss().backward()
    return problem


# -------------------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("name", PROBLEMS)
def test_starts_are_one_function_of_different_weights(name):
    problems = {start: with_gradient(make_problem(name, 3, start)) for start in STARTS}
    losses = [problem.loss().item() for problem in problems.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)
    metrics = [problem.gradient().metric for problem in problems.values()]
    assert metrics == pytest.approx([metrics[0]] * 3, rel=1e-7)
    assert problems["usual"].mean_square_norm() == pytest.approx(2, rel=0.1)
    assert problems["unit"].mean_square_norm() == pytest.approx(1, rel=1e-12)
    norms = torch.cat([weight.norm(dim=1) for weight in problems["rescaled"].weights[0]])
    assert norms.max() / norms.min() > 100


@pytest.mark.parametrize("start", ["usual", "rescaled"])
def test_the_metric_norm_is_that_of_the_gradient_at_unit_norms(start):
    unit, other = (with_gradient(make_problem("digits", 1, name)).gradient() for name in ("unit", start))
    assert unit.metric == pytest.approx(unit.euclidean, rel=1e-12)
    assert other.metric == pytest.approx(unit.euclidean, rel=1e-7)
    assert abs(other.euclidean / unit.euclidean - 1) > 0.05


def test_norms_of_gradients_by_hand():
    problem = with_gradient(small_problem())
    invariant, others = problem.weights
    assert [tuple(weight.shape) for weight in invariant] == [(4, 3), (5, 4)]
    assert len(others) == 6  # two of each BatchNorm, two of the output layer
    rest = sum(float(weight.grad.square().sum()) for weight in others)
    rows = [(row, slope) for weight in invariant for row, slope in zip(weight.detach(), weight.grad, strict=True)]
    euclidean = sum(float(slope @ slope) for _, slope in rows)
    metric = sum(float((row @ row) * (slope @ slope)) for row, slope in rows)
    found = problem.gradient()
    assert (found.euclidean, found.metric) == pytest.approx((euclidean + rest, metric + rest), rel=1e-12)
    assert problem.mean_square_norm() == pytest.approx(sum(float(row @ row) for row, _ in rows) / 9, rel=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_network_says_which_weights_are_scale_invariant(name):
    problem = with_gradient(make_problem(name, 0))
    measured = [group for group in scale_invariant_groups(problem.model, problem.inputs[:100]) if "manifold" in group]
    assert {name for group in measured for name, _ in group["params"]} == set(problem.model.manifolds())
    for weight in problem.weights[0]:
        slope = weight.grad
        cosine = (weight * slope).sum(1) / (weight.norm(dim=1) * slope.norm(dim=1))
        assert cosine.abs().max() < 1e-9


def test_the_toy_regression():
    """Linear with unit variance, up to noise of standard deviation 0.1, which least squares finds."""
    problem = make_problem("toy regression", 0)
    inputs, targets = problem.inputs.numpy(), problem.targets.numpy()
    assert inputs.shape == (1000, 10) and targets.shape == (1000, 1) and inputs.dtype == np.float64
    residual = np.linalg.lstsq(inputs, targets, rcond=None)[1] / 990
    assert math.sqrt(residual.item()) == pytest.approx(0.1, rel=0.05)
    assert 0.3 < targets.var() < 3
    assert problem.model(problem.inputs).shape == targets.shape


def test_digits():
    problem = make_problem("digits", 0)
    assert problem.inputs.shape == (1347, 64) and len(problem.targets) == 1347
    assert 1.8 < problem.loss().item() < 3.2  # ln 10 and the spread of an untrained network
    batch = torch.arange(50, 90)
    alone = replace(problem, inputs=problem.inputs[batch], targets=problem.targets[batch])
    assert problem.loss(batch).item() == pytest.approx(alone.loss().item(), rel=1e-12)


def test_a_seed_decides_everything_and_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (make_problem("toy regression", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    assert not torch.equal(first.weights[0][0], other.weights[0][0])


def test_unknown_problems_and_starts():
    with pytest.raises(ValueError, match="problem must be one of toy regression, digits, got 'mnist'"):
        make_problem("mnist", 0)
    with pytest.raises(ValueError, match="start must be one of usual, unit, rescaled, got 'large'"):
        make_problem("digits", 0, "large")


# ------------------------------------------------------------------------------------------------------- constants


def dense_blocks(problem):
    """Spectral norms of the Hessian's blocks from all of its entries, of the weights as they are."""
    invariant, others = problem.weights
    weights = [*invariant, *others]
    gradients = torch.autograd.grad(problem.loss(), weights, create_graph=True)
    entries = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in entries]
    hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    cut = sum(weight.numel() for weight in invariant)
    blocks = hessian[:cut, :cut], hessian[cut:, cut:], hessian[:cut, cut:]
    return [float(torch.linalg.matrix_norm(block, ord=2)) for block in blocks]


def test_constants_are_spectral_norms_of_the_hessian():
    problem = small_problem()
    with torch.no_grad():
        for weight in problem.weights[0]:
            weight.div_(weight.norm(dim=1, keepdim=True))
    found = smoothness(problem)
    assert [found.invariant, found.others, found.mixed] == pytest.approx(dense_blocks(problem), rel=1e-3)


def test_constants_are_those_of_unit_norms():
    problem = small_problem(1)
    found = smoothness(problem)
    rescale_filters(problem.model.manifold_groups(), torch.Generator().manual_seed(0), 1.0)
    again = smoothness(problem)
    assert (again.invariant, again.others, again.mixed) == pytest.approx(
        (found.invariant, found.others, found.mixed), rel=1e-3
    )
    assert dense_blocks(problem)[0] != pytest.approx(found.invariant, rel=0.1)


def test_gradients_stay():
    problem = with_gradient(small_problem())
    before = problem.gradient()
    smoothness(problem)
    assert problem.gradient() == before


def test_steps_of_the_theorem():
    constants = Smoothness(invariant=3.0, others=5.0, mixed=1.0)
    assert (constants.step, constants.euclidean_step, constants.largest) == (1 / 4, 1 / 6, 6.0)


# ------------------------------------------------------------------------------------------------------- the trace


def test_a_trace_of_given_gradients():
    """Squared norms 9, 1, 4: least, mean and last, with curves at every early step."""
    problem = with_gradient(small_problem())
    unit = problem.gradient()
    trace = Trace(problem, keep_curves=True)
    for step, length in enumerate((3, 1, 2)):
        for weight in problem.model.parameters():
            weight.grad *= length
        assert trace.look(step, loss=float(10 - step))
        for weight in problem.model.parameters():
            weight.grad /= length
    found = trace.results()
    curves = {name: [value for _, value, _ in points] for name, points in found["curves"].items()}
    assert [step for step, _, _ in found["curves"]["loss"]] == [1, 2, 3]
    assert curves["gradient_squared"] == pytest.approx([9 * unit.metric, unit.metric, 4 * unit.metric])
    assert curves["min_gradient_squared"] == pytest.approx([9 * unit.metric, unit.metric, unit.metric])
    assert curves["mean_gradient_squared"] == pytest.approx([9 * unit.metric, 5 * unit.metric, 14 / 3 * unit.metric])
    assert found["min_euclidean_gradient_squared"] == pytest.approx(unit.euclidean)
    assert found["loss"] == 8.0 and trace.first_loss == 10.0 and found["status"] == "finished"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_trace_of_a_run_that_diverges(loss):
    problem = with_gradient(small_problem())
    trace = Trace(problem, keep_curves=False)
    assert trace.look(0, 1.0) and not trace.look(1, loss)
    found = trace.results()
    assert found["status"] == "diverged" and found["loss"] is None and found["min_gradient_squared"] is None
    problem.weights[0][0].grad[0, 0] = math.nan
    assert not Trace(problem, keep_curves=False).look(0, 1.0)
