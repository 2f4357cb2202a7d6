"""The initializations that `retract bench init` compares: ours, torch's taken core by core, and tensorly-torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import tensorly
import torch
from torch import Tensor, nn

from retract.nets.init.tensor import tensor_kaiming_
from retract.nets.layers.tensor import TensorConv2d
from retract.nets.layers.tensor_network import TensorNetwork

__all__ = ["INITIALIZATIONS", "TENSORLY_TORCH", "TRAINED", "Initialization", "knows"]

Initialization = Callable[[TensorConv2d, str, int | None], None]
"""Draws the cores of a layer, given its format (a key of `retract.nets.layers.tensor_formats.FORMATS`, or another name)
and the height and width of its input, if these are to count.
"""

TENSORLY_TORCH = {"cp": "cp", "tucker": "tucker", "tucker2": "tucker", "tensor_train": "tt"}
"""Its factorization of a convolution for ours; it knows no others."""


def _ours(layer: TensorConv2d, format: str, input_size: int | None, distribution: Any) -> None:
    tensor_kaiming_(layer, distribution=distribution, input_size=input_size)


def _core_by_core(layer: TensorConv2d, format: str, input_size: int | None, draw: Callable[[Tensor], object]) -> None:
    """What torch's initializations do to parameters that nobody told them are cores of one weight."""
    for core in layer.cores:
        draw(core)


def _tensorly_torch(layer: TensorConv2d, format: str, input_size: int | None, informed: bool) -> None:
    """The cores that tensorly-torch draws for a convolution of this format and these ranks.

    Its Tucker-2 convolution is a Tucker one with spatial ranks that are full; here those factors are absorbed by the
    core, which leaves its weight as it is.

    Args:
        layer: to be initialized.
        format: a key of `TENSORLY_TORCH`.
        input_size: is of no account.
        informed: give `tltorch.init` the standard deviation of He et al., ICCV 2015, which it does not know of itself;
            else leave it all to the layer's ``reset_parameters``.
    """
    with tensorly.backend_context("pytorch"):  # importing tltorch sets the backend for good
        import tltorch

        network = layer.network
        rank: Any = {
            "cp": network.bond_product,
            "tucker": [network.dims[bond] for bond in network.bonds],
            "tucker2": [*(network.dims[bond] for bond in network.bonds), *network.kernel_size],
            "tensor_train": [1, *(network.dims[bond] for bond in network.bonds), 1],
        }[format]
        theirs = tltorch.FactorizedConv(
            network.in_features,
            network.out_features,
            network.kernel_size,
            order=len(network.kernel_size),
            factorization=TENSORLY_TORCH[format],
            rank=rank,
        )
        if informed:
            tltorch.init.tensor_init(theirs.weight, std=math.sqrt(2 / _fan_in(network)))
        else:
            theirs.reset_parameters()
        drawn = [factor.detach() for factor in theirs.weight.factors]
    if format == "tucker":
        drawn.append(theirs.weight.core.detach())
    elif format == "tucker2":
        core = torch.einsum("pqst,hs,wt->pqhw", theirs.weight.core.detach(), *drawn[2:])
        drawn = [drawn[0], core, drawn[1]]
    with torch.no_grad():
        for core, values in zip(layer.cores, drawn, strict=True):
            core.copy_(values.reshape(core.shape))  # the ends of its tensor trains have a bond of size 1


def _fan_in(network: TensorNetwork) -> int:
    return network.in_features * math.prod(network.kernel_size)


INITIALIZATIONS: dict[str, Initialization] = {
    "ours, orthogonal": partial(_ours, distribution="orthogonal"),
    "ours, normal": partial(_ours, distribution="normal"),
    "ours, uniform": partial(_ours, distribution="uniform"),
    "each core kaiming_normal_": partial(_core_by_core, draw=nn.init.kaiming_normal_),
    "each core xavier_normal_": partial(_core_by_core, draw=nn.init.xavier_normal_),
    "each core as torch's conv": partial(_core_by_core, draw=partial(nn.init.kaiming_uniform_, a=math.sqrt(5))),
    "tltorch reset_parameters": partial(_tensorly_torch, informed=False),
    "tltorch.init, He's std": partial(_tensorly_torch, informed=True),
}
"""By the name that tables show; the first is our default."""

TRAINED = tuple(
    name for name in INITIALIZATIONS if name not in ("ours, normal", "ours, uniform", "each core as torch's conv")
)
"""Those that networks are trained from."""


def knows(initialization: str, format: str) -> bool:
    """Whether there is such an initialization of a format: tensorly-torch has few of them."""
    return not initialization.startswith("tltorch") or format in TENSORLY_TORCH
