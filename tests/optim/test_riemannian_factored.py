"""RiemannianSGD on factored points: several weights that are one point."""

import copy

import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import Stiefel
from retract.optim import RiemannianSGD
from tests.optim.riemannian_points import EagerStiefel, StiefelPair, minimize, point, random


def singular_vectors_problem() -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]:
    left, right = (torch.linalg.qr(random(n, n, seed=n))[0] for n in (6, 5))
    matrix = left[:, :5] @ torch.diag(torch.arange(5, 0, -1.0).double()) @ right.T
    u, v = point(Stiefel(), 6, 2, seed=1), point(Stiefel(), 5, 2, seed=2)
    return u, v, matrix, torch.tensor([2.0, 1.0]).double()


def test_factored_point_finds_singular_vectors():
    u, v, matrix, weights = singular_vectors_problem()
    minimize(
        lambda: -((u.T @ matrix @ v).diagonal() @ weights),
        [{"params": [u, v], "manifold": StiefelPair()}],
        400,
        lr=0.05,
        momentum=0.7,
    )
    assert ((u.T @ matrix @ v).abs() - torch.diag(torch.tensor([5.0, 4.0]))).abs().max() < 1e-8


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_factored_point_moves_as_its_factors_would(options):
    pair = [point(Stiefel(), 6, 2), point(Stiefel(), 5, 3)]
    alone = copy.deepcopy(pair)
    stiefel = EagerStiefel("polar")
    joint = RiemannianSGD([{"params": pair, "manifold": StiefelPair()}], 0.1, **options)
    separate = RiemannianSGD([{"params": alone, "manifold": stiefel}], 0.1, **options)
    for step in range(5):
        for w, v in zip(pair, alone, strict=True):
            w.grad = v.grad = random(*w.shape, seed=step)
        joint.step()
        separate.step()
    assert all(map(torch.equal, pair, alone))
    if options:
        assert [tuple(joint.state[w]["momentum_buffer"].shape) for w in pair] == [(6, 2), (5, 3)]


def test_factor_without_gradient_has_gradient_zero():
    pair = [point(Stiefel(), 6, 2), point(Stiefel(), 5, 3)]
    before = copy.deepcopy(pair)
    optimizer = RiemannianSGD([{"params": pair, "manifold": StiefelPair()}], 0.1)
    optimizer.step()
    assert all(map(torch.equal, pair, before))
    pair[0].grad = random(6, 2)
    optimizer.step()
    assert not torch.equal(pair[0], before[0])
    torch.testing.assert_close(pair[1], before[1], rtol=0, atol=1e-15)


def test_factored_point_off_its_manifold_is_refused():
    with pytest.raises(ValueError, match="not a point of"):
        RiemannianSGD([{"params": [point(Stiefel(), 6, 2), nn.Parameter(random(5, 3))], "manifold": StiefelPair()}])
