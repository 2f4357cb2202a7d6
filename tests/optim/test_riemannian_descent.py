import copy
import functools
import io
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI, Oblique, Stiefel
from retract.optim import RiemannianGD, RiemannianSGD


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """Weighted principal components, a direction and a shift: a Stiefel weight, a PSI weight, a vector."""

    def __init__(self) -> None:
        self.frame = nn.Parameter(Stiefel().projx(random(8, 3)))
        self.filter = nn.Parameter(random(2, 5, seed=1))
        self.vector = nn.Parameter(random(4, seed=2))
        factor = random(8, 8, seed=3)
        self.matrix, self.target = factor @ factor.T / 8, random(4, seed=4)
        self.heights: list[float] = []

    def groups(self, **vector_options):
        return [
            {"params": [self.frame], "manifold": Stiefel("polar")},
            {"params": [self.filter], "manifold": PSI()},
            {"params": [self.vector], **vector_options},
        ]

    def loss(self) -> Tensor:
        components = (self.frame.T @ self.matrix @ self.frame).diagonal() @ torch.tensor([3.0, 2.0, 1.0]).double()
        direction = self.filter / self.filter.norm(dim=1, keepdim=True)
        return -components + direction[:, 0].sum() + (self.vector - self.target).square().sum()

    def closure(self, optimizer):
        def run():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.heights.append(loss.item())
            return loss

        return run

    @property
    def weights(self):
        return self.frame, self.filter, self.vector


# ----------------------------------------------------------------------------------------------- fixed step


def test_fixed_step_is_sgd_without_momentum():
    ours, theirs = Problem(), Problem()
    descent, sgd = RiemannianGD(ours.groups(), 0.05), RiemannianSGD(theirs.groups(), 0.05)
    for _ in range(5):
        first = descent.step(ours.closure(descent))
        second = sgd.step(theirs.closure(sgd))
        assert torch.equal(first, second)
    assert all(map(torch.equal, ours.weights, theirs.weights))
    assert descent.last_step is None
    assert descent.last_search is None


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_fixed_step_on_euclidean_weights_is_torch_sgd_bit_for_bit(lr):
    w, v = nn.Parameter(random(50)), nn.Parameter(random(50))
    optimizers = RiemannianGD([w], lr), torch.optim.SGD([v], lr)
    for step in range(3):
        w.grad, v.grad = random(50, seed=step), random(50, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(w, v)


def test_fixed_step_writes_no_gradient():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), 0.05)
    problem.closure(optimizer)()
    kept = [w.grad.clone() for w in problem.weights]
    optimizer.step()
    assert all(torch.equal(w.grad, g) for w, g in zip(problem.weights, kept, strict=True))


# ---------------------------------------------------------------------------------------------- line search


def test_line_search_decreases_the_loss_strictly_and_reaches_the_answer():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo")
    losses = [optimizer.step(problem.closure(optimizer)).item() for _ in range(300)]
    moving = [a for a, b in pairwise(losses) if a != b]
    assert all(a > b for a, b in pairwise(moving))
    values = torch.linalg.eigvalsh(problem.matrix).flip(0)[:3]
    best = float(-(values @ torch.tensor([3.0, 2.0, 1.0]).double()) - 2)
    assert losses[-1] == pytest.approx(best, abs=1e-8)


def test_every_accepted_step_obeys_armijo_along_the_curve():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(lr=0.3), 0.7, line_search="armijo", sufficient_decrease=0.4)
    closure = problem.closure(optimizer)
    for _ in range(10):
        start = closure().item()
        # The derivative along the curve, from the metric: minus lr times the squared norm of the gradient.
        slope = -0.3 * problem.vector.grad.square().sum()
        for w, manifold in ((problem.frame, Stiefel()), (problem.filter, PSI())):
            slope -= 0.7 * manifold.inner(w, manifold.egrad2rgrad(w, w.grad)).sum()
        optimizer.step(closure)
        search = optimizer.last_search
        assert search.success
        assert search.value == problem.loss().item() == problem.heights[-1]
        assert search.value <= start + 0.4 * search.step * slope.item() + 1e-14
        assert optimizer.last_step == search.step


def test_first_trial_is_one_and_then_the_last_step_enlarged():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), 64.0, line_search="armijo", contraction=0.25)
    optimizer.step(problem.closure(optimizer))
    first = optimizer.last_search
    assert first.step == 0.25 ** (first.evaluations - 1) < 1
    assert len(problem.heights) == 1 + first.evaluations
    optimizer.step(problem.closure(optimizer))
    assert optimizer.last_search.step == first.step / 0.25 * 0.25 ** (optimizer.last_search.evaluations - 1)


def test_search_stops_where_armijo_says_on_a_parabola():
    """Along -t lr g on |w|^2 / 2 the condition is t lr <= 2 (1 - c1)."""
    w = nn.Parameter(random(5))
    optimizer = RiemannianGD([w], 0.1, line_search="armijo", sufficient_decrease=0.45)
    steps = []

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        steps.append(optimizer.last_step)
    assert steps == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_learning_rates_are_the_proportions_of_the_groups():
    moves = []
    for rate in (0.01, 0.1):
        problem = Problem()
        optimizer = RiemannianGD(problem.groups(lr=rate), 0.01, line_search="armijo")
        before = problem.vector.detach().clone()
        optimizer.step(problem.closure(optimizer))
        assert optimizer.last_search.evaluations == 1
        moves.append(problem.vector.detach() - before)
    torch.testing.assert_close(moves[1], 10 * moves[0])


def test_closures_may_zero_gradients_in_place():
    finals = []
    for to_none in (True, False):
        problem = Problem()
        optimizer = RiemannianGD(problem.groups(lr=8.0), 8.0, line_search="armijo")
        closure = problem.closure(optimizer)
        optimizer.zero_grad = functools.partial(optimizer.zero_grad, set_to_none=to_none)
        for _ in range(3):
            optimizer.step(closure)
        assert len(problem.heights) > 6  # some trial failed, after which the gradient at the start was used again
        finals.append(problem.weights)
    assert all(map(torch.equal, *finals))


def test_returned_loss_is_that_of_the_start():
    problem = Problem()
    expected = problem.loss().item()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo")
    assert optimizer.step(problem.closure(optimizer)).item() == expected
    assert problem.loss().item() < expected


def test_random_numbers_are_left_alone_and_closures_may_run_under_no_grad():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo")
    state = torch.get_rng_state()
    with torch.no_grad():
        optimizer.step(problem.closure(optimizer))
    assert optimizer.last_search.success
    assert torch.equal(torch.get_rng_state(), state)


def test_values_that_are_not_finite_are_stepped_around():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = RiemannianGD([w], 4.0, line_search="armijo")

    def closure():
        optimizer.zero_grad()
        loss = w - w.log()  # NaN for w < 0, least at 1
        loss.sum().backward()
        return loss.sum()

    with torch.no_grad():
        w.fill_(2.0)
    for _ in range(30):
        optimizer.step(closure)
    assert abs(w.item() - 1) < 1e-7


# ------------------------------------------------------------------------------------------------- failures


def failing(problem, optimizer, grad_factor, steps=1):
    """Steps with gradients multiplied by a factor; whether all weights stayed what they were to the bit."""
    closure = problem.closure(optimizer)

    def wrong():
        loss = closure()
        for w in problem.weights:
            w.grad.mul_(grad_factor)
        return loss

    before = copy.deepcopy(problem.weights)
    for _ in range(steps):
        optimizer.step(wrong)
    return all(map(torch.equal, problem.weights, before))


@pytest.mark.parametrize(("factor", "evaluations"), [(-1.0, 25), (0.0, 0), (math.nan, 0)])
def test_search_without_success_leaves_weights_and_says_so(factor, evaluations):
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo")
    optimizer.step(problem.closure(optimizer))
    step = optimizer.last_step
    assert failing(problem, optimizer, factor)
    assert not optimizer.last_search.success
    assert optimizer.last_search.evaluations == evaluations
    assert optimizer.last_step == step
    optimizer.step(problem.closure(optimizer))
    assert optimizer.last_search.success


def test_loss_that_is_nan_at_the_start_moves_nothing():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo")
    before = copy.deepcopy(problem.weights)
    closure = problem.closure(optimizer)
    assert optimizer.step(lambda: closure() * math.nan).isnan()
    assert all(map(torch.equal, problem.weights, before))
    assert not optimizer.last_search.success


def test_closure_that_raises_at_a_trial_leaves_weights_where_they_were():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo")
    before = copy.deepcopy(problem.weights)
    closure = problem.closure(optimizer)

    def interrupted():
        if problem.heights:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert all(map(torch.equal, problem.weights, before))
    assert optimizer.last_search is None


# ---------------------------------------------------------------------------------------------------- state


def test_state_dict_continues_to_the_bit():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo")
    for _ in range(3):
        optimizer.step(problem.closure(optimizer))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(problem)
    resumed = RiemannianGD(other.groups(), line_search="armijo")
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.last_step == optimizer.last_step
    for _ in range(3):
        optimizer.step(problem.closure(optimizer))
        resumed.step(other.closure(resumed))
    assert all(map(torch.equal, problem.weights, other.weights))


def test_deepcopy_keeps_options_and_step():
    problem = Problem()
    optimizer = RiemannianGD(problem.groups(), line_search="armijo", max_evaluations=9)
    optimizer.step(problem.closure(optimizer))
    other, copied = copy.deepcopy((problem, optimizer))
    assert copied.last_step == optimizer.last_step
    assert copied.last_search is None
    optimizer.step(problem.closure(optimizer))
    copied.step(other.closure(copied))
    assert all(map(torch.equal, problem.weights, other.weights))


# ----------------------------------------------------------------------------------------------- bad inputs


def test_line_search_without_closure_is_refused():
    optimizer = RiemannianGD([nn.Parameter(random(3))], line_search="armijo")
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()


@pytest.mark.parametrize(
    "option",
    [
        {"line_search": "wolfe"},
        {"sufficient_decrease": 0.0},
        {"contraction": 1.0},
        {"contraction": math.nan},
        {"max_evaluations": 0},
        {"lr": math.nan},
        {"lr": -1.0},
        {"euclidean_lr": -1.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        RiemannianGD([nn.Parameter(random(3))], **option)


def test_line_search_options_are_common_to_all_groups():
    groups = [
        {"params": [nn.Parameter(random(3))]},
        {"params": [nn.Parameter(random(3))], "contraction": 0.9},
    ]
    with pytest.raises(ValueError, match=r"contraction is one for all param groups, got 0\.9 after 0\.5"):
        RiemannianGD(groups, line_search="armijo")


def test_weights_off_their_manifold_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="not a point of Oblique"):
        RiemannianGD([{"params": [nn.Parameter(random(3, 4))], "manifold": Oblique()}])
    w = nn.Parameter(random(3, 4))
    w.grad = random(3, 4).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        RiemannianGD([w]).step()
    with pytest.raises(ValueError, match="empty"):
        RiemannianGD([])


def test_weights_without_gradient_stay():
    problem = Problem()
    unused = nn.Parameter(random(3))
    optimizer = RiemannianGD([*problem.groups(), {"params": [unused]}], line_search="armijo")
    optimizer.step(problem.closure(optimizer))
    assert torch.equal(unused, random(3))
