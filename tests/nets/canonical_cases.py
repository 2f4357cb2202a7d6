"""Canonical layers of every kind, and what they are made of."""

import torch
from torch import nn

from retract.nets.parametrizations import canonical_weight_norm, canonical_weights

LAYERS = {
    "linear": lambda **k: nn.Linear(7, 5, **k),
    "conv1d": lambda **k: nn.Conv1d(4, 6, 3, **k),
    "conv2d": lambda **k: nn.Conv2d(4, 6, (3, 2), **k),
    "conv3d": lambda **k: nn.Conv3d(2, 3, 3, **k),
    "transposed1d": lambda **k: nn.ConvTranspose1d(4, 6, 3, **k),
    "transposed2d": lambda **k: nn.ConvTranspose2d(4, 6, (3, 2), **k),
    "transposed3d": lambda **k: nn.ConvTranspose3d(2, 3, 3, **k),
    "unit modes": lambda **k: nn.Conv2d(1, 6, (1, 3), **k),
    "one number": lambda **k: nn.Linear(1, 1, **k),
}


def made(layer, rank, *, seed=0, signs=True, **options):
    """A canonical layer; lambda with either sign, and in Euclidean form rows of any length."""
    torch.manual_seed(seed)
    dtype = options.pop("dtype", torch.float64)
    module = canonical_weight_norm(LAYERS[layer](dtype=dtype), rank, **options)
    canonical, (scale, *factors) = parts(module)
    with torch.no_grad():
        if signs:
            scale.normal_()
        if canonical.form == "euclidean":
            for rows in factors:
                rows.mul_(torch.empty(rank, 1, dtype=dtype).uniform_(0.5, 2))
    return module


def parts(module):
    ((_, canonical, originals),) = canonical_weights(module)
    return canonical, originals


def terms(module):
    canonical, originals = parts(module)
    with torch.no_grad():
        return canonical.terms(*originals)
