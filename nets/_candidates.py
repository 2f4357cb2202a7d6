"""The rescalings that a weight could be invariant under, finest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from retract.manifolds import PSI

__all__ = ["Candidate", "Layout", "Moments", "candidates", "layouts"]

Granularity = Literal["filter", "group", "whole"]


class Moments(NamedTuple):
    """<w_i, g_i>, |w_i|^2 and |g_i|^2 per filter or per scale group, each of shape ``(n,)``."""

    inner: Tensor
    weight: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, filters: PSI, weight: Tensor, gradient: Tensor) -> Moments:
        """Moments of a weight and its gradient along the filters that a manifold without blocks names."""
        w, dims = filters.scale_view(weight)
        g, _ = filters.scale_view(gradient)
        return cls(*((a * b).sum(dims).flatten() for a, b in ((w, g), (w, w), (g, g))))

    def blocks(self, count: int) -> Moments:
        """Sums over ``count`` contiguous blocks."""
        return Moments(*(m.reshape(count, -1).sum(1) for m in self))

    def joined(self, other: Moments) -> Moments:
        """Moments of the vectors that are one scale group of each."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Layout:
    """What the shape of a parameter does not tell: groups of a transposed convolution, the layer's bias."""

    conv_groups: int = 1
    partner: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A rescaling of a weight, jointly with its bias if ``partner`` names one.

    Attributes:
        manifold: the scale groups; ``scales`` is their number, each a block of the filters of ``filters``.
    """

    kind: Granularity
    manifold: PSI
    filters: PSI
    scales: int
    partner: str | None = None

    def rescale_(self, parameters: Mapping[str, Tensor], name: str, factors: Tensor) -> None:
        """Multiply each scale group of a parameter, and the biases of its filters, in place."""
        weight = parameters[name]
        weight.copy_(self.manifold.act(weight, factors))
        if self.partner is not None:
            bias = parameters[self.partner]
            bias.mul_(factors.repeat_interleave(bias.numel() // len(factors)).reshape(bias.shape))


def candidates(shape: torch.Size, layout: Layout) -> list[Candidate]:
    """Rescalings in the order they are tried: most scale groups first, then those jointly with the bias.

    A scale group of one entry is left out unless a bias joins it: a positive factor is all there is, so it
    has no direction to train.
    """
    if not shape or shape.numel() == 0:
        return []
    rescalings = sorted(_rescalings(shape, layout.conv_groups), key=lambda c: -c.scales)
    alone = [c for c in rescalings if c.scales < shape.numel()]
    joint = [] if layout.partner is None else [replace(c, partner=layout.partner) for c in rescalings]
    return alone + joint


def _rescalings(shape: torch.Size, conv_groups: int) -> Iterator[Candidate]:
    along = [PSI()]
    if len(shape) > 1 and shape[0] % conv_groups == 0:
        # Transposed convolutions, and weights used as x @ w.
        along.append(PSI(dim=1, conv_groups=conv_groups))
    filters = [(psi, scales) for psi in along if (scales := psi.num_scales(shape)) > 1]
    for psi, scales in filters:
        yield Candidate("filter", psi, psi, scales)
    for psi, scales in filters:
        for blocks in _divisors(scales):
            if blocks % psi.conv_groups == 0 or psi.conv_groups % blocks == 0:
                manifold = PSI(dim=psi.dim, groups=blocks, conv_groups=psi.conv_groups)
                yield Candidate("group", manifold, psi, blocks)
    yield Candidate("whole", PSI(groups=1), along[0], 1)


def _divisors(n: int) -> list[int]:
    """Divisors of ``n`` strictly between 1 and ``n``, the largest first."""
    small = [d for d in range(2, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def layouts(model: nn.Module) -> dict[str, Layout]:
    """The layout of every parameter, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {name: Layout() for name in names.values()}
    for layer in model.modules():
        conv_groups = layer.groups if isinstance(layer, _ConvTransposeNd) else 1
        for local, parameter in _parameters_of(layer):
            bias = layer._parameters.get(local.replace("weight", "bias"))
            partner = None if bias is None or bias is parameter else names[id(bias)]
            if partner is not None or conv_groups > 1:
                found[names[id(parameter)]] = Layout(conv_groups, partner)
    return found


def _parameters_of(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of one layer by the names it uses; those behind a parametrization by the tensor's name."""
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            yield name, parameter
    if isinstance(parametrizations := getattr(layer, "parametrizations", None), nn.ModuleDict):
        for name, behind in parametrizations.items():
            for parameter in behind.parameters():
                yield name, parameter
