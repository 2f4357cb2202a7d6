"""What PSIAngular and PSIAdam say of their steps: angles, formulas, the size of their state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSIAdam, PSIAngular
from tests.optim.psi_members import MEMBERS


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
        torch.manual_seed(1)
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
