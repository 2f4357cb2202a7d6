"""Losses of generative adversarial networks, on the discriminator's scores: higher means more like the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOSSES", "AdversarialLoss", "gradient_penalty"]


@dataclass(frozen=True)
class AdversarialLoss:
    """``discriminator(real, generated)`` and ``generator(generated)``, of scores (N,), are what each minimises."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


LOSSES: dict[str, AdversarialLoss] = {
    # Lim and Ye, "Geometric GAN", 2017; Miyato et al., ICLR 2018, eq. (16) and (17).
    "hinge": AdversarialLoss(
        lambda real, generated: F.relu(1 - real).mean() + F.relu(1 + generated).mean(),
        lambda generated: -generated.mean(),
    ),
    # Goodfellow et al., NeurIPS 2014, section 3, with log D = -softplus(-score).
    "non-saturating": AdversarialLoss(
        lambda real, generated: F.softplus(-real).mean() + F.softplus(generated).mean(),
        lambda generated: F.softplus(-generated).mean(),
    ),
}
"""Losses by name."""


def gradient_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """R1: half the mean squared norm of the gradient of each score in its own image, E |grad_x D(x)|^2 / 2.

    Args:
        scores: (N,), of ``images``; each one may depend on its own image alone.
        images: (N, C, H, W), which require gradients.

    Returns:
        A scalar in float32, of which gradients can be taken.

    Source: Mescheder, Geiger, Nowozin, "Which training methods for GANs do actually converge?", ICML 2018, eq. (9).
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean() / 2
