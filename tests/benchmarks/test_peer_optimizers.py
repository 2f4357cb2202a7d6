"""Peers of the convergence benchmark: each against its formulas, and saved and restored in mid-run."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retract.benchmarks.peer_optimizers import SGDG, GreatCircles, MuonAdamW, UnitNormSGD
from retract.manifolds import PSI
from retract.nets.cnn import digitsnet

MAKES = {
    "muon": lambda groups: MuonAdamW(groups, lr=0.02, euclidean_lr=3e-3, weight_decay=0.1),
    "unit norm": lambda groups: UnitNormSGD(groups, lr=0.1, momentum=0.9),
    "SGD-G": lambda groups: SGDG(groups, lr=0.2, momentum=0.9),
}


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def given_gradient(weight, seed=1):
    return torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(16, 1, 8, 8, generator=generator)), torch.arange(16) % 10).backward()
    optimizer.step()


# --------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_a_restored_run_goes_on_to_the_bit(make):
    torch.manual_seed(0)
    model = digitsnet()
    optimizer = make(model.manifold_groups())
    for seed in range(3):
        step(model, optimizer, seed)
    again = copy.deepcopy(model)
    other = make(again.manifold_groups())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, other, seed)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_schedules_reach_all_weights(make):
    """At a learning rate of zero nothing moves, be it Muon's or AdamW's."""
    torch.manual_seed(0)
    model = digitsnet()
    optimizer = make(model.manifold_groups())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    step(model, optimizer, 0)
    schedule.step()
    before = copy.deepcopy(model)
    step(model, optimizer, 1)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-7)


# -------------------------------------------------------------------------------------------------------- Muon


def test_muon_steps_convolutions_as_matrices_and_adamw_the_rest(weight):
    bias = nn.Parameter(torch.ones(3, dtype=torch.float64))
    matrix, vector = nn.Parameter(weight.detach().flatten(1).clone()), nn.Parameter(bias.detach().clone())
    ours = MuonAdamW(
        [{"params": [("weight", weight)], "manifold": PSI()}, {"params": [("bias", bias)]}],
        lr=0.1,
        momentum=0.8,
        weight_decay=0.2,
        euclidean_lr=0.01,
    )
    theirs = [
        torch.optim.Muon([matrix], lr=0.1, momentum=0.8, weight_decay=0.2),
        torch.optim.AdamW([vector], lr=0.01, weight_decay=0.2),
    ]
    for seed in range(3):
        weight.grad, bias.grad = given_gradient(weight, seed), given_gradient(bias, seed)
        matrix.grad, vector.grad = weight.grad.flatten(1), bias.grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
        assert torch.equal(weight.flatten(1), matrix)
        assert torch.equal(bias, vector)


def test_muon_takes_gradients_of_any_layout(weight):
    """Convolutions on images with channels last give gradients with channels last."""
    other = nn.Parameter(weight.detach().clone())
    gradient = given_gradient(weight)
    weight.grad, other.grad = gradient, gradient.contiguous(memory_format=torch.channels_last)
    for parameter in (weight, other):
        MuonAdamW([{"params": [parameter], "manifold": PSI()}, {"params": [nn.Parameter(torch.ones(1))]}]).step()
    assert torch.equal(weight, other)


# --------------------------------------------------------------------------------------------------- unit norm


def test_unit_norm_is_sgd_then_normalisation(weight):
    rows = weight.detach().flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    optimizer = UnitNormSGD([{"params": [weight], "manifold": PSI()}], lr=0.3, momentum=0.9)
    torch.testing.assert_close(weight.flatten(1), rows)
    momentum = torch.zeros_like(rows)
    for seed in range(3):
        weight.grad = given_gradient(weight, seed)
        momentum = 0.9 * momentum + weight.grad.flatten(1)
        rows = rows - 0.3 * momentum
        rows = rows / rows.norm(dim=1, keepdim=True)
        optimizer.step()
        torch.testing.assert_close(weight.detach().flatten(1), rows, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- SGD-G


def test_great_circles_retract_by_the_exponential_map():
    manifold = GreatCircles()
    point = manifold.projx(torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    vector = manifold.proju(point, given_gradient(point))
    turned = manifold.retr(point, vector)
    torch.testing.assert_close(
        manifold.angles(point, turned), vector.norm(dim=1, keepdim=True).reshape_as(manifold.angles(point, turned))
    )


def test_sgdg_turns_each_filter_along_a_great_circle_by_its_clipped_gradient(weight):
    optimizer = SGDG([{"params": [weight], "manifold": PSI()}], lr=0.5, clip=0.1, omega=0.0)
    before = weight.detach().flatten(1).clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(4, dtype=torch.float64))
    weight.grad = given_gradient(weight)
    weight.grad[0] *= 1e-3  # below the clip
    gradient = weight.grad.flatten(1)
    tangent = gradient - (gradient * before).sum(1, keepdim=True) * before
    optimizer.step()
    angles = torch.arccos((before * weight.detach().flatten(1)).sum(1))
    lengths = tangent.norm(dim=1).clamp(max=0.1)
    assert lengths[0] < 0.1 and bool((lengths[1:] == 0.1).all())
    torch.testing.assert_close(angles, 0.5 * lengths, rtol=1e-6, atol=1e-9)
    expected = torch.cos(angles)[:, None] * before - torch.sin(angles)[:, None] * tangent / tangent.norm(
        dim=1, keepdim=True
    )
    torch.testing.assert_close(weight.detach().flatten(1), expected, rtol=1e-6, atol=1e-9)


def test_sgdg_descends_the_orthogonality_penalty(weight):
    """Without a gradient of the loss, a step is along the gradient of omega / 2 |Y Y' - I|^2."""
    optimizer = SGDG([{"params": [weight], "manifold": PSI()}], lr=0.01, clip=math.inf, omega=0.3)
    rows = weight.detach().flatten(1).clone().requires_grad_()
    penalty = 0.15 * (rows @ rows.T - torch.eye(4, dtype=torch.float64)).square().sum()
    (gradient,) = torch.autograd.grad(penalty, rows)
    manifold = GreatCircles()
    expected = manifold.expmap(rows.detach(), -0.01 * manifold.proju(rows.detach(), gradient))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach().flatten(1), expected, rtol=1e-10, atol=1e-12)
