"""Low-rank layers for their tests: the unfoldings, convolutions by dimensions, random factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retract.nets.layers.low_rank import LowRankConv1d, LowRankConv2d, LowRankConv3d

CONVOLUTIONS: dict[int, Any] = {1: LowRankConv1d, 2: LowRankConv2d, 3: LowRankConv3d}
UNFOLDINGS = ("output", "input", "separable")
unfoldings = pytest.mark.parametrize("unfolding", UNFOLDINGS)


def randomized(layer: Any) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer
