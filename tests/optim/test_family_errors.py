"""What every PSI optimizer refuses, or ignores with a warning: options, weights, gradients."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI, Stiefel
from tests.optim.psi_members import MEMBERS, Member, every, model_and_groups

COMMON_BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, "lr must be finite and >= 0, got -0.1"),
    ({"lr": math.nan}, "lr must be finite and >= 0, got nan"),
    ({"lr": math.inf}, "lr must be finite"),
    ({"lr": torch.ones(2)}, "lr as a tensor must have one element"),
    ({"euclidean_lr": -1.0}, "euclidean_lr must be finite and >= 0"),
    ({"weight_decay": -1e-4}, "weight_decay must be in"),
    ({"foreach": True, "fused": True}, "exclude each other"),
]


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
