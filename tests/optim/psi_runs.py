"""Runs for the tests of PSI optimizers: the family on the test network, and PSISGD beside the published iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
