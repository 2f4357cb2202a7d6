"""The moving average of a generator, which makes its samples."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from retract.nets.parametrizations.models import manifold_groups

__all__ = ["averaged"]


def averaged(generator: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a generator, to be updated after each of its steps.

    Buffers are averaged too: the statistics of BatchNorm belong to the weights. The first update copies.

    Raises:
        ValueError: a decay outside [0, 1), or weights in Stiefel form.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema must be in [0, 1), got {decay}")
    if any("manifold" in group for group in manifold_groups(generator)):
        raise ValueError("ema must be None for a generator in Stiefel form: the average of two frames is not a frame")
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.eval().requires_grad_(False)
