"""Canonical layers in training: both forms learn, vectors of the oblique form stay unit vectors, no term is idle."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retract.nets import scale_invariant_groups
from retract.nets.parametrizations import canonical_weight_norm, canonical_weights, manifold_groups, put_terms
from retract.optim import PSISGD, RiemannianSGD

SHORT, LONG = 1000, 10_000
ALLOWED = 1e-5


def network(form, *, execution="auto", dtype=torch.float32):
    torch.manual_seed(1)
    options = {"form": form, "execution": execution}
    return nn.Sequential(
        canonical_weight_norm(nn.Conv2d(2, 8, 3, stride=2, dtype=dtype), 10, **options),
        nn.ReLU(),
        nn.Flatten(),
        canonical_weight_norm(nn.Linear(32, 4, dtype=dtype), 4, nonlinearity="linear", **options),
    )


def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))


def train(model, optimizer, steps, look=None):
    """Learn the teacher. Returns the losses."""
    generator, taught, losses = torch.Generator().manual_seed(2), teacher(), []
    for _ in range(steps):
        x = torch.randn(16, 2, 6, 6, generator=generator)
        with torch.no_grad():
            target = 10 * taught(x)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if look is not None:
            look()
    return losses


OPTIMIZERS = {
    "euclidean, SGD": ("euclidean", lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9)),
    "euclidean, Adam": ("euclidean", lambda m: torch.optim.Adam(m.parameters(), lr=0.005)),
    "euclidean, PSISGD": (
        "euclidean",
        lambda m: PSISGD(scale_invariant_groups(m, torch.randn(2, 2, 6, 6)), lr=0.02, momentum=0.9),
    ),
    "oblique, RiemannianSGD": ("oblique", lambda m: RiemannianSGD(manifold_groups(m), lr=0.02, momentum=0.9)),
}


@pytest.mark.parametrize("execution", ["weight", "factored"])
@pytest.mark.parametrize("method", list(OPTIMIZERS))
def test_training_lowers_the_loss(method, execution):
    form, optimizer = OPTIMIZERS[method]
    model = network(form, execution=execution)
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(model, optimizer(model), 100)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    moved = [(p != old).reshape(len(p), -1).any(1) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(vectors.all() for vectors in moved)


def unit_norm_error(model):
    with torch.no_grad():
        return max(
            (rows.double().norm(dim=1) - 1).abs().max().item()
            for _, canonical, originals in canonical_weights(model)
            for rows in (*originals[1:], *canonical.terms(*originals)[1])
        )


@pytest.mark.parametrize("steps", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_vectors_on_the_oblique_manifold_stay_unit_vectors(steps):
    """The target has more terms than the layer: the gradient does not die away."""
    torch.manual_seed(0)
    layer = canonical_weight_norm(nn.Conv2d(4, 6, 3, bias=False), 5, form="oblique")
    target = torch.randn_like(layer.weight)
    before = copy.deepcopy(layer)
    optimizer = RiemannianSGD(manifold_groups(layer), lr=0.02, momentum=0.9)
    worst, losses = 0.0, []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (layer.weight - target * (1 + 0.5 * torch.randn(()))).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            worst = max(worst, unit_norm_error(layer))
    assert worst <= ALLOWED
    assert sum(losses[-50:]) < sum(losses[:50])
    pairs = zip(layer.parameters(), before.parameters(), strict=True)
    assert all((new - old).norm(dim=1).mean() > 0.1 for new, old in pairs if new.ndim == 2)


def test_steps_of_the_two_forms_agree_at_unit_vectors():
    """From unit vectors a Euclidean step is the retraction of the Riemannian one, whatever the size of the mode."""
    euclidean, oblique = (network(form, dtype=torch.float64) for form in ("euclidean", "oblique"))
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    sgd = torch.optim.SGD(euclidean.parameters(), lr=0.01)
    riemannian = RiemannianSGD(manifold_groups(oblique), lr=0.01)
    for model, optimizer in ((euclidean, sgd), (oblique, riemannian)):
        model(x).square().sum().backward()
        optimizer.step()
    for (_, canonical, first), (_, _, second) in zip(*map(canonical_weights, (euclidean, oblique)), strict=True):
        for rows, units in zip(canonical.terms(*first)[1], canonical.terms(*second)[1], strict=True):
            torch.testing.assert_close(rows, units, rtol=0, atol=1e-12)


def test_fewer_terms_train_on_with_a_new_optimizer():
    model = network("oblique")
    train(model, RiemannianSGD(manifold_groups(model), lr=0.02, momentum=0.9), 30)
    canonical, originals = next((c, o) for _, c, o in canonical_weights(model) if c.rank == 10)
    weights, factors = canonical.terms(*originals)
    kept = weights.abs().argsort(descending=True)[:5]
    put_terms(model[0], weights[kept], [rows[kept] for rows in factors])
    optimizer = RiemannianSGD(manifold_groups(model), lr=0.02, momentum=0.9)
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
