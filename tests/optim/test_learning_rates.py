"""The rules of docs/learning-rates.md: how a learning rate of SGD translates, on digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retract.benchmarks.data import digits
from retract.manifolds import PSI
from retract.nets import scale_invariant_groups
from retract.nets.cnn import digitsnet
from retract.optim import PSISGD


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    data = digits.read()
    return digitsnet(), data.normalizer()(data.train_images), data.train_labels


def filters(model: nn.Module) -> dict[str, Tensor]:
    groups = model.manifold_groups()  # type: ignore[operator]
    return {name: w for group in groups if "manifold" in group for name, w in group["params"]}


@pytest.mark.parametrize("norm", [0.5, 1.0, 4.0])
def test_without_decay_the_rate_is_divided_by_the_squared_norm(norm: float) -> None:
    """Rule 1: at norm r, SGD with lr turns filters exactly as PSISGD with lr / r^2; momentum is the same."""
    ends = []
    for swap in (False, True):
        model, images, labels = network()
        groups = scale_invariant_groups(model, images[:64], canonical=True, norm=norm)
        if swap:
            optimizer: torch.optim.Optimizer = PSISGD(groups, lr=0.05 / norm**2, euclidean_lr=0.05, momentum=0.9)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(images[64 * step :][:64]), labels[64 * step :][:64]).backward()
            optimizer.step()
            if step == 0:
                first = {name: w.detach().clone() for name, w in filters(model).items()}
        ends.append((first, {name: w.detach().clone() for name, w in filters(model).items()}))
    for name in ends[0][0]:
        assert PSI().angles(ends[0][0][name], ends[1][0][name]).max() < 1e-3 * 0.05
        turned = PSI().angles(ends[0][0][name], ends[0][1][name])
        assert (PSI().angles(ends[0][1][name], ends[1][1][name]) < 0.2 * turned + 1e-5).all()


def test_with_decay_filters_turn_by_a_constant_angle() -> None:
    """Rule 2: SGD with decay settles where filters turn by sqrt(2 lr decay / (1 + momentum)) a step."""
    lr, decay, momentum = 0.1, 0.01, 0.9
    model, images, labels = network()
    chosen = filters(model)
    others = [p for name, p in model.named_parameters() if name not in chosen]
    groups = [{"params": list(chosen.values()), "weight_decay": decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    generator, angles = torch.Generator().manual_seed(0), []
    for step in range(400):
        batch = torch.randint(0, len(images), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        before = {name: w.detach().clone() for name, w in chosen.items()}
        optimizer.step()
        if step >= 250:  # the norms settle within 1 / (2 lr decay / (1 - momentum)) = 50 steps
            angles.append(torch.cat([PSI().angles(before[name], w.detach()) for name, w in chosen.items()]))
    measured = float(torch.stack(angles).square().mean().sqrt())
    assert measured == pytest.approx(math.sqrt(2 * lr * decay / (1 + momentum)), rel=0.1)
