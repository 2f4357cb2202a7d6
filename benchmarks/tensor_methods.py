"""What `retract bench tensor` times: a 3x3 convolution whose weight is a tensor network, dense, or canonical."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retract.nets.layers.tensor import TensorConv2d
from retract.nets.layers.tensor_formats import FORMATS, tensor_network
from retract.nets.parametrizations.canonical import canonical_weight_norm

__all__ = ["DENSE", "Method", "Sizes", "break_even_rank", "methods", "training_pass"]

DENSE = "dense"

#: Formats of tensorly-torch: its name, and ours.
THEIRS = {"cp": "cp", "tucker": "tucker", "tt": "tensor_train"}


@dataclass(frozen=True)
class Sizes:
    """A 3x3 convolution of as many channels in as out, and what it is given."""

    channels: int = 128
    batch: int = 64
    maps: int = 16  # height and width
    budget: float = 0.1  # parameters of tensor networks, of the dense layer's
    formats: Sequence[str] = tuple(FORMATS)


@dataclass(frozen=True)
class Method:
    """A layer to time, and the memory format of its input."""

    group: Literal["dense", "tensor network", "tensorly-torch", "canonical"]
    name: str
    layer: nn.Module
    channels_last: bool = False
    note: str = ""  # ranks

    @property
    def parameters(self) -> int:
        """Elements of the parameters of the weight."""
        return sum(parameter.numel() for name, parameter in self.layer.named_parameters() if name != "bias")


class NaiveCanonical(nn.Module):
    """Canonical weight normalization as published: two products build the weight of every call."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((rank,), math.sqrt(2 * channels / rank)))
        self.factors = nn.ParameterList([torch.randn(rank, size) for size in (channels, channels, 3, 3)])
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        out, channels, height, width = (rows / rows.norm(dim=1, keepdim=True) for rows in self.factors)
        rows = torch.einsum("ri,rh,rw->rihw", channels, height, width)  # the Khatri-Rao product
        weight = (self.scale * out.mT) @ rows.flatten(1)
        return F.conv2d(input, weight.view(-1, *rows.shape[1:]), self.bias, padding=1)


def break_even_rank(channels: int) -> int:
    """Terms at which a canonical 3x3 convolution has the parameters of the dense one: the full rank of the method."""
    return math.ceil(9 * channels**2 / (2 * channels + 7))


def methods(sizes: Sizes) -> Iterator[Method]:
    """Everything that takes turns."""
    channels = sizes.channels
    yield Method("dense", DENSE, nn.Conv2d(channels, channels, 3, padding=1))
    yield Method("dense", "dense", nn.Conv2d(channels, channels, 3, padding=1), channels_last=True)
    yield from _ours(sizes)
    if find_spec("tltorch") is not None:
        yield from _theirs(sizes)
    yield from _canonical(sizes)


def _ours(sizes: Sizes) -> Iterator[Method]:
    for format in sizes.formats:
        network = tensor_network(format, (sizes.channels, sizes.channels, 3, 3), budget=sizes.budget)
        layer = TensorConv2d(network, padding=1)
        note = f"{str(network).partition('(')[2].rstrip(')')}; auto: {'factored' if layer.factored else 'weight'}"
        for channels_last in (False, True):
            layer = TensorConv2d(network, padding=1, execution="factored")
            yield Method("tensor network", f"{format}, factored", layer, channels_last, note)
        layer = TensorConv2d(network, padding=1, execution="weight")
        yield Method("tensor network", f"{format}, weight", layer, note=note)


def _theirs(sizes: Sizes) -> Iterator[Method]:
    from tltorch import FactorizedConv

    for format, own in THEIRS.items():
        if own not in sizes.formats:
            continue
        for implementation in ("factorized", "reconstructed"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = FactorizedConv(
                    sizes.channels,
                    sizes.channels,
                    (3, 3),
                    padding=1,
                    rank=sizes.budget,
                    factorization=format,
                    implementation=implementation,
                    order=2,
                )
            for parameter in layer.parameters():  # its constructor leaves memory as it finds it
                nn.init.normal_(parameter, std=0.05)
            note = f"ranks {layer.weight.rank}"
            yield Method("tensorly-torch", f"{own}, {implementation}", layer, note=note)


def _canonical(sizes: Sizes) -> Iterator[Method]:
    full = break_even_rank(sizes.channels)
    for label, share in (("full", 1.0), ("half", 0.5), (f"{100 * sizes.budget:g} %", sizes.budget)):
        rank = max(1, round(full * share))
        yield Method("canonical", f"{label}, naive rebuild", NaiveCanonical(sizes.channels, rank), note=f"{rank} terms")
        for execution in ("auto", "factored", "weight"):
            layer = nn.Conv2d(sizes.channels, sizes.channels, 3, padding=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # at the full rank of tiny sizes, terms cannot be told apart
                canonical_weight_norm(layer, rank, execution=execution)
            yield Method("canonical", f"{label}, {execution}", layer, note=f"{rank} terms")


def training_pass(method: Method, sizes: Sizes) -> Callable[[], object]:
    """Forward and backward, the gradient of the input included."""
    format = torch.channels_last if method.channels_last else torch.contiguous_format
    shape = (sizes.batch, sizes.channels, sizes.maps, sizes.maps)
    input = torch.randn(shape).to(memory_format=format).requires_grad_()
    cotangent = torch.randn(shape).to(memory_format=format)
    needed = [input, *method.layer.parameters()]
    return lambda: torch.autograd.grad(method.layer(input), needed, cotangent)
