"""A small network with every kind of scale-invariant weight, and the group action on it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from retract.manifolds import PSI

# Epsilon breaks invariance; torch asks for a positive one.
TINY = {torch.float64: 1e-300, torch.float32: 1e-38}


def invariant_net(
    dtype: torch.dtype = torch.float64,
) -> tuple[nn.Sequential, list[dict[str, Any]], Tensor, Tensor]:
    """A seeded network: plain, grouped, depthwise, transposed convolution and linear layer before BatchNorm.

    Returns:
        the network in train mode; its param groups (two on PSI, one Euclidean: BatchNorms and the last
        layer); an input batch of shape (64, 2, 8, 8); target probabilities of 4 classes, which keep the
        loss's minimum finite (with hard labels training ends in rounding noise).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            *(nn.Linear(24, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU()),
            nn.Linear(10, 4),
        )
        batch = torch.randn(64, 2, 8, 8, dtype=torch.float64)
        target = torch.randn(64, 4, dtype=torch.float64).softmax(1)
    model = model.to(dtype)
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.eps = TINY[dtype]
    weights = _weights(model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups: list[dict[str, Any]] = [
        {
            "params": [(names[id(w)], w) for w, manifold, _ in weights if manifold.dim == dim],
            "manifold": manifold,
        }
        for dim, manifold in ((0, PSI()), (1, PSI(1, conv_groups=2)))
    ]
    invariant = {id(w) for w, _, _ in weights}
    groups.append({"params": [(n, p) for n, p in model.named_parameters() if id(p) not in invariant]})
    return model, groups, batch.to(dtype), target.to(dtype)


def rescale(model: nn.Sequential, seed: int, span: float, *, powers_of_two: bool = False) -> dict[str, Tensor]:
    """Multiply every filter by its own 10^U(-span, span), in place, and with it the running statistics.

    Args:
        model: from `invariant_net`.
        seed: of the scales.
        span: of their decimal logarithms.
        powers_of_two: round the scales to powers of two, with which floating-point numbers scale exactly.

    Returns:
        the scales of each weight by its name; act on optimizer states of the same kind with them.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {}
    with torch.no_grad():
        for weight, manifold, norm in _weights(model):
            exponent = torch.rand(manifold.num_scales(weight.shape), generator=generator, dtype=torch.float64)
            a = 10 ** (span * (2 * exponent - 1))
            a = (2 ** a.log2().round() if powers_of_two else a).to(weight)
            weight.copy_(manifold.act(weight, a))
            norm.running_mean.mul_(a)
            norm.running_var.mul_(a.square())
            scales[names[id(weight)]] = a
    return scales


def directions(model: nn.Sequential) -> Tensor:
    """Every filter at unit norm, then every other parameter, as one vector: the point of the quotient."""
    weights = {id(w): manifold for w, manifold, _ in _weights(model)}
    parts = []
    for p in model.parameters():
        w = p.detach()
        manifold = weights.get(id(p))
        parts.append((w if manifold is None else manifold.act(w, 1 / manifold.norms(w).flatten())).flatten())
    return torch.cat(parts)


def _weights(model: nn.Sequential) -> list[tuple[nn.Parameter, PSI, Any]]:
    """Scale-invariant weights with their manifold and the BatchNorm they feed."""
    layers = list(model)
    pairs = [(a, b) for a, b in pairwise(layers) if isinstance(b, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [
        (a.weight, PSI(1, conv_groups=a.groups) if isinstance(a, nn.ConvTranspose2d) else PSI(), b) for a, b in pairs
    ]
