"""PSIAngular: every filter turns by the learning rate, in radians, whatever the size of its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from ._base import Params, check_range
from ._scale import ScaleBlock, scale_blocks
from ._turning import TurningOptimizer

__all__ = ["PSIAngular"]


class PSIAngular(TurningOptimizer):
    r"""Turn each scale group by a fixed angle, along the average of its gradients' directions.

    .. math::
        \begin{aligned}
        &h \leftarrow g - \tfrac{\langle w, g\rangle}{r^2} w, \qquad
         m \leftarrow \mu\, m + (1 - \mu)\, h / \|h\| \\
        &w \leftarrow \cos\gamma\; w - \sin\gamma\; r\, m / \|m\|
            &&\text{(a geodesic of } \gamma \text{ radians)} \\
        &m \leftarrow \text{parallel transport of } m
        \end{aligned}

    The step depends on directions alone: neither the scale of the weights nor that of the loss matters, and there
    is no decay to tune. The angle does not shrink with the gradient, so the learning rate needs a schedule that
    ends near zero.

    Parameters of a group without a manifold are stepped by torch.optim.SGD with the same momentum.

    Args:
        params: parameters or param groups, as for `retract.optim.PSISGD`.
        lr: angle of a step in radians, below pi / 2.
        momentum: weight of the past in the average, in [0, 1).
        weight_decay: for groups without a manifold only; see `PSISGD`.
        maximize: ascend.
        foreach: stack small weights of equal fan-in (default), or go weight by weight (False).
        euclidean_lr: learning rate of groups without a manifold that do not bring their own.
        check_finite: as for `PSISGD`.

    Raises:
        ValueError: an option out of range, no weight on a manifold, or one on a manifold without scale groups.

    Choices, by measurement on digits (`retract bench angular`, docs/results.md): directions are averaged rather than
    gradients, which ended at a lower training loss at every learning rate, a third of it at the best; one angle per
    filter was ahead of one per layer; without averaging small learning rates hardly train. A scale group whose
    gradient is zero, or lies along the weight to rounding, stays where it is for that step rather than drift along
    an old momentum; on digits no filter died, and the choice made no difference.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.015,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        euclidean_lr: float = 0.3,
        check_finite: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "check_finite": check_finite,
        }
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range and weights without scale groups."""
        super().check_group(group)
        check_range("momentum", group["momentum"], 0, 1)
        if group["manifold"] is not None:
            check_range("lr", float(group["lr"]), 0, math.pi / 2)

    def turn(self, group: dict[str, Any], *, check_finite: bool) -> None:
        """Step one group on its manifold."""
        parameters = self.scaled_parameters(group, ("momentum_buffer", "carry"))
        angle = -group["lr"] if group["maximize"] else group["lr"]
        for block in scale_blocks(parameters, stack=group["foreach"] is None or group["foreach"]):
            _turn_block(block, float(angle), group["momentum"], check_finite)


def _turn_block(block: ScaleBlock, angle: float, momentum: float, check_finite: bool) -> None:
    """The algorithm of `PSIAngular` on one block; momentum is kept as in `PSISGD`, transported when next used."""
    buffer = block.momentum
    assert buffer is not None and block.carry is not None
    radius, tiny = block.radius(), torch.finfo(buffer.dtype).tiny
    horizontal = block.project_(block.grad.clone(), radius)
    signal = block.norm(horizontal)
    if check_finite and not math.isfinite(float(signal.sum())):
        raise FloatingPointError
    buffer.mul_(block.carry * momentum).addcmul_(horizontal, (1 - momentum) / signal.clamp_min(tiny))
    length = block.norm(block.project_(buffer, radius))
    # What is left of a gradient along the weight, a filter of one entry's say, is rounding: no direction to turn in.
    noise = 8 * torch.finfo(buffer.dtype).eps * block.norm(block.grad)
    turns = (signal > noise) & (length > 0) & (radius > tiny)
    angles = turns.to(radius.dtype) * angle
    cosine, sine = angles.cos(), angles.sin_().mul_(radius).div_(length.clamp_min_(tiny))
    block.weight.mul_(cosine).addcmul_(buffer, sine.neg_())
    torch.reciprocal(cosine, out=block.carry)
