"""Decoupled Frobenius decay is one gradient step on the squared norm of the product, after the optimizer's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import Stiefel
from retract.optim import RiemannianSGD
from retract.optim.frobenius_decay import FrobeniusDecay

SHAPES = {"matrix": ((6, 2), (2, 5)), "stack": ((3, 6, 2), (3, 2, 5))}
shapes = pytest.mark.parametrize("kind", SHAPES)


def factors(kind: str = "matrix", dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    left, right = (nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES[kind])
    return left, right


def with_gradients(*parameters: nn.Parameter, scale: float = 1.0) -> None:
    for parameter in parameters:
        parameter.grad = scale * torch.ones_like(parameter)


def decayed(left: Tensor, right: Tensor, coefficient: float, rates: tuple[float, float]) -> list[Tensor]:
    """A gradient step on c/2 |left @ right|², by autograd."""
    pair = [left.detach().clone().requires_grad_(), right.detach().clone().requires_grad_()]
    gradients = torch.autograd.grad(coefficient / 2 * (pair[0] @ pair[1]).square().sum(), pair)
    return [(x - rate * g).detach() for x, g, rate in zip(pair, gradients, rates, strict=True)]


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, maximize": lambda params: torch.optim.SGD(params, lr=0.1, maximize=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.0),
    "Adam, tensor lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1), foreach=False),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1),
    "RiemannianSGD": lambda params: RiemannianSGD(params, lr=0.1),
}


@shapes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_the_optimizer_then_one_of_the_penalty(name: str, kind: str) -> None:
    pair = factors(kind)
    alone = copy.deepcopy(pair)
    optimizer, reference = OPTIMIZERS[name](list(pair)), OPTIMIZERS[name](list(alone))
    FrobeniusDecay(optimizer, [pair], 0.3)
    for step in range(3):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = group["lr"] * 0 + 0.1 / (1 + step)  # a tensor if it was one
        with_gradients(*pair, *alone, scale=0.5 + step)
        optimizer.step()
        reference.step()
        rate = float(optimizer.param_groups[0]["lr"])
        for parameter, value in zip(alone, decayed(*alone, 0.3, (rate, rate)), strict=True):
            parameter.data.copy_(value)
        for parameter, expected in zip(pair, alone, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)


@shapes
def test_without_gradients_it_is_weight_decay_of_the_product_to_first_order(kind: str) -> None:
    """With a zero gradient: (1 - lr c s²) on either side of each singular value s of balanced factors."""
    left, right = factors(kind)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
        u, s, vh = u[..., :2], s[..., :2], vh[..., :2, :]
        left.copy_(u * s.sqrt().unsqueeze(-2))
        right.copy_(s.sqrt().unsqueeze(-1) * vh)
    optimizer = torch.optim.SGD([left, right], lr=0.1)
    FrobeniusDecay(optimizer, [(left, right)], 0.2)
    with_gradients(left, right, scale=0.0)
    optimizer.step()
    values = torch.linalg.svdvals(left @ right)[..., :2]
    torch.testing.assert_close(values, s * (1 - 0.02 * s) ** 2, rtol=1e-12, atol=1e-12)


def test_each_factor_has_its_own_learning_rate_and_schedule() -> None:
    left, right = factors()
    optimizer = torch.optim.SGD([{"params": [right]}, {"params": [left], "lr": 0.2}], lr=0.05)
    decay = FrobeniusDecay(optimizer, [(left, right)], 0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(3):
        with_gradients(left, right, scale=0.0)
        decay.coefficient = coefficient = 0.3 * (1 + step)
        expected = decayed(left, right, coefficient, (0.2 / 2**step, 0.05 / 2**step))
        optimizer.step()
        scheduler.step()
        for parameter, value in zip((left, right), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-14)


def test_what_has_no_gradient_or_is_elsewhere_stays() -> None:
    left, right = factors()
    other_left, other_right = factors("stack")
    optimizer = torch.optim.SGD([left, right, other_left], lr=0.1)
    FrobeniusDecay(optimizer, [(left, right), (other_left, other_right)], 0.3)
    with_gradients(left, other_left, other_right, scale=0.0)
    before = [parameter.detach().clone() for parameter in (left, right, other_left, other_right)]
    optimizer.step()
    assert torch.equal(right, before[1]) and torch.equal(other_right, before[3])
    torch.testing.assert_close(left.detach(), decayed(*before[:2], 0.3, (0.1, 0.1))[0])
    torch.testing.assert_close(other_left.detach(), decayed(*before[2:], 0.3, (0.1, 0.1))[0])


def test_removed_or_zero_it_does_nothing() -> None:
    left, right = factors()
    optimizer = torch.optim.SGD([left, right], lr=0.1)
    decay = FrobeniusDecay(optimizer, [(left, right)], 0.0)
    before = left.detach().clone()
    with_gradients(left, right, scale=0.0)
    optimizer.step()
    assert torch.equal(left, before)
    decay.coefficient = 0.3
    decay.remove()
    optimizer.step()
    assert torch.equal(left, before)


def test_state_dicts_are_those_of_the_optimizer_and_may_be_loaded_while_it_decays() -> None:
    left, right = factors()
    optimizer = torch.optim.SGD([left, right], lr=0.1, momentum=0.9)
    with_gradients(left, right, scale=0.0)
    optimizer.step()
    without = copy.deepcopy(optimizer.state_dict())
    FrobeniusDecay(optimizer, [(left, right)], 0.3)
    assert str(optimizer.state_dict()) == str(without)
    without["param_groups"][0]["lr"] = 0.02
    optimizer.load_state_dict(without)
    expected = decayed(left, right, 0.3, (0.02, 0.02))
    optimizer.step()
    for parameter, value in zip((left, right), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-14)


def test_steps_that_a_grad_scaler_skips_do_not_decay() -> None:
    left, right = factors(dtype=torch.float32)
    optimizer = torch.optim.SGD([left, right], lr=0.1)
    FrobeniusDecay(optimizer, [(left, right)], 0.3)
    scaler = torch.amp.GradScaler("cpu")
    before = left.detach().clone()
    scaler.scale((left @ right).sum() * torch.inf).backward()
    scaler.step(optimizer)
    assert torch.equal(left, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Whose squares would overflow: 300² in float16."""
    left, right = nn.Parameter(torch.full((4, 1), 300.0, dtype=dtype)), nn.Parameter(torch.ones(1, 3, dtype=dtype))
    optimizer = torch.optim.SGD([left, right], lr=1e-6)
    FrobeniusDecay(optimizer, [(left, right)], 1.0)
    with_gradients(left, right, scale=0.0)
    optimizer.step()
    assert left.dtype == right.dtype == dtype
    torch.testing.assert_close(right.float(), torch.full((1, 3), 1 - 1e-6 * 4 * 300**2), rtol=0.01, atol=0)


def test_it_works_beside_manifolds_but_not_on_them() -> None:
    left, right = factors()
    frame = nn.Parameter(Stiefel().projx(torch.randn(5, 2, dtype=torch.float64)))
    groups = [{"params": [frame], "manifold": Stiefel()}, {"params": [left, right]}]
    optimizer = RiemannianSGD(groups, lr=0.1)
    FrobeniusDecay(optimizer, [(left, right)], 0.3)
    with pytest.raises(ValueError, match=r"is on Stiefel.*: decaying it would leave the manifold"):
        FrobeniusDecay(optimizer, [(frame, right)], 0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o, u, v: FrobeniusDecay(o, [], 0.1), "pairs must have one pair of factors at least, got none"),
        (
            lambda o, u, v: FrobeniusDecay(o, [(v, v)], 0.1),
            r"pairs\[0\] must be of shapes .* got \(2, 5\) and \(2, 5\)",
        ),
        (lambda o, u, v: FrobeniusDecay(o, [(u, v), factors()], 0.1), r"pairs\[1\]: the optimizer has neither"),
        (lambda o, u, v: FrobeniusDecay(o, [(u, v)], -0.1), r"coefficient must be finite and >= 0, got -0\.1"),
        (lambda o, u, v: FrobeniusDecay(o, [(u, v)], float("nan")), "coefficient must be finite and >= 0, got nan"),
        (lambda o, u, v: setattr(FrobeniusDecay(o, [(u, v)], 0.1), "coefficient", float("inf")), "got inf"),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    left, right = factors()
    with pytest.raises(ValueError, match=message):
        make(torch.optim.SGD([left, right], lr=0.1), left, right)


def test_factors_that_decay_already_are_refused() -> None:
    left, right = factors()
    optimizer = torch.optim.SGD([("conv.left", left), ("conv.right", right)], lr=0.1, weight_decay=1e-4)
    with pytest.raises(ValueError, match=r"parameter 'conv\.left' would decay twice: .* weight_decay=0\.0001"):
        FrobeniusDecay(optimizer, [(left, right)], 1e-4)
