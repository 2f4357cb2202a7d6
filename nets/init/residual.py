"""The scale of residual branches in networks without normalisation.

A residual block adds the second moment of its branch to that of its input. L blocks, with branches that keep second
moments, multiply them by 2^L; with branches scaled by 1/sqrt(L), by (1 + 1/L)^L < e, whatever the depth. (Hanin and
Rolnick, "How to start training: the effect of initialization and architecture", NeurIPS 2018; Zhang, Dauphin, Ma,
"Fixup initialization", ICLR 2019, choose other scales for the same end.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

__all__ = ["scale_residual_branches_"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@torch.no_grad()
def scale_residual_branches_(branches: Iterable[nn.Module], *, scale: float | None = None) -> list[nn.Module]:
    """Multiply the output of every residual branch by 1/sqrt(number of branches), in the weights of its last layer.

    Call it once, after the layers have been initialized, with all branches of the network:
    ``scale_residual_branches_([block.branch for block in blocks])``. What is multiplied in a last layer:

    - a plain layer: its weight;
    - a layer of n cores (`TensorConv2d`, `TensorLinear`): each core by the n-th root, so that norms stay balanced;
    - a canonical weight: its fixed scale sigma, so that lambda starts as ever;
    - another parametrized weight: what is stored for the product, if the parametrization can hold it (weight
      normalization can; spectral normalization and prescribed singular values cannot).

    The bias is multiplied too.

    Args:
        branches: one module each. The last layer is the module itself if it is a linear layer, a convolution or a
            layer of cores, and else the last such layer that it contains, in the order of registration: give the layer
            where the order of computation is another.
        scale: another factor than 1/sqrt(L), positive. Zero would cut off the gradients of all but the last layers,
            and for good if those have two cores or more.

    Returns:
        The last layers.

    Raises:
        ValueError: no branches; a branch without layers, or with a normalisation after its last layer, which would
            undo the scale; a layer in two branches; a weight that cannot take the scale. Nothing has changed then.
        TypeError: a branch that is no module.
    """
    layers = [_last_layer(branch) for branch in branches]
    if not layers:
        raise ValueError("branches must hold at least one module, got none")
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError("branches must end in different layers, got the same last layer in two of them")
    if scale is None:
        scale = 1 / math.sqrt(len(layers))
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    before = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]
    try:
        for layer in layers:
            _scale(layer, scale)
    except ValueError:
        for layer, state in zip(layers, before, strict=True):
            layer.load_state_dict(state)
        raise
    return layers


def _last_layer(branch: nn.Module) -> nn.Module:
    if not isinstance(branch, nn.Module):
        raise TypeError(f"branches must be modules, got {type(branch).__name__}")
    last: nn.Module | None = None
    after: nn.Module | None = None
    for module in branch.modules():
        if isinstance(module, nn.Linear | _ConvNd) or _has_cores(module):
            last, after = module, None
        elif isinstance(module, _NORMS):
            after = module
    if last is None:
        raise ValueError(f"branch {type(branch).__name__} has no linear layer, convolution or layer of cores")
    if after is not None:
        raise ValueError(
            f"branch {type(branch).__name__} ends in {type(after).__name__}, which undoes a scale before it"
        )
    return last


def _has_cores(module: nn.Module) -> bool:
    """Layers of a tensor network are known by their attributes: their own module imports this package."""
    return hasattr(module, "network") and hasattr(module, "cores")


def _scale(layer: Any, scale: float) -> None:
    if _has_cores(layer):
        for core in layer.cores:
            core.mul_(scale ** (1 / len(layer.cores)))
    else:
        _scale_parameter(layer, "weight", scale)
    if layer.bias is not None:
        _scale_parameter(layer, "bias", scale)


def _scale_parameter(layer: Any, name: str, scale: float) -> None:
    if not parametrize.is_parametrized(layer, name):
        parameter = getattr(layer, name)
        if not isinstance(parameter, nn.Parameter):
            raise ValueError(f"{name} of {type(layer).__name__} is no parameter: scale what it is computed from")
        parameter.mul_(scale)
        return
    # Not at the top: that package imports the layers, and those their initializations from here.
    from retract.nets.parametrizations.canonical import canonical_weight

    canonical = canonical_weight(layer, name)
    if canonical is not None and len(layer.parametrizations[name]) == 1:
        canonical[0].sigma.mul_(scale)
        return
    wanted = getattr(layer, name) * scale
    try:
        setattr(layer, name, wanted)
    except (NotImplementedError, RuntimeError) as reason:
        raise ValueError(f"{name} of {type(layer).__name__} cannot be scaled: {reason}") from reason
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5
    if not torch.linalg.vector_norm(getattr(layer, name) - wanted) <= tolerance * torch.linalg.vector_norm(wanted):
        kinds = ", ".join(type(kind).__name__ for kind in layer.parametrizations[name])
        raise ValueError(f"{name} of {type(layer).__name__} cannot be scaled by {scale:.3g}: {kinds} cannot hold it")
