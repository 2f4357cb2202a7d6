"""PSISGD, PSIAngular and PSIAdam as torch optimizers: one table of optimizers, one set of tests for all."""

from __future__ import annotations

import copy
import io
import math
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import geoopt
import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI, Stiefel
from retract.optim import PSISGD, PSIAdam, PSIAngular, _fused
from tests.networks import invariant_net


class Member(NamedTuple):
    make: Callable[..., Any]
    options: dict[str, Any]
    bad: list[tuple[dict[str, Any], str]]


COMMON_BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, "lr must be finite and >= 0, got -0.1"),
    ({"lr": math.nan}, "lr must be finite and >= 0, got nan"),
    ({"lr": math.inf}, "lr must be finite"),
    ({"lr": torch.ones(2)}, "lr as a tensor must have one element"),
    ({"euclidean_lr": -1.0}, "euclidean_lr must be finite and >= 0"),
    ({"weight_decay": -1e-4}, "weight_decay must be in"),
    ({"foreach": True, "fused": True}, "exclude each other"),
]
MEMBERS = {
    "PSISGD": Member(
        PSISGD,
        {"lr": 0.1, "momentum": 0.9},
        [
            ({"momentum": -0.1}, "momentum must be in"),
            ({"momentum": math.nan}, "momentum must be in"),
            ({"momentum": 0, "nesterov": True}, "nesterov=True needs momentum > 0"),
            ({"dampening": 0.1, "nesterov": True}, "dampening = 0"),
            ({"transport": "vector"}, "transport must be one of"),
        ],
    ),
    "PSIAngular": Member(
        PSIAngular, {"lr": 0.02}, [({"lr": 1.6}, "lr must be in"), ({"momentum": 1.0}, "momentum must be in")]
    ),
    "PSIAdam": Member(
        PSIAdam,
        {"lr": 0.05},
        [({"betas": (0.9, 1.0)}, r"betas\[1\] must be in"), ({"eps": -1.0}, "eps must be in")],
    ),
}
every = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)


def model_and_groups(
    dtype: torch.dtype = torch.float64,
) -> tuple[nn.Module, list[dict[str, Any]], Callable[[], Tensor]]:
    model, groups, batch, target = invariant_net(dtype)

    def backward() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return model, groups, backward


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("member", "options", "message"),
    [(m, o, text) for m in MEMBERS.values() for o, text in [*COMMON_BAD, *m.bad]],
    ids=str,
)
def test_options_out_of_range_are_named(member: Member, options: dict[str, Any], message: str) -> None:
    w = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=message):
        member.make([{"params": [w], "manifold": PSI()}], **{**member.options, **options})
    if not {"euclidean_lr", "foreach"} & set(options):  # a group's own options are looked at, too
        with pytest.raises(ValueError, match=message):
            member.make([{"params": [w], "manifold": PSI(), **options}], **member.options)


@every
def test_without_a_manifold_it_refuses_and_shows_the_line_to_add(member: Member) -> None:
    with pytest.raises(ValueError, match="register_scale_invariant"):
        member.make(nn.Linear(2, 2).parameters(), **member.options)
    with pytest.raises(ValueError, match="empty parameter list"):
        member.make([], **member.options)
    with pytest.raises(ValueError, match="register_scale_invariant"):
        member.make([{"params": []}], **member.options)
    with pytest.raises(ValueError, match="register_scale_invariant"):
        member.make([{"params": [], "manifold": PSI()}], **member.options)
    both = [{"params": [], "manifold": PSI()}, {"params": [nn.Parameter(torch.ones(2, 2))], "manifold": PSI(1)}]
    member.make(both, **member.options).step()


@every
@pytest.mark.parametrize(
    ("weight", "manifold", "error", "message"),
    [
        (torch.ones(3, 3), Stiefel(), ValueError, "RiemannianSGD takes any manifold"),
        (torch.ones(4, 3), PSI(dim=2), ValueError, "dimension 2"),
        (torch.ones(4, 3), PSI(groups=3), ValueError, "does not divide"),
        (torch.ones(3, 3, dtype=torch.complex64), PSI(), TypeError, "complex64"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    member: Member, weight: Tensor, manifold: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        member.make([{"params": [("conv.weight", nn.Parameter(weight))], "manifold": manifold}], **member.options)


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("foreach", [True, False, None])
def test_a_gradient_that_is_not_finite_is_named_and_moves_nothing(
    member: Member, value: float, foreach: bool | None
) -> None:
    good, bad = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(4, 3, 2, 2))
    optimizer = member.make(
        [{"params": [("a.weight", good), ("b.weight", bad)], "manifold": PSI()}], foreach=foreach, **member.options
    )
    good.grad, bad.grad = torch.randn(8, 3), torch.randn(4, 3, 2, 2)
    optimizer.step()
    before = bad.detach().clone()
    bad.grad[2, 1, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"'b.weight' is not finite in scale groups \[2\] of 4"):
        optimizer.step()
    assert torch.equal(bad[2], before[2])


@every
def test_looking_for_nonfinite_gradients_can_be_turned_off(member: Member) -> None:
    w = nn.Parameter(torch.randn(4, 3))
    optimizer = member.make([{"params": [w], "manifold": PSI()}], check_finite=False, **member.options)
    w.grad = torch.full((4, 3), math.nan)
    optimizer.step()


@every
def test_sparse_gradients_are_refused_by_name(member: Member) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = member.make([{"params": [("table", embedding.weight)], "manifold": PSI()}], **member.options)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="'table' has a sparse gradient"):
        optimizer.step()


@every
def test_decay_on_scale_invariant_weights_is_ignored_with_a_warning(member: Member) -> None:
    """Coupled decay is never applied to them; the other parameters decay."""

    def train(**decay: float) -> tuple[Tensor, Tensor]:
        _, groups, backward = model_and_groups()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = member.make(groups, **member.options, **decay)
        assert [str(w.message)[:36] for w in caught] == (["weight_decay is ignored on scale-inv"] * 2 if decay else [])
        backward()
        optimizer.step()
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0, 0, decay.get("weight_decay", 0)]
        psi, _, euclidean = (group["params"] for group in optimizer.param_groups)
        return psi[0].detach(), euclidean[-2].detach()

    (psi, plain), (decayed_psi, decayed_plain) = train(), train(weight_decay=0.1)
    assert torch.equal(psi, decayed_psi)
    assert not torch.equal(plain, decayed_plain)


# ---------------------------------------------------------------------------------- groups, manifold parameters


@every
def test_manifold_parameters_are_sorted_into_groups(member: Member) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 2))
    model[0].weight = geoopt.ManifoldParameter(model[0].weight.data, manifold=PSI())
    model[1].weight = geoopt.ManifoldParameter(model[1].weight.data, manifold=PSI(1))
    for parameters in (model.parameters(), model.named_parameters(), [{"params": list(model.parameters())}]):
        optimizer = member.make(parameters, euclidean_lr=0.25, **member.options)
        found = {str(g["manifold"]): (len(g["params"]), g["lr"]) for g in optimizer.param_groups}
        lr = member.options["lr"]
        assert found == {"PSI(dim=0)": (1, lr), "PSI(dim=1)": (1, lr), "None": (4, 0.25)}


def test_other_parameters_take_lr_unless_told() -> None:
    groups = model_and_groups()[1]

    def rates(groups: list[dict[str, Any]], **options: float) -> list[float]:
        return [g["lr"] for g in PSISGD(groups, **options).param_groups]

    assert rates(groups, lr=0.1) == [0.1, 0.1, 0.1]
    assert rates(groups, lr=0.2, euclidean_lr=0.3) == [0.2, 0.2, 0.3]  # the first optimizer left the groups alone
    assert rates([*groups[:2], {**groups[2], "lr": 0.7}], lr=0.1, euclidean_lr=0.3) == [0.1, 0.1, 0.7]


# ------------------------------------------------------------------------------------------------ checkpoints


@every
def test_state_dict_round_trip_continues_to_the_bit(member: Member) -> None:
    """Check 18: tensors and plain values only, through torch.load(weights_only=True)."""

    def start() -> tuple[nn.Module, Any, Callable[[], Tensor]]:
        model, groups, backward = model_and_groups()
        return model, member.make(groups, **member.options), backward

    model, optimizer, backward = start()
    for _ in range(5):
        backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(5):
        backward()
        optimizer.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer"]["param_groups"][1]["manifold"] == {
        "name": "PSI",
        "arguments": {"dim": 1, "groups": None, "conv_groups": 2},
    }
    resumed, fresh, backward = start()
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    for _ in range(5):
        backward()
        fresh.step()
    assert torch.equal(weights_of(resumed), weights_of(model))


@every
def test_half_precision_state_keeps_its_numbers_in_float32(member: Member) -> None:
    def start() -> tuple[nn.Parameter, Any]:
        w = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).bfloat16())
        return w, member.make([{"params": [w], "manifold": PSI()}], **member.options)

    def step(w: nn.Parameter, optimizer: Any, seed: int) -> None:
        w.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()
        optimizer.step()

    (w, optimizer), (twin, resumed) = start(), start()
    for seed in range(3):
        step(w, optimizer, seed)
    twin.data.copy_(w.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(t.dtype != torch.bfloat16 for name, t in resumed.state[twin].items() if name != "momentum_buffer")
    step(w, optimizer, 3)
    step(twin, resumed, 3)
    assert torch.equal(w, twin)


@every
def test_a_state_of_another_manifold_is_refused(member: Member) -> None:
    w = nn.Parameter(torch.ones(4, 4))
    saved = member.make([{"params": [w], "manifold": PSI()}], **member.options).state_dict()
    other = member.make([{"params": [w], "manifold": PSI(1)}], **member.options)
    with pytest.raises(ValueError, match="was saved on manifold"):
        other.load_state_dict(saved)


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_step_alike(member: Member, clone: Callable[[Any], Any]) -> None:
    model, groups, _ = model_and_groups()
    optimizer = member.make(groups, **member.options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other, twin = clone((model, optimizer))
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    twin.step()
    assert torch.equal(weights_of(model), weights_of(other))


# ----------------------------------------------------------------------------- closures, schedules, mixed precision


@every
def test_closure_runs_with_gradients_on_and_its_loss_comes_back(member: Member) -> None:
    _, groups, backward = model_and_groups()
    optimizer = member.make(groups, **member.options)
    with torch.no_grad():
        first, second = optimizer.step(backward), optimizer.step(backward)
    assert second < first


@every
def test_schedulers_reach_every_group(member: Member) -> None:
    _, groups, backward = model_and_groups()
    optimizer = member.make(groups, **member.options, euclidean_lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):
        backward()
        optimizer.step()
        scheduler.step()
    assert max(g["lr"] for g in optimizer.param_groups) < 1e-12


@every
def test_a_tensor_is_a_learning_rate_too(member: Member) -> None:
    results = []
    for convert in (float, torch.tensor):
        w = nn.Parameter(torch.arange(12.0).reshape(3, 4) + 1)
        options = {**member.options, "lr": convert(member.options["lr"])}
        optimizer = member.make([{"params": [w], "manifold": PSI()}], **options)
        w.grad = torch.ones(3, 4) * torch.arange(4.0)
        optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results)


@every
def test_gradient_scaling_skips_overflow_and_unscales_first(member: Member) -> None:
    """The metric's |w|^2 meets gradients that are unscaled."""
    results = []
    for scale in (1.0, 1024.0):
        model, groups, _ = model_and_groups(torch.float32)
        optimizer = member.make(groups, **member.options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for overflow in (False, True, False):
            for i, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(i)
                p.grad = torch.randn(p.shape, generator=generator) * scaler.scale(torch.ones(()))
                if overflow:
                    p.grad.fill_(math.inf)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == scale / 2
        results.append(weights_of(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@every
def test_steps_as_a_hook_consumer_and_with_missing_gradients(member: Member) -> None:
    model, groups, backward = model_and_groups()
    optimizer, calls = member.make(groups, **member.options), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = weights_of(model)
    optimizer.step()  # no gradient anywhere: nothing to do
    assert torch.equal(before, weights_of(model))
    backward()
    optimizer.step()
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------- members' own claims


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_angular_turns_every_filter_by_the_learning_rate(scale: float) -> None:
    w = nn.Parameter(scale * torch.randn(6, 9, dtype=torch.float64))
    optimizer = PSIAngular([{"params": [w], "manifold": PSI()}], lr=0.03)
    for step in range(5):
        before, w.grad = w.detach().clone(), torch.randn(6, 9, dtype=torch.float64) * 10.0**step
        optimizer.step()
        torch.testing.assert_close(
            PSI().angles(before, w.detach()), torch.full((6,), 0.03, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_angular_leaves_a_filter_without_signal_where_it_is() -> None:
    w = nn.Parameter(torch.randn(3, 9, dtype=torch.float64))
    optimizer = PSIAngular([{"params": [w], "manifold": PSI()}], lr=0.03)
    w.grad = torch.randn(3, 9, dtype=torch.float64)
    optimizer.step()
    before = w.detach().clone()
    w.grad = torch.randn(3, 9, dtype=torch.float64)
    w.grad[1] = 0
    optimizer.step()
    assert (PSI().angles(before, w.detach()) > 0).tolist() == [True, False, True]


def test_adam_turns_by_its_learning_rate_when_gradients_agree_and_less_when_they_do_not() -> None:
    target = torch.randn(4, 9, dtype=torch.float64)

    def last_angle(noise: float) -> Tensor:
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(4, 9, dtype=torch.float64))
        optimizer = PSIAdam([{"params": [w], "manifold": PSI()}], lr=1e-3)
        for _ in range(200):
            before = w.detach().clone()
            w.grad = PSI().proju(before, target + noise * torch.randn(4, 9, dtype=torch.float64))
            optimizer.step()
        return PSI().angles(before, w.detach())

    assert ((last_angle(0) / 1e-3 - 1).abs() < 0.1).all()
    assert (last_angle(30) < 0.6e-3).all()


@pytest.mark.parametrize("name", ["PSIAngular", "PSIAdam"])
@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_are_those_of_the_docstring_in_the_verbs_of_the_manifold(name: str, kind: dict[str, bool]) -> None:
    psi, generator = PSI(), torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(5, 8, generator=generator, dtype=torch.float64)

    start, grads = 3 * draw(), [draw() for _ in range(12)]
    w = nn.Parameter(start.clone())
    optimizer = MEMBERS[name].make([{"params": [w], "manifold": psi}], lr=0.2, **kind)
    for grad in grads:
        w.grad = grad.clone()
        optimizer.step()

    x, r = start.clone(), start.norm(dim=1, keepdim=True)
    m, v = torch.zeros_like(x), torch.zeros(5, 1, dtype=torch.float64)
    for age, grad in enumerate(grads, 1):
        h = psi.proju(x, grad)
        if name == "PSIAngular":
            m = 0.9 * m + 0.1 * h / grad.norm(dim=1, keepdim=True)
            new = psi.expmap(x, -0.2 * r * m / m.norm(dim=1, keepdim=True))
        else:
            m = 0.9 * m + 0.1 * h
            v = 0.99 * v + 0.01 * (r * grad.norm(dim=1, keepdim=True)) ** 2
            root = (v / (1 - 0.99**age)).sqrt() + 1e-8
            new = psi.retr(x, -0.2 * r**2 * (m / (1 - 0.9**age)) / root)
        x, m = new, psi.transp(x, new, m)
    torch.testing.assert_close(w.detach(), x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(w.detach().norm(dim=1, keepdim=True), r, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("member", "numbers"), [("PSISGD", 1), ("PSIAngular", 1), ("PSIAdam", 2)])
def test_state_is_one_buffer_a_weight_and_numbers_a_filter(member: str, numbers: int) -> None:
    w = nn.Parameter(torch.randn(6, 4, 3, 3))
    optimizer = MEMBERS[member].make([{"params": [w], "manifold": PSI()}], **MEMBERS[member].options)
    w.grad = torch.randn_like(w)
    optimizer.step()
    sizes = sorted(t.numel() for t in optimizer.state[w].values() if t.ndim)
    assert sizes == [6] * numbers + [w.numel()]


# ------------------------------------------------------------------------------------------------ the C kernel


@pytest.fixture
def forget_kernel() -> Iterator[None]:
    for cached in (_fused.available, _fused._library):
        cached.cache_clear()
    yield
    for cached in (_fused.available, _fused._library):
        cached.cache_clear()


@pytest.mark.usefixtures("forget_kernel")
def test_kernel_is_built_once_into_the_users_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _fused.available()
    (built,) = (tmp_path / "retract").iterdir()
    stamp = built.stat().st_mtime_ns
    _fused._library.cache_clear()
    _fused._library()
    assert built.stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("forget_kernel")
@pytest.mark.parametrize("compiler", ["false", None])
def test_without_a_compiler_fused_says_so_and_the_default_goes_on(
    compiler: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler:
        monkeypatch.setenv("CC", shutil.which(compiler) or compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(shutil, "which", lambda _: None)
    w = nn.Parameter(torch.randn(3, 3))
    w.grad = torch.randn(3, 3)
    with pytest.raises(RuntimeError, match="C compiler"):
        PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, fused=True).step()
    before = w.detach().clone()
    PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1).step()
    assert not torch.equal(before, w)


def test_kernel_gives_the_same_bits_on_any_number_of_threads() -> None:
    def train(threads: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(64, 32, 3, 3, generator=generator))
        w.grad = torch.randn(w.shape, generator=generator)
        optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9, fused=True)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimizer.step()
            optimizer.step()
        finally:
            torch.set_num_threads(before)
        return w.detach()

    assert torch.equal(train(1), train(2))
