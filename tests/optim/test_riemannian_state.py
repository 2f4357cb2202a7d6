"""RiemannianSGD saved, copied and scheduled."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from retract.manifolds import PSI, Oblique, Stiefel
from retract.optim import RiemannianSGD
from tests.optim.riemannian_points import StiefelPair, point, random


def twin_setup():
    weights = [
        point(Stiefel(), 6, 4),
        nn.Parameter(random(3)),
        point(Stiefel(), 6, 2),
        point(Stiefel(), 5, 3),
    ]
    groups = [
        {"params": [weights[0]], "manifold": Stiefel()},
        {"params": [weights[1]]},
        {"params": weights[2:], "manifold": StiefelPair()},
    ]
    return weights, RiemannianSGD(groups, 0.1, momentum=0.9)


def advance(weights, optimizer, seeds):
    for seed in seeds:
        for w in weights:
            w.grad = random(*w.shape, seed=seed)
        optimizer.step()


def test_state_dict_continues_to_the_bit():
    weights, optimizer = twin_setup()
    advance(weights, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": weights}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    others, resumed = twin_setup()
    with torch.no_grad():
        for w, v in zip(others, saved["weights"], strict=True):
            w.copy_(v)
    resumed.load_state_dict(saved["optimizer"])
    advance(weights, optimizer, range(3, 6))
    advance(others, resumed, range(3, 6))
    assert all(map(torch.equal, weights, others))


def test_state_of_another_manifold_is_refused():
    w = point(Stiefel(), 6, 4)
    saved = RiemannianSGD([{"params": [w], "manifold": Stiefel()}]).state_dict()
    with pytest.raises(ValueError, match="Stiefel"):
        RiemannianSGD([{"params": [w], "manifold": PSI()}]).load_state_dict(saved)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_to_the_bit(clone):
    weights, optimizer = twin_setup()
    advance(weights, optimizer, range(2))
    others, copied = clone((weights, optimizer))
    advance(weights, optimizer, range(2, 5))
    advance(others, copied, range(2, 5))
    assert all(map(torch.equal, weights, others))


def test_schedulers_set_the_rate():
    w, v = point(Oblique(), 3, 4), point(Oblique(), 3, 4)
    scheduled = RiemannianSGD([{"params": [w], "manifold": Oblique()}], 0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
    for step in range(3):
        w.grad = v.grad = random(3, 4, seed=step)
        scheduled.step()
        scheduler.step()
        RiemannianSGD([{"params": [v], "manifold": Oblique()}], 0.4 * 0.5**step).step()
    assert torch.equal(w, v)
    optimizer = RiemannianSGD([{"params": [w], "manifold": Oblique()}], 0.4, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5, pct_start=0.5)
    cycled = []
    for _ in range(4):
        cycled.append([optimizer.param_groups[0][name] for name in ("lr", "momentum")])
        optimizer.step()
        cycle.step()
    rises = [(a < b, m < n) for (a, m), (b, n) in pairwise(cycled)]
    assert all(rate != momentum for rate, momentum in rises) and len(set(rises)) == 2
