import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from retract.manifolds import PSI, Stiefel
from retract.optim import PSIGD, RiemannianGD, clip_grad_norm_
from tests.networks import directions, invariant_net, rescale

STEPS = {"fixed": {"lr": 0.1}, "armijo": {"lr": 1.0, "line_search": "armijo"}}


class Run:
    """Full-batch training of the test network."""

    def __init__(
        self, steps: int = 0, seed: int | None = None, dtype=torch.float64, *, span=2.0, twos=False, **options
    ):
        self.model, groups, batch, target = invariant_net(dtype)
        if seed is not None:
            rescale(self.model, seed, span, powers_of_two=twos)
        self.optimizer = PSIGD(groups, **options)
        self.batch, self.target = batch, target
        self.losses: list[float] = []
        self.searches: list[tuple[float | None, int]] = []
        for _ in range(steps):
            self.losses.append(self.optimizer.step(self.closure).item())
            search = self.optimizer.last_search
            self.searches.append((None, 0) if search is None else (search.step, search.evaluations))

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.batch), self.target)
        loss.backward()
        return loss

    def eval_outputs(self) -> Tensor:
        return self.model.eval()(self.batch).detach()


@pytest.mark.parametrize("steps", STEPS)
def test_rescaled_network_takes_the_same_path(steps):
    """papers' check 4 and 12; measured 2e-15 in directions, 3e-14 in eval outputs, for both."""
    plain, scaled = (Run(100, seed, **STEPS[steps]) for seed in (None, 1))
    assert max(abs(a - b) for a, b in zip(plain.losses, scaled.losses, strict=True)) < 1e-11
    assert (directions(plain.model) - directions(scaled.model)).abs().max() < 1e-11
    assert plain.searches == scaled.searches
    assert (plain.eval_outputs() - scaled.eval_outputs()).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", STEPS)
def test_powers_of_two_change_nothing_to_the_bit(steps, dtype):
    plain, scaled = (Run(30, seed, dtype, twos=True, **STEPS[steps]) for seed in (None, 1))
    assert plain.losses == scaled.losses
    assert plain.searches == scaled.searches
    assert torch.equal(directions(plain.model), directions(scaled.model))
    assert torch.equal(plain.eval_outputs(), scaled.eval_outputs())


@pytest.mark.parametrize("steps", STEPS)
def test_filters_turn_and_keep_their_norms(steps):
    run = Run(**STEPS[steps])
    weights = [(w, g["manifold"]) for g in run.optimizer.param_groups if g["manifold"] for w in g["params"]]
    before = [(w.detach().clone(), manifold.norms(w.detach())) for w, manifold in weights]
    for _ in range(20):
        run.optimizer.step(run.closure)
    for (w, manifold), (start, norms) in zip(weights, before, strict=True):
        torch.testing.assert_close(manifold.norms(w.detach()), norms, rtol=1e-14, atol=0)
        assert manifold.angles(start, w.detach()).min() > 1e-6


def test_armijo_falls_monotonically_and_bounds_the_gradient():
    """Theorem 2's O(1/T): gains of c1 t_k |grad|^2 leave min |grad|^2 <= (L_0 - L_T) / (c1 sum t_k)."""
    c1 = 0.25
    run = Run(lr=1.0, line_search="armijo", sufficient_decrease=c1)
    losses, squares, steps = [], [], []
    for _ in range(60):
        losses.append(run.closure().item())
        squares.append(clip_grad_norm_(run.optimizer, math.inf).item() ** 2)
        run.optimizer.step(run.closure)
        steps.append(run.optimizer.last_step)
    losses.append(run.closure().item())
    assert all(a > b for a, b in pairwise(losses))
    assert min(squares) <= (losses[0] - losses[-1]) / (c1 * sum(steps))
    assert min(steps) > 0.05  # no step vanishes, so the bound is O(1/T)


def test_small_fixed_steps_meet_the_bound_of_theorem_2():
    """At a rate eta below 1/L each step gains at least eta/2 |grad|^2."""
    eta, run = 0.02, Run(lr=0.02)
    losses, squares = [], []
    for _ in range(60):
        losses.append(run.closure().item())
        squares.append(clip_grad_norm_(run.optimizer, math.inf).item() ** 2)
        run.optimizer.step()
    gains = [a - b for a, b in pairwise(losses)]
    assert all(gain >= eta / 2 * square for gain, square in zip(gains, squares, strict=False))
    assert min(squares) <= 2 / eta * (losses[0] - losses[-1]) / len(gains)


def test_it_is_riemannian_descent():
    run, model = Run(10, **STEPS["armijo"]), invariant_net()
    optimizer = RiemannianGD(model[1], **STEPS["armijo"])

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model[0](model[2]), model[3])
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert all(map(torch.equal, run.model.parameters(), model[0].parameters()))


def test_without_invariant_weights_it_says_what_to_add():
    with pytest.raises(ValueError, match=r"register_scale_invariant"):
        PSIGD(nn.Linear(3, 2).parameters(), lr=0.1)


def test_manifold_without_scale_groups_is_refused():
    stiefel = {"params": [nn.Parameter(torch.eye(4, 3))], "manifold": Stiefel()}
    psi = {"params": [nn.Parameter(torch.eye(3))], "manifold": PSI()}
    with pytest.raises(ValueError, match="Stiefel"):
        PSIGD([psi, stiefel], lr=0.1)


@pytest.mark.parametrize("row", [0.0, math.nan, math.inf])
def test_filter_that_is_no_point_is_refused_by_name(row):
    weight = torch.ones(3, 4)
    weight[1] = row
    with pytest.raises(ValueError, match=r"'conv.weight'.*scale groups \[1\] of 3"):
        PSIGD([{"params": [("conv.weight", nn.Parameter(weight))], "manifold": PSI()}], lr=0.1)


def test_missing_closure_is_named():
    run = Run(**STEPS["armijo"])
    with pytest.raises(ValueError, match="closure"):
        run.optimizer.step()
