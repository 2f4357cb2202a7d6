"""PSISGD, PSIAngular and PSIAdam in one table, with options good and bad, and a network to train."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from retract.optim import PSISGD, PSIAdam, PSIAngular
from tests.networks import invariant_net


class Member(NamedTuple):
    make: Callable[..., Any]
    options: dict[str, Any]
    bad: list[tuple[dict[str, Any], str]]


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
