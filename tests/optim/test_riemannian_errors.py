"""What RiemannianSGD refuses, ignores or warns of: options, weights, gradients."""

import warnings

import geoopt
import pytest
import torch
from torch import nn

from retract.manifolds import PSI, Oblique, Stiefel
from retract.optim import RiemannianSGD
from tests.optim.riemannian_points import point, random


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": float("nan")}, "lr"),
        ({"lr": -0.1}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        ({"foreach": True, "fused": True}, "fused"),
        ({"euclidean_lr": -1.0}, "euclidean_lr"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        RiemannianSGD([nn.Parameter(random(3))], **options)


@pytest.mark.parametrize(
    ("weight", "manifold", "error", "message"),
    [
        (random(6), Stiefel(), ValueError, "two or more dimensions"),
        (random(6, 4), Stiefel(), ValueError, "not a point of Stiefel"),
        (2 * torch.eye(3), Oblique(), ValueError, "not a point of Oblique"),
        (torch.zeros(3, 4), PSI(), ValueError, "scale groups"),
        (random(6, 4), PSI(dim=3), ValueError, "dimension 3"),
        (torch.eye(4, dtype=torch.complex128), Stiefel(), TypeError, "complex128"),
        (random(3, 4), geoopt.Stiefel(), ValueError, "does not fit"),
    ],
    ids=["vector", "off Stiefel", "off Oblique", "zero filter", "dim", "complex", "wide geoopt"],
)
def test_weights_that_are_no_points_are_refused_by_name(weight, manifold, error, message):
    group = {"params": [("conv.weight", nn.Parameter(weight))], "manifold": manifold}
    with pytest.raises(error, match=message) as caught:
        RiemannianSGD([group])
    assert "conv.weight" in str(caught.value)


def test_empty_parameter_list_is_refused():
    with pytest.raises(ValueError, match="empty"):
        RiemannianSGD([])


def test_sparse_gradient_on_a_manifold_is_refused_by_name():
    w = point(Oblique(), 3, 4)
    optimizer = RiemannianSGD([{"params": [("table", w)], "manifold": Oblique()}])
    w.grad = random(3, 4).to_sparse()
    with pytest.raises(TypeError, match="'table' has a sparse gradient"):
        optimizer.step()


def test_missing_gradients_leave_weights_and_state_alone():
    w, v = point(Stiefel(), 6, 4), point(Stiefel(), 6, 4, seed=1)
    optimizer = RiemannianSGD([{"params": [w, v], "manifold": Stiefel()}], 0.1, momentum=0.9)
    v.grad = random(6, 4)
    kept = w.detach().clone()
    optimizer.step()
    assert torch.equal(w, kept)
    assert w not in optimizer.state


def test_nan_gradient_makes_its_weight_nan_and_no_other():
    w, v = point(PSI(), 3, 4), point(PSI(), 3, 4)
    optimizer = RiemannianSGD([{"params": [w, v], "manifold": PSI()}], 0.1)
    w.grad, v.grad = torch.full((3, 4), torch.nan).double(), random(3, 4)
    optimizer.step()
    assert w.isnan().all()
    assert v.isfinite().all()


def test_weight_decay_warns_once_for_a_manifold_and_decays_the_rest():
    w, v = point(Stiefel(), 6, 4), nn.Parameter(random(3))
    groups = [{"params": [w], "manifold": Stiefel()}, {"params": [v]}]
    with pytest.warns(UserWarning, match="weight_decay") as caught:
        optimizer = RiemannianSGD(groups, 0.1, weight_decay=0.5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    kept, expected = w.detach().clone(), v.detach() * 0.95
    w.grad, v.grad = torch.zeros_like(w), torch.zeros_like(v)
    optimizer.step()
    torch.testing.assert_close(w, kept, rtol=0, atol=1e-15)
    torch.testing.assert_close(v, expected, rtol=1e-15, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RiemannianSGD([{**groups[0], "weight_decay": 0}, groups[1]], 0.1, weight_decay=0.5)
