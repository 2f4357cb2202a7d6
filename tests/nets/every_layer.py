"""A model with one layer of each kind, for the tests of what is done to whole models."""

import torch
import torch.nn.functional as F
from torch import nn

from retract.nets.parametrizations.models import spectral_weights

__all__ = ["INDICES", "LAYERS", "EveryLayer", "converted", "every_layer", "small_convnet", "state"]


class EveryLayer(nn.Module):
    """One layer of each kind, a module used twice under two names, and a subclass of a layer of torch."""

    class Own(nn.Linear):
        pass

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 12, padding_idx=3)
        self.conv1d = nn.Conv1d(12, 8, 3, padding=1, padding_mode="circular")
        self.up1d = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
        self.linear = nn.Linear(6, 16, bias=False)
        self.conv2d = nn.Conv2d(1, 8, (3, 2), stride=2, dilation=2, padding=2)
        self.bn = nn.BatchNorm2d(8)
        self.up2d = nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1)
        self.conv3d = nn.Conv3d(1, 4, 2)
        self.up3d = nn.ConvTranspose3d(4, 6, 2)
        self.first = nn.Linear(6, 6)
        self.again = nn.ModuleDict({"same": self.first})
        self.own = self.Own(6, 5)

    def forward(self, indices):
        x = self.up1d(self.conv1d(self.embedding(indices).mT))
        x = F.relu(self.bn(self.conv2d(self.linear(x.mT).unsqueeze(1))))
        x = self.up3d(self.conv3d(self.up2d(x).unsqueeze(1))).mean((2, 3, 4))
        return self.own(self.again["same"](torch.tanh(self.first(x))))


LAYERS = ["embedding", "conv1d", "up1d", "linear", "conv2d", "up2d", "conv3d", "up3d", "first", "own"]


#: An input of the model.
INDICES = torch.tensor([[1, 5, 3, 0], [7, 2, 2, 9]])


def every_layer():
    torch.manual_seed(0)
    model = EveryLayer().double()
    model.bn.running_mean.normal_()
    return model.eval()


def small_convnet():
    """Two convolutions, and a linear layer that is too small for some budgets."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(*layers)


def state(model):
    """Everything that a failed call must leave alone, by identity."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(name, id(t), t._version, t.requires_grad) for name, t in tensors]


def converted(model):
    return [name.rpartition(".")[0] for name, *_ in spectral_weights(model)]
