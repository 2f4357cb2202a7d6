r"""Frobenius decay: weight decay of the product of factors, and not of each factor by itself.

.. math:: \tfrac{c}{2} \lVert U V \rVert_F^2 = \tfrac{c}{2} \sum_{ij} (U^\top U)_{ij} (V V^\top)_{ij}

is what a decay of c would add to the loss of the dense layer. Decaying the factors themselves penalises the nuclear
norm of the product instead, since the least :math:`(\lVert U \rVert^2 + \lVert V \rVert^2) / 2` of all factors of W is
the sum of its singular values. No matrix larger than the factors is ever made.

`frobenius_penalty` is a term of the loss; `retract.optim.FrobeniusDecay` takes the step apart from it, as AdamW does.

Source: Khodak, Tenenholtz, Mackey, Fusi, "Initialization and regularization of factorized neural layers", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from string import ascii_letters
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._layers import is_tensor_layer
from .layers.low_rank import LowRankLayer
from .layers.tensor_network import TensorNetwork
from .parametrizations._base import autocast_off, widened
from .parametrizations.models import spectral_weights

__all__ = ["factor_pairs", "frobenius_groups", "frobenius_penalty"]


def frobenius_penalty(model: nn.Module, coefficient: float = 1.0) -> Tensor:
    """Half the squared Frobenius norm of all factored weights of a model, times a coefficient, to add to its loss.

    Counted are low-rank layers, layers with spectral weights (`svdp`, `sttp`: the sum of their squared singular values)
    and tensor layers (contracted with themselves), each once; all other parameters are not.

    Args:
        model: network with such layers, or one of them.
        coefficient: as weight decay would have it in the dense layers.

    Returns:
        A scalar, at least in float32.

    Raises:
        ValueError: no such layer, or a coefficient that is not positive.
    """
    if not coefficient > 0:
        raise ValueError(f"coefficient must be positive, got {coefficient!r}")
    squares = list(_squared_norms(model))
    if not squares:
        raise ValueError(
            "model has no factored weight: it needs a low-rank layer (LowRankLinear, LowRankConv2d, ...), a tensor "
            "layer, or one parametrized by svdp or sttp"
        )
    return coefficient / 2 * torch.stack(squares).sum()


def factor_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Left and right factors of the low-rank layers of a model, each pair once, as `FrobeniusDecay` takes them."""
    pairs = [(layer.left, layer.right) for layer in model.modules() if isinstance(layer, LowRankLayer)]
    return list({(id(left), id(right)): (left, right) for left, right in pairs}.values())


def frobenius_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Param groups for any optimizer in which ordinary weight decay leaves the factors of low-rank layers alone.

    With `retract.optim.FrobeniusDecay` for those, at the same coefficient::

        optimizer = torch.optim.SGD(frobenius_groups(model, 1e-4), lr=0.1, momentum=0.9)
        FrobeniusDecay(optimizer, factor_pairs(model), 1e-4)

    Args:
        model: network with low-rank layers.
        weight_decay: of all other parameters.

    Returns:
        A group of the factors, and one of the other parameters if there are any; both of pairs (name, parameter).

    Raises:
        ValueError: no low-rank layer, or a negative decay.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}")
    factors = {id(factor) for pair in factor_pairs(model) for factor in pair}
    if not factors:
        raise ValueError("model has no low-rank layer, such as LowRankLinear or LowRankConv2d")
    named = list(model.named_parameters())
    groups = [
        {"params": [one for one in named if id(one[1]) in factors], "weight_decay": 0.0},
        {"params": [one for one in named if id(one[1]) not in factors], "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _squared_norms(model: nn.Module) -> Iterator[Tensor]:
    for left, right in factor_pairs(model):
        yield _squared_norm_of_product(left, right)
    for _, parametrization, originals in spectral_weights(model):
        yield parametrization.singular_values(*originals).square().sum()
    for layer in model.modules():
        if is_tensor_layer(layer):
            found = cast(Any, layer)
            yield _squared_norm_of_network(found.network, list(found.cores))


def _squared_norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """Squared norm of ``left @ right``, summed over a leading dimension of both if there is one."""
    left, right = widened((left, right))
    with autocast_off(left):
        return torch.sum((left.mT @ left) * (right @ right.mT))


def _squared_norm_of_network(network: TensorNetwork, cores: list[Tensor]) -> Tensor:
    """Squared norm of a network's weight: the network times itself, along the cheapest path."""
    wide = widened(cores)
    with autocast_off(wide[0]):
        return _doubled(network).weight(wide + wide).squeeze()


@lru_cache(maxsize=1024)
def _doubled(network: TensorNetwork) -> TensorNetwork:
    """A network beside a copy of it, with bonds of its own: all indices are summed."""
    free = (letter for letter in ascii_letters if letter not in network.dims)
    names = dict(zip(network.bonds, free, strict=False))
    copies = ["".join(names.get(label, label) for label in core) for core in network.cores]
    dims = {**network.dims, **{names[bond]: network.dims[bond] for bond in network.bonds}}
    return TensorNetwork([*network.cores, *copies], dims, inputs="", outputs="")
