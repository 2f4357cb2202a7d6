"""Networks of a few layers, one arrangement of weights and normalisations each."""

import torch
from torch import Tensor, nn

from retract.nets import find_scale_invariant


def images(n=3, channels=3, size=6):
    return torch.randn(n, channels, size, size)


def kinds(model: nn.Module, *inputs) -> dict[str, str]:
    return {name: i.kind for name, i in find_scale_invariant(model, *inputs).items()}


class Net(nn.Module):
    """Layers by name and a forward pass given as a function: one arrangement a line."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._forward = forward

    def forward(self, *inputs):
        return self._forward(self.layers, *inputs)


def head(*layers: nn.Module) -> nn.Sequential:
    """Something that can tell outputs apart behind the layers under test (names 0, 1, ...)."""
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def materialised(model: nn.Module, x: Tensor) -> nn.Module:
    model(x)
    return model
