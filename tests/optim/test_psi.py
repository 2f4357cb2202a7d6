"""PSISGD against the paper: equivariance, transports, geoopt, the published iteration (docs/checks.md)."""

from __future__ import annotations

from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSISGD
from retract.optim.psi import TRANSPORTS
from tests.networks import invariant_net, rescale
from tests.optim.psi_runs import FAMILY, Make, gradients, published, run, start, train

family = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)


@family
def test_equivariant_over_100_steps(make: Make) -> None:
    """Check 4: scales of 10^U(-2, 2) leave losses and directions alone, and stay on the norms."""
    losses, points, model = train(make, torch.float64)
    scaled_losses, scaled_points, scaled = train(make, torch.float64, span=2)
    assert (losses - scaled_losses).abs().max() < 1e-11
    assert (points - scaled_points).abs().max() < 1e-11
    assert losses[-1] < losses[0] - 0.02
    start, *_ = invariant_net(torch.float64)
    factors = rescale(start, 1, 2)
    for name, a in factors.items():
        manifold = PSI(1, conv_groups=2) if "9." in name else PSI()
        ratio = manifold.norms(scaled.get_parameter(name)) / manifold.norms(model.get_parameter(name))
        torch.testing.assert_close(ratio.flatten() / a, torch.ones_like(a), rtol=1e-12, atol=0)


@family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_powers_of_two_change_no_bit(make: Make, dtype: torch.dtype) -> None:
    """Check 5."""
    losses, points, _ = train(make, dtype)
    scaled_losses, scaled_points, _ = train(make, dtype, span=2, powers_of_two=True)
    assert torch.equal(losses, scaled_losses)
    assert torch.equal(points, scaled_points)


def test_sgd_is_not_equivariant() -> None:
    """Check 6, the negative control: rescaling by 12 % at most, and torch's SGD goes elsewhere."""

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for _, p in group["params"]], lr=0.1, momentum=0.9)

    for steps, bound in ((1, 1e-3), (100, 0.1)):
        assert (
            train(sgd, torch.float64, steps)[1] - train(sgd, torch.float64, steps, span=0.05)[1]
        ).abs().max() > bound


def test_gradients_are_horizontal_and_scale_inversely() -> None:
    """Checks 1 and 2, on the network that the other checks use."""
    model, groups, batch, target = invariant_net(torch.float64)
    scaled, *_ = invariant_net(torch.float64)
    factors = rescale(scaled, 1, 2)
    for net in (model, scaled):
        nn.functional.cross_entropy(net(batch), target).backward()
    for group in groups[:2]:
        for name, w in group["params"]:
            manifold = group["manifold"]
            cosine = manifold._dot(w, w.grad) / manifold.norms(w) / manifold.norms(w.grad)
            assert cosine.abs().max() < 1e-12
            back = manifold.act(scaled.get_parameter(name).grad, factors[name])
            assert (back - w.grad).abs().max() < 1e-12 * w.grad.abs().max()


# ------------------------------------------------------- against the published iteration, one filter at a time


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_is_the_published_iteration_at_fixed_norm(transport: str, rho: float, kind: dict[str, bool]) -> None:
    """Check 8: directions are those of the free-norm run; norms stay to 1e-14."""
    w, _, w0 = run(100, 0.1, momentum=rho, transport=transport, **kind)
    free = published(100, 0.1, rho, transport)
    assert (w / w.norm(dim=1, keepdim=True) - free / free.norm(dim=1, keepdim=True)).abs().max() < 1e-12
    assert (w.norm(dim=1) / w0.norm(dim=1) - 1).abs().max() < 1e-14
    assert (free.norm(dim=1) / w0.norm(dim=1)).min() > 1.02  # or the comparison of gauges would be void


def test_norms_of_the_published_iteration_follow_lemma_1() -> None:
    """Check 9: r+^2 = r^2 (1 + eta^2 r^2 |grad|^2); the fixed gauge divides by exactly this growth."""
    w0, w1 = start(), published(1, 0.1, 0.0)
    r2 = (w0 * w0).sum(1)
    law = r2 * (1 + 0.01 * r2 * (gradients(w0, 0) ** 2).sum(1))
    torch.testing.assert_close((w1 * w1).sum(1), law, rtol=1e-13, atol=0)


def test_without_momentum_it_is_geoopts_sgd_on_the_sphere() -> None:
    """Check 7, first half."""
    w, *_ = run(100, 0.1)
    assert (w / w.norm(dim=1, keepdim=True) - _geoopt_sphere(0.0)).abs().max() < 1e-13


def test_projection_transport_is_geoopts_momentum() -> None:
    """Check 7, second half, past geoopt's first step (its buffer starts at (1 + rho) times the gradient)."""
    w, *_ = run(100, 0.1, momentum=0.9, transport="projection")
    assert (w / w.norm(dim=1, keepdim=True) - _geoopt_sphere(0.9)).abs().max() < 1e-12


def _geoopt_sphere(momentum: float) -> Tensor:
    unit = start() / start().norm(dim=1, keepdim=True)
    p = geoopt.ManifoldParameter(unit, manifold=geoopt.Sphere())
    optimizer = geoopt.optim.RiemannianSGD([p], lr=0.1, momentum=momentum)
    for step in range(100):
        grad = gradients(p.detach().as_subclass(Tensor), step)
        if step == 0 and momentum:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(grad)
        p.grad = grad
        optimizer.step()
    return p.detach().as_subclass(Tensor)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("transport", ["parallel", "projection", "horizontal"])
def test_momentum_is_tangent_and_parallel_transport_keeps_its_length(transport: str, nesterov: bool) -> None:
    """Check 10: what the buffer is worth at the new weight is tangent; its length is that before the step."""
    w, optimizer, _ = run(5, 0.3, momentum=0.9, transport=transport, nesterov=nesterov)
    state = next(iter(optimizer.state.values()))
    before = state["momentum_buffer"]
    after = PSI().proju(w, before) * state["carry"].unsqueeze(1)
    assert ((after * w).sum(1) / after.norm(dim=1) / w.norm(dim=1)).abs().max() < 1e-14
    if transport == "parallel" and not nesterov:
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-13, atol=0)
    if transport != "parallel":
        assert (after.norm(dim=1) < before.norm(dim=1)).all()


@pytest.mark.parametrize(("nesterov", "dampening"), [(False, 0.0), (True, 0.0), (False, 0.4)])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}], ids=str)
def test_torchs_options_in_the_verbs_of_the_manifold(nesterov: bool, dampening: float, kind: dict[str, bool]) -> None:
    """Nesterov's step is not along the buffer, and the first gradient is not dampened: compare with PSI's verbs."""
    psi, w, b = PSI(), start(), None
    for step in range(20):
        r2, grad = (w * w).sum(1, keepdim=True), gradients(w, step)
        b = grad if b is None else 0.9 * b + (1 - dampening) * grad
        direction = grad + 0.9 * b if nesterov else b
        w, moved = psi.retr_transp(w, -0.1 * r2 * direction, r2 * b)
        b = moved / (w * w).sum(1, keepdim=True)
    ours, *_ = run(20, 0.1, momentum=0.9, nesterov=nesterov, dampening=dampening, **kind)
    torch.testing.assert_close(ours, w, rtol=1e-12, atol=1e-12)


def test_growth_of_the_free_norm_under_tangent_momentum() -> None:
    """Check 10, last part: log r grows by half the squared angle of a step."""
    w0, w1 = published(50, 1e-3, 0.9, "parallel"), published(51, 1e-3, 0.9, "parallel")
    growth = (w1.norm(dim=1) / w0.norm(dim=1)).log()
    ratio = growth / PSI().angles(w0, w1).square()
    assert (ratio - 0.5).abs().max() < 0.01


def test_learning_rate_drop_takes_the_velocity_at_once() -> None:
    """Check 17: torch's form. For constant lr it is the paper's; after a drop the paper's buffer keeps its velocity."""

    def dropped(rho: float) -> Tensor:
        w, u = start(), torch.zeros(6, 9, dtype=torch.float64)
        for step in range(20):
            r = w.norm(dim=1, keepdim=True)
            lr = 0.1 if step < 10 else 0.01
            u = rho * u - lr * r * r * gradients(w, step)
            n = (w + u).norm(dim=1, keepdim=True) / r
            w, u = (w + u) / n, u / n
        return w

    w = nn.Parameter(start())
    optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9, transport="paper")
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 if step < 10 else 0.01
        before = w.detach().clone()
        w.grad = gradients(before, step)
        optimizer.step()
        angle = PSI().angles(before, w.detach()).mean()
        if step == 9:
            old = angle
        if step == 10:
            assert angle < 0.2 * old
    assert (w.detach() - dropped(0.9)).abs().max() > 1e-2


def test_weight_decay_would_only_change_the_step_in_this_gauge() -> None:
    """Check 13: decoupled decay lambda at fixed norm equals the learning rate lr / (1 - lr lambda)."""
    lr, decay, w = 0.1, 0.5, start()
    for step in range(30):
        r = w.norm(dim=1, keepdim=True)
        new = (1 - lr * decay) * w - lr * r * r * gradients(w, step)
        w = new * r / new.norm(dim=1, keepdim=True)
    ours, *_ = run(30, lr / (1 - lr * decay))
    assert (ours - w).abs().max() < 1e-12


def test_renormalising_weight_and_momentum_together_changes_nothing() -> None:
    """Check 11: to rounding, and not a bit with powers of two; with the momentum left behind, much."""

    def train_on(factor: float, *, momentum_too: bool = True) -> Tensor:
        w = nn.Parameter(start())
        optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9)
        for step in range(40):
            w.grad = gradients(w.detach(), step)
            optimizer.step()
            if step % 7 == 0:
                w.data.mul_(factor)
                optimizer.state[w]["momentum_buffer"].div_(factor if momentum_too else 1)
        return w.detach() / w.detach().norm(dim=1, keepdim=True)

    assert torch.equal(train_on(2.0**9), train_on(1.0))
    assert (train_on(3.7) - train_on(1.0)).abs().max() < 1e-12
    assert (train_on(3.7, momentum_too=False) - train_on(1.0)).abs().max() > 0.1


def test_running_statistics_carry_eval_outputs() -> None:
    """Check 12: with running statistics under (a, a^2) eval outputs stay; without they are off."""
    model, _, batch, _ = invariant_net(torch.float64)
    model(batch)
    stale = {name: b.clone() for name, b in model.named_buffers()}
    expected = model.eval()(batch)
    rescale(model, 1, 2)
    assert (model(batch) - expected).abs().max() < 1e-9
    for name, b in model.named_buffers():
        b.copy_(stale[name])
    assert (model(batch) - expected).abs().max() > 0.1
