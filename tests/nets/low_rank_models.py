"""Small models for the tests of the kind "lowrank", and what their layers have become."""

from itertools import pairwise

import torch
from torch import nn

from retract.nets.layers.low_rank import LowRankLayer

__all__ = ["low_rank", "ranks", "stack"]


def low_rank(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LowRankLayer)]


def ranks(model):
    return {name: layer.rank for name, layer in low_rank(model)}


def stack(*sizes, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(*pair, dtype=dtype) for pair in pairwise(sizes)))
