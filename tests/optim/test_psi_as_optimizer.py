"""PSISGD as a torch optimizer: other parameters as torch's SGD, zero filters, extreme norms, large steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSISGD, PSIAdam, PSIAngular
from tests.networks import invariant_net
from tests.optim.psi_runs import FAMILY, published, run, train


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
    """Weights far off unit norm: the step is computed from ratios, and turns as at unit norm."""

    def angle(factor: float, **kind: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(3, 8, generator=generator, dtype=torch.float64) * factor)
        before = w.detach().clone()
        optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9, **kind)  # type: ignore[arg-type]
        for _ in range(3):
            w.grad = torch.randn(3, 8, generator=generator, dtype=torch.float64) / factor
            optimizer.step()
        return PSI().angles(before, w.detach())

    for kind in ({"fused": True}, {"foreach": True}):
        torch.testing.assert_close(angle(scale, **kind), angle(1.0, **kind), rtol=1e-9, atol=0)


def test_large_steps_stay_accurate() -> None:
    """Angles near a right one: norms hold, and directions are the published ones, whose norms grow each time."""
    w, _, w0 = run(30, 50.0, momentum=0.9)
    assert (w.norm(dim=1) / w0.norm(dim=1) - 1).abs().max() < 1e-13
    reference = published(30, 50.0, 0.9, "parallel")
    directions = (x / x.norm(dim=1, keepdim=True) for x in (w, reference))
    torch.testing.assert_close(*directions, rtol=0, atol=1e-11)
