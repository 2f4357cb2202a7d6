"""PSISGD against the paper: equivariance, transports, geoopt, the published iteration (docs/checks.md)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSISGD, PSIAdam, PSIAngular
from retract.optim.psi import TRANSPORTS
from tests.networks import directions, invariant_net, rescale

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

FAMILY: dict[str, Make] = {
    "plain": lambda groups: PSISGD(groups, lr=1.0, euclidean_lr=0.1),
    **{t: lambda groups, t=t: PSISGD(groups, lr=0.1, momentum=0.9, transport=t) for t in TRANSPORTS},
    "foreach": lambda groups: PSISGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "single": lambda groups: PSISGD(groups, lr=0.1, momentum=0.9, foreach=False),
    "fused": lambda groups: PSISGD(groups, lr=0.1, momentum=0.9, fused=True),
    "nesterov": lambda groups: PSISGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "dampened": lambda groups: PSISGD(groups, lr=0.1, momentum=0.9, dampening=0.5),
    "angular": lambda groups: PSIAngular(groups, lr=0.005, euclidean_lr=0.1),
    "angular foreach": lambda groups: PSIAngular(groups, lr=0.005, euclidean_lr=0.1, foreach=True),
    "adam": lambda groups: PSIAdam(groups, lr=0.05, euclidean_lr=0.1, eps=0),
    "adam foreach": lambda groups: PSIAdam(groups, lr=0.05, euclidean_lr=0.1, eps=0, foreach=True),
}
family = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)


def train(
    make: Make, dtype: torch.dtype, steps: int = 100, *, span: float = 0, powers_of_two: bool = False
) -> tuple[Tensor, Tensor, nn.Sequential]:
    """Losses, directions at the end, and the network, after training from (rescaled) initial weights."""
    model, groups, batch, target = invariant_net(dtype)
    if span:
        rescale(model, 1, span, powers_of_two=powers_of_two)
    optimizer, losses = make(groups), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), directions(model), model


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


def gradients(weight: Tensor, step: int) -> Tensor:
    """A gradient field that is scale-invariant: at |w| = 1 a fixed tangent field, elsewhere 1/|w| of it."""
    generator = torch.Generator().manual_seed(step)
    target = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    unit = weight / weight.norm(dim=1, keepdim=True)
    return (target - (target * unit).sum(1, keepdim=True) * unit) / weight.norm(dim=1, keepdim=True)


def start(rows: int = 6, columns: int = 9) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def run(steps: int, lr: float = 0.1, **options: Any) -> tuple[Tensor, PSISGD, Tensor]:
    w = nn.Parameter(start())
    optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=lr, **options)
    for step in range(steps):
        w.grad = gradients(w.detach(), step)
        optimizer.step()
    return w.detach(), optimizer, start()


def published(steps: int, lr: float, rho: float, transport: str = "paper") -> Tensor:
    """Algorithm 1, free norms, with each transport."""
    w, u = start(), torch.zeros(6, 9, dtype=torch.float64)
    for step in range(steps):
        r2 = (w * w).sum(1, keepdim=True)
        u = rho * u - lr * r2 * gradients(w, step)
        new = w + u
        vn, v = new / new.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
        if transport in ("horizontal", "projection"):
            u = u - (u * vn).sum(1, keepdim=True) * vn
        if transport == "projection":
            u = u * new.norm(dim=1, keepdim=True) / w.norm(dim=1, keepdim=True)
        if transport == "parallel":
            q = u / w.norm(dim=1, keepdim=True)
            q = q - (q * vn).sum(1, keepdim=True) / (1 + (v * vn).sum(1, keepdim=True)) * (v + vn)
            u = q * new.norm(dim=1, keepdim=True)
        w = new
    return w


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


# ---------------------------------------------------------------------------------------------- implementations


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    scale=st.integers(-8, 8),
    nesterov=st.booleans(),
    dampening=st.sampled_from([0.0, 0.4]),
    transport=st.sampled_from(TRANSPORTS),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_single_multi_and_fused_agree(
    rows: int, columns: int, scale: int, nesterov: bool, dampening: float, transport: str, maximize: bool, seed: int
) -> None:
    options = {
        "lr": 0.2,
        "momentum": 0.9,
        "nesterov": nesterov,
        "dampening": 0 if nesterov else dampening,
        "transport": transport,
        "maximize": maximize,
    }

    def train(**kind: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Tensor:
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

        weights = [nn.Parameter(draw() * 10.0**scale) for _ in range(3)]
        optimizer = PSISGD([{"params": weights, "manifold": PSI()}], **options, **kind)  # type: ignore[arg-type]
        for _ in range(4):
            for w in weights:
                w.grad = draw() * 10.0**-scale
            optimizer.step()
        return torch.stack([w.detach() for w in weights]) * 10.0**-scale

    single = train(foreach=False)
    torch.testing.assert_close(train(foreach=True), single, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(train(fused=True), single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", [PSISGD, PSIAngular, PSIAdam])
def test_blocks_cover_large_weights_and_stacks_small_ones(
    optimizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into blocks of three rows, stacked in pairs, or whole: the same step."""
    shapes = [(16, 10), (4, 10), (4, 10), (5, 10), (6, 7)]

    def train(foreach: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        options = {"momentum": 0.9} if optimizer is PSISGD else {}
        run = optimizer([{"params": weights, "manifold": PSI()}], lr=0.1, foreach=foreach, **options)
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            run.step()
        return [w.detach() for w in weights]

    whole = train(False)
    monkeypatch.setattr("retract.optim._scale._CUT_ENTRIES", 30)
    monkeypatch.setattr("retract.optim._scale._STACK_ENTRIES", {"cpu": 90})
    for foreach in (True, False):
        for a, b in zip(train(foreach), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [PSISGD, PSIAngular, PSIAdam])
def test_kernel_shares_out_every_row_of_large_weights(optimizer: Callable[..., Any]) -> None:
    """Its threads take some 65,000 entries at a time: many rows, one row, or part of the weights each."""
    shapes = [(1500, 64), (5, 20000), (70000, 1), (5, 7)]

    def train(**kind: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        options = {"momentum": 0.9} if optimizer is PSISGD else {}
        run = optimizer([{"params": weights, "manifold": PSI()}], lr=0.1, **options, **kind)
        for _ in range(2):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            run.step()
        return [w.detach() for w in weights]

    for a, b in zip(train(fused=True), train(foreach=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}], ids=str)
def test_memory_layout_does_not_matter(layout: str, kind: dict[str, bool]) -> None:
    def train(arrange: Callable[[Tensor], Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(arrange(torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64)))
        optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9, **kind)  # type: ignore[arg-type]
        for _ in range(4):
            w.grad = arrange(torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64))
            optimizer.step()
        return w.detach()

    def channels_last(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last)

    def transposed(x: Tensor) -> Tensor:
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    arrange = channels_last if layout == "channels_last" else transposed
    assert not arrange(torch.zeros(6, 4, 3, 3)).is_contiguous()
    torch.testing.assert_close(train(arrange), train(lambda x: x), rtol=1e-12, atol=1e-12)


def test_float32_stays_with_float64_for_ten_steps() -> None:
    """Check 19, first half; beyond some thirty steps float32 runs part ways by chaos."""
    wide, narrow = (train(FAMILY["parallel"], dtype, 10)[1] for dtype in (torch.float64, torch.float32))
    assert (wide - narrow).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("optimizer", [PSISGD, PSIAngular, PSIAdam])
def test_half_precision_weights_are_stepped_in_float32(
    dtype: torch.dtype, scale: float, optimizer: Callable[..., Any]
) -> None:
    """Check 19, second half: |w|^2 overflows float16 beyond 255 and underflows at 1e-4."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter((torch.randn(4, 16, generator=generator) * scale / 4).to(dtype))
    before = w.detach().float()
    run = (
        optimizer([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9)
        if optimizer is PSISGD
        else optimizer([{"params": [w], "manifold": PSI()}], lr=0.1)
    )
    for _ in range(3):
        w.grad = (torch.randn(4, 16, generator=generator) / scale).to(dtype)
        run.step()
    after = w.detach().float()
    assert after.isfinite().all()
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=2e-2, atol=0)
    assert PSI().angles(before, after).min() > 0.05


def test_no_step_allocates_a_temporary_of_model_size() -> None:
    """One buffer a weight is what the optimizer keeps; while it steps, blocks are all that it holds beside."""
    shape = (512, 512, 3, 3)  # 9.4 MB: three blocks
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    for w in weights:
        w.grad = torch.randn(shape)
    for kind in ({"fused": True}, {"foreach": True}):
        optimizer = PSISGD([{"params": weights, "manifold": PSI()}], lr=0.1, momentum=0.9, **kind)  # type: ignore[arg-type]
        optimizer.step()
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
            optimizer.step()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert largest <= 4 * 2**20 + 2**16
        kept = sum(t.numel() for state in optimizer.state.values() for t in state.values())
        assert kept == sum(w.numel() + 512 for w in weights)


# ----------------------------------------------------------------------------------------- as a torch optimizer


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": wd, "maximize": mx}
        for m, d, n, wd, mx in itertools.product((0, 0.9), (0, 0.3), (False, True), (0, 0.01), (False, True))
        if not (n and (m == 0 or d))
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_other_parameters_are_torchs_sgd_bit_for_bit(options: dict[str, Any], kind: dict[str, bool]) -> None:
    """Check 16, second half: every option, over ten steps, in the groups without a manifold."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values, grads = [draw(5, 3), draw(7)], [[draw(5, 3), draw(7)] for _ in range(10)]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    psi = nn.Parameter(draw(4, 4))
    groups = [{"params": [psi], "manifold": PSI(), "weight_decay": 0}, {"params": ours}]
    pair = (PSISGD(groups, lr=0.1, **options, **kind), torch.optim.SGD(theirs, lr=0.1, **options, **kind))
    for step in grads:
        psi.grad = draw(4, 4)
        for parameters, optimizer in zip((ours, theirs), pair, strict=True):
            for p, g in zip(parameters, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_every_scale_invariant_weight_moves() -> None:
    """Check 16, first half."""
    _, groups, *_ = invariant_net()
    _, _, model = train(FAMILY["parallel"], torch.float64, 1)
    for group in groups[:2]:
        for name, start in group["params"]:
            assert group["manifold"].angles(start, model.get_parameter(name)).min() > 0


def test_a_zero_filter_stays_zero_and_small_ones_turn() -> None:
    """Check 18: a pruned filter is not on the manifold; one entry has nowhere to turn."""
    for make in (
        lambda g: PSISGD(g, lr=0.5, momentum=0.9, fused=True),
        lambda g: PSISGD(g, lr=0.5, momentum=0.9, foreach=True),
        lambda g: PSISGD(g, lr=0.5, momentum=0.9, transport="paper", foreach=True),
        lambda g: PSIAngular(g, lr=0.1, fused=True),
        lambda g: PSIAngular(g, lr=0.1, foreach=True),
        lambda g: PSIAdam(g, lr=0.1, fused=True),
        lambda g: PSIAdam(g, lr=0.1, foreach=True),
    ):
        w = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        single = nn.Parameter(torch.randn(4, 1, dtype=torch.float64))
        unused = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        with torch.no_grad():
            w[1] = 0
        value = single.detach().clone()
        optimizer = make([{"params": [w, single, unused], "manifold": PSI()}])
        for _ in range(5):
            w.grad = torch.randn(4, 5, dtype=torch.float64)
            single.grad = torch.zeros(4, 1, dtype=torch.float64)
            optimizer.step()
        assert torch.equal(w[1], torch.zeros(5, dtype=torch.float64))
        assert w.isfinite().all()
        torch.testing.assert_close(single.detach(), value, rtol=1e-14, atol=0)
        assert unused not in optimizer.state


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_norms(scale: float) -> None:
    """float32 weights far off unit norm: the step is computed from ratios, and turns as at unit norm."""

    def angle(factor: float, **kind: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter((torch.randn(3, 8, generator=generator, dtype=torch.float64) * factor).double())
        before = w.detach().clone()
        optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9, **kind)  # type: ignore[arg-type]
        for _ in range(3):
            w.grad = torch.randn(3, 8, generator=generator, dtype=torch.float64) / factor
            optimizer.step()
        return PSI().angles(before, w.detach())

    for kind in ({"fused": True}, {"foreach": True}):
        torch.testing.assert_close(angle(scale, **kind), angle(1.0, **kind), rtol=1e-9, atol=0)


def test_large_steps_stay_accurate() -> None:
    """Angles near a right one: norms hold and nothing is lost to cancellation."""
    w, _, w0 = run(30, 50.0, momentum=0.9)
    assert (w.norm(dim=1) / w0.norm(dim=1) - 1).abs().max() < 1e-13
    reference = published(30, 50.0, 0.9, "parallel")
    assert math.isfinite(float(reference.norm()))
    assert (w / w.norm(dim=1, keepdim=True)).isfinite().all()
