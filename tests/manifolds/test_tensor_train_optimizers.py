"""Optimizers on STTP: convergence, saved states, a matrix of a million rows."""

import io
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retract.manifolds.spectrum import Bounded, Lipschitz
from retract.manifolds.tensor_train import STTP, prime_modes
from retract.optim import RiemannianGD, RiemannianSGD
from tests.manifolds.tensor_trains import ambient, draw, matrix, parameters


@pytest.mark.parametrize("spectrum", ["free", "identity", Lipschitz(2.0), Bounded(0.2, 2.0)])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_finds_a_matrix_of_the_manifold(spectrum, momentum):
    manifold = STTP(((2, 3, 2), (2, 2, 3)), 3, spectrum)
    target = manifold.embed(draw(manifold, 1))
    x = parameters(manifold.project(target + 0.02 * matrix(manifold, 2)))
    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.5, momentum=momentum)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (manifold.embed(tuple(x)) - target).square().sum() / 2
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) <= 1e-16
    assert manifold.check_point_on_manifold(tuple(x), atol=1e-12, explain=True) == (True, None)


def test_gradient_descent_with_a_line_search():
    manifold = STTP(((2, 3, 2), (2, 2, 3)), 3)
    target = matrix(manifold, 1)
    x = parameters(manifold.origin(dtype=torch.float64))
    optimizer = RiemannianGD([{"params": x, "manifold": manifold}], line_search="armijo")

    def closure():
        optimizer.zero_grad()
        loss = (manifold.embed(tuple(x)) - target).square().sum() / 2
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(100)]
    assert all(b <= a for a, b in pairwise(losses))
    closure()
    gradient = manifold.egrad2rgrad(tuple(t.detach() for t in x), tuple(t.grad for t in x))
    assert manifold.norm(tuple(t.detach() for t in x), gradient) <= 1e-2 * losses[0]
    best = (manifold.embed(manifold.project(target)) - target).square().sum() / 2
    assert losses[-1] <= 1.5 * float(best)


def test_state_dicts_round_trip():
    manifold = STTP(((2, 3), (2, 2, 2)), 3, Lipschitz(2.0))
    target = matrix(manifold, 0)

    def train(x, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (manifold.embed(tuple(x)) - target).square().sum().backward()
            optimizer.step()

    x = parameters(draw(manifold))
    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.01, momentum=0.9)
    train(x, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = parameters([t.detach() for t in x])
    resumed = RiemannianSGD([{"params": twin, "manifold": STTP(**manifold.arguments)}], lr=0.5, momentum=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(x, optimizer, 3)
    train(twin, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(x, twin, strict=True))
    other = RiemannianSGD([{"params": twin, "manifold": STTP(((2, 3), (2, 2, 2)), 3)}], lr=0.5)
    with pytest.raises(ValueError, match="was saved on manifold"):
        other.load_state_dict(optimizer.state_dict())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


def test_a_matrix_of_a_million_rows_and_columns_takes_steps():
    """Rank 4: nothing larger than a core's neighbourhood is made, neither the matrix nor its frames."""
    manifold = STTP((prime_modes(2**20), prime_modes(2**20)), 4)
    goal = draw(manifold)
    away = manifold.proju(goal, ambient(manifold, 1))
    away = tuple(0.3 / manifold.norm(goal, away) * t for t in away)
    x = parameters(manifold.retr(goal, away))

    def overlap(a, b):
        """``<A, B>`` of two trains, from the outside to the middle."""
        ends = []
        for side in (slice(0, 20), slice(21, 41)):
            seen = torch.ones(1, 1, dtype=torch.float64)
            for p, q in zip(a[side], b[side], strict=True):
                seen = p.mT @ (seen @ q.view(len(seen), -1)).view(-1, q.shape[1])
            ends.append(seen)
        return ((a[20].unsqueeze(1) * ends[0] * b[20]) * ends[1]).sum()

    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.5, momentum=0.1)
    losses = []
    with Largest() as seen:
        for _ in range(5):
            optimizer.zero_grad()
            loss = (overlap(x, x) - 2 * overlap(x, goal) + overlap(goal, goal)) / 2
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert seen.elements <= 128
    assert losses[0] > 0.03
    assert all(b < 0.5 * a for a, b in pairwise(losses))
    assert manifold.check_point_on_manifold(tuple(x), atol=1e-12, explain=True) == (True, None)
