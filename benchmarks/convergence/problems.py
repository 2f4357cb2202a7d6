"""What the full-batch and the stochastic protocols of `retract bench convergence` minimise, small and in float64.

Both networks have BatchNorm after every hidden layer, whose filters are therefore scale-invariant. Its epsilon is so
small that they are so to twelve digits: the theorems speak of exact invariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retract.nets.cnn._base import ZooModel

from ..data import digits
from ..demo import rescale_filters

__all__ = ["PROBLEMS", "STARTS", "Gradient", "Problem", "make_problem"]

EPSILON = 1e-12  # of BatchNorm
POINTS, FEATURES, HIDDEN, NOISE = 1000, 10, 100, 0.1  # of the toy regression; the noise is not published
WIDTH = 32  # of both hidden layers for digits
STARTS = ("usual", "unit", "rescaled")
"""He's normal rule with fan-in, squared norms of about 2; unit norms; each filter times its own 10^U(-1.5, 1.5)."""


class Perceptron(ZooModel):
    """Linear layers without bias, each followed by BatchNorm and an activation, and a linear layer with bias.

    Args:
        sizes: features of the input, of the hidden layers, and of the output.
        activation: after every BatchNorm.
    """

    scale_invariant: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sizes: tuple[int, ...], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        *hidden, output = pairwise(sizes)
        self.layers = nn.ModuleList(HiddenLayer(inputs, outputs) for inputs, outputs in hidden)
        self.output = nn.Linear(output[0], output[1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        for layer in self.layers:
            x = self.activation(layer(x))
        outputs: Tensor = self.output(x)
        return outputs


class HiddenLayer(nn.Module):
    """A linear layer without bias, then BatchNorm."""

    scale_invariant: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs, eps=EPSILON)
        nn.init.kaiming_normal_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        normalized: Tensor = self.norm(self.linear(x))
        return normalized


@dataclass(frozen=True)
class Gradient:
    """Squared norms of a gradient: ``metric`` in the PSI metric, which scales of filters do not change, and
    ``euclidean`` with respect to the weights as they are.
    """

    metric: float
    euclidean: float


@dataclass(frozen=True)
class Problem:
    """A network in train mode, and all the data that its loss is a mean over."""

    model: Perceptron
    inputs: Tensor
    targets: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor]

    def loss(self, batch: Tensor | None = None) -> Tensor:
        """Over all the data, or over those of the indices."""
        if batch is None:
            return self.criterion(self.model(self.inputs), self.targets)
        return self.criterion(self.model(self.inputs[batch]), self.targets[batch])

    @cached_property
    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Scale-invariant weights, one filter a row, and all others."""
        groups: list[dict[str, Any]] = self.model.manifold_groups()
        invariant = [weight for group in groups if "manifold" in group for _, weight in group["params"]]
        others = [weight for group in groups if "manifold" not in group for _, weight in group["params"]]
        return invariant, others

    @torch.no_grad()
    def gradient(self) -> Gradient:
        """Of the gradients that the weights hold.

        The norm by [Yi22, eq. (6) and (7)] is that of the gradient at unit norms: the sum over filters of
        |w_i|^2 |dL/dw_i|^2, and the Euclidean norm of the rest.
        """
        invariant, others = self.weights
        rest = sum(_square(weight.grad).sum() for weight in others)
        squares = [(_square(weight).sum(1), _square(weight.grad).sum(1)) for weight in invariant]
        metric = sum((norm * slope).sum() for norm, slope in squares) + rest
        euclidean = sum(slope.sum() for _, slope in squares) + rest
        return Gradient(float(metric), float(euclidean))

    @torch.no_grad()
    def mean_square_norm(self) -> float:
        """Mean over filters of |w_i|^2."""
        return float(torch.cat([_square(weight).sum(1) for weight in self.weights[0]]).mean())


def _square(x: Tensor | None) -> Tensor:
    assert x is not None, "the loss does not see this weight"
    return x.square()


def toy_regression(generator: torch.Generator) -> Problem:
    """1000 points of ten features, a noisy linear function of them, and 100 hidden units with ELU [Yi22, Figure 4].

    The published formula has no BatchNorm; without it, no weight would be scale-invariant.
    """
    inputs = torch.randn(POINTS, FEATURES, generator=generator, dtype=torch.float64)
    slope = torch.randn(FEATURES, 1, generator=generator, dtype=torch.float64) / FEATURES**0.5
    noise = torch.randn(POINTS, 1, generator=generator, dtype=torch.float64)
    return Problem(Perceptron((FEATURES, HIDDEN, 1), F.elu), inputs, inputs @ slope + NOISE * noise, F.mse_loss)


def digits_classification(generator: torch.Generator) -> Problem:
    """The 1347 training images of digits, two hidden layers with ReLU, cross entropy."""
    data = digits.read()
    inputs = data.normalizer()(data.train_images).flatten(1).double()
    sizes = (inputs.shape[1], WIDTH, WIDTH, len(data.classes))
    return Problem(Perceptron(sizes, F.relu), inputs, data.train_labels, F.cross_entropy)


PROBLEMS: dict[str, Callable[[torch.Generator], Problem]] = {
    "toy regression": toy_regression,
    "digits": digits_classification,
}


def make_problem(name: str, seed: int, start: str = "usual") -> Problem:
    """A problem in float64 with its weights at the start.

    Args:
        name: of `PROBLEMS`.
        seed: of the weights, and of the toy regression's data.
        start: of `STARTS`; all of a seed compute the same function.

    Raises:
        ValueError: an unknown name or start.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, got {name!r}")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        problem = PROBLEMS[name](generator)
    problem.model.double()
    if start == "unit":
        with torch.no_grad():
            for weight in problem.weights[0]:
                weight.div_(weight.norm(dim=1, keepdim=True))
    elif start == "rescaled":
        rescale_filters(problem.model.manifold_groups(), generator)
    return problem
