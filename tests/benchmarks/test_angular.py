"""`retract bench angular`: its baseline is the optimizer that is shipped, and its alternatives are others."""

from __future__ import annotations

import torch
from torch import nn

from retract.benchmarks.angular import VARIANTS, _Angular
from retract.manifolds import PSI
from retract.optim import PSIAngular


def train(name: str | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 9, generator=generator, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": weights, "manifold": PSI()}]
    optimizer = PSIAngular(groups, lr=0.1) if name is None else _Angular(groups, VARIANTS[name], lr=0.1)
    for step in range(6):
        for w in weights:
            w.grad = torch.randn(6, 9, generator=generator, dtype=torch.float64)
            w.grad[2] *= step != 3
        optimizer.step()
    return torch.stack([w.detach() for w in weights])


def test_as_shipped_is_psi_angular_and_no_variant_else_is() -> None:
    shipped = train(None)
    torch.testing.assert_close(train("as shipped"), shipped, rtol=1e-12, atol=1e-12)
    for name in VARIANTS:
        if name != "as shipped":
            assert (train(name) - shipped).abs().max() > 1e-3, name
