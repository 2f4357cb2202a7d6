"""What a record says of a discriminator's spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from retract.nets.gan.lipschitz import lipschitz_bound
from retract.nets.gan.spectra import singular_values, spectrum_violation

from ..training import DivergedError

__all__ = ["LAYER_FIGURES", "spectra", "stable_rank"]

LAYER_FIGURES = ("largest", "least", "stable_rank")


def spectra(discriminator: nn.Module, image_shape: Sequence[int]) -> dict[str, Any]:
    """Singular values of every layer in figures, and the Lipschitz bound of the whole network; changes no state.

    Args:
        discriminator: a network that `retract.nets.gan.lipschitz_bound` takes.
        image_shape: (C, H, W).

    Returns:
        ``"spectra"``: by name of the layer ``LAYER_FIGURES``: the largest singular value, the least (of a factored
        weight of rank r, the r-th) and the stable rank; ``"spectrum_violation"``: how far a singular value is from
        what the constraint allows; ``"lipschitz_bound"``. Plain values.

    Raises:
        DivergedError: one of them is not finite.
    """
    values = singular_values(discriminator)
    layers = {name: _figures(s) for name, s in values.items()}
    whole = {
        "spectrum_violation": spectrum_violation(discriminator, values),
        "lipschitz_bound": lipschitz_bound(discriminator, image_shape),
    }
    for name, figure in (*((name, figures["largest"]) for name, figures in layers.items()), *whole.items()):
        if not math.isfinite(figure):
            raise DivergedError(f"training diverged: {name} of the discriminator is {figure}. Lower the learning rates")
    return {"spectra": layers, **whole}


def stable_rank(values: Tensor) -> Tensor:
    """|W|_F^2 / |W|_2^2 of a matrix with these singular values (r,), in descending order: 1 to r; 0 if all are 0."""
    relative = values / values[0].clamp(min=1e-30)
    return relative.square().sum()


def _figures(values: Tensor) -> dict[str, float]:
    return {"largest": values[0].item(), "least": values[-1].item(), "stable_rank": stable_rank(values).item()}
