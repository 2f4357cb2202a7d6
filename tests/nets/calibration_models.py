"""Networks for the tests of calibration, low-rank copies of them, and how far these are off."""

import copy
import itertools

import torch
from torch import nn

from retract.nets.layers.low_rank import LowRankLayer, low_rank_layer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def lowered(reference, rank, *, skip=(), unfolding="output", method="spectral"):
    """A copy with linear layers and convolutions of low rank."""
    model = copy.deepcopy(reference)
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in skip:
            parent, _, child = name.rpartition(".")
            kind = "output" if isinstance(layer, nn.Linear) else unfolding
            setattr(model.get_submodule(parent), child, low_rank_layer(layer, rank, unfolding=kind, method=method))
    return model


def perceptron(*sizes, norm=False, seed=0, bias=True):
    """He's initialization, ReLU after each layer, perhaps BatchNorm before it."""
    torch.manual_seed(seed)
    parts = []
    for before, size in itertools.pairwise(sizes):
        layer = nn.Linear(before, size, bias=bias)
        nn.init.kaiming_normal_(layer.weight)
        parts += [layer, *([nn.BatchNorm1d(size)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts).double()


def convolutional(norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Conv2d(8, 6, 3, bias=False)]
    norms = [nn.BatchNorm2d(layer.out_channels) for layer in layers]
    parts = [part for pair in zip(layers, norms, strict=True) for part in (*pair[: 1 + norm], nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(24, 5)).double()


def images(count=4, size=40, seed=0):
    return [normal(size, 3, 9, 9, seed=seed + i) for i in range(count)]


def trained(model, batches):
    """With the running statistics of some batches, and other parameters than at the start."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = None
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model


def scrambled(model):
    """Other factors and biases in the low-rank layers."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LowRankLayer):
                for parameter in layer.parameters():
                    parameter.copy_(normal(*parameter.shape, seed=parameter.numel()))
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def relative_error(model, reference, x):
    model.eval(), reference.eval()
    wanted = reference(x)
    return float((model(x) - wanted).square().sum() / wanted.square().sum())
