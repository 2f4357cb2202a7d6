"""Pressure on the weights of rank-one terms, so that truncation has something to cut."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from retract.manifolds.cp_truncation import soft_threshold

from .parametrizations.models import canonical_weights

__all__ = ["canonical_penalty", "shrink_terms_"]

_NONE = "model has no canonical layer: see retract.nets.parametrizations.canonical_weight_norm"


def canonical_penalty(model: nn.Module) -> Tensor:
    """Sum of |sigma lambda_r| over all terms of all canonical layers, to be added to a loss: a differentiable scalar.

    Its gradient makes weights small, but hardly ever zero: `shrink_terms_` does.

    Raises:
        ValueError: no canonical layer.
    """
    sums = [
        (originals[0] * canonical.sigma.to(originals[0])).abs().sum()
        for _, canonical, originals in canonical_weights(model)
    ]
    if not sums:
        raise ValueError(_NONE)
    return torch.stack([total.to(sums[0]) for total in sums]).sum()


@torch.no_grad()
def shrink_terms_(model: nn.Module, threshold: float) -> None:
    """Proximal step of ``threshold`` times `canonical_penalty`, in place: every |lambda| less threshold * sigma.

    Weights that were below become exactly zero. Their terms stay in the model, and may come back by a gradient;
    ``truncate(model, error=0)`` removes those that are zero. After a step of SGD with learning rate lr, a threshold of
    ``lr * strength`` makes it a step of the proximal gradient method for loss + strength * penalty; after Adam
    the pressure is the same for all terms, whatever their gradients, as weight decay is in AdamW.

    Args:
        model: network with canonical layers.
        threshold: finite and not negative.

    Raises:
        ValueError: another threshold, or no canonical layer.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be finite and >= 0, got {threshold}")
    found = False
    for _, canonical, (weights, *_) in canonical_weights(model):
        weights.copy_(soft_threshold(weights, threshold * canonical.sigma.to(weights).abs()))
        found = True
    if not found:
        raise ValueError(_NONE)
