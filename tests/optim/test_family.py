"""PSISGD, PSIAngular and PSIAdam as torch optimizers: groups, checkpoints, closures, schedules, mixed precision."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSISGD
from tests.optim.psi_members import Member, every, model_and_groups


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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
