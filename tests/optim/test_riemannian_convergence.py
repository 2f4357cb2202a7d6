"""RiemannianSGD finds known answers: eigenvectors, principal components, a polar factor."""

import geoopt
import pytest
import torch
from torch import Tensor

from retract.manifolds import PSI, Oblique, Stiefel
from tests.optim.riemannian_points import minimize, point, random


def spectrum(n: int) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with eigenvalues n, ..., 1 and its eigenvectors in that order."""
    vectors = torch.linalg.qr(random(n, n, seed=7))[0]
    return vectors @ torch.diag(torch.arange(n, 0, -1.0).double()) @ vectors.T, vectors


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"momentum": 0.8, "nesterov": True}], ids=str)
@pytest.mark.parametrize("manifold", [Oblique(), geoopt.Sphere(), PSI()], ids=str)
def test_rayleigh_quotient_finds_the_leading_eigenvector(manifold, options):
    matrix, vectors = spectrum(8)
    x = point(manifold, 1, 8)

    def loss():
        return -(x @ matrix @ x.T).sum() / x.square().sum()

    minimize(loss, [{"params": [x], "manifold": manifold}], 300, lr=0.05, **options)
    assert 1 - (x / x.norm() @ vectors[:, 0]).abs() < 1e-12


@pytest.mark.parametrize("manifold", [Stiefel(), Stiefel("cayley"), geoopt.Stiefel()], ids=str)
def test_brockett_cost_finds_principal_components(manifold):
    matrix, vectors = spectrum(8)
    x = point(manifold, 8, 3)
    weights = torch.tensor([3.0, 2.0, 1.0]).double()
    optimum = [{"params": [x], "manifold": manifold}]
    minimize(lambda: -((x.T @ matrix @ x).diagonal() @ weights), optimum, 600, lr=0.02, momentum=0.7)
    assert ((x.T @ vectors[:, :3]).abs() - torch.eye(3)).abs().max() < 1e-8


def test_procrustes_finds_the_polar_factor():
    target = random(9, 4, seed=3)
    left, _, right = torch.linalg.svd(target, full_matrices=False)
    x = point(Stiefel(), 9, 4)
    minimize(
        lambda: (x - target).square().sum() / 2,
        [{"params": [x], "manifold": Stiefel()}],
        300,
        lr=0.2,
        momentum=0.5,
    )
    assert (x - left @ right).abs().max() < 1e-10
