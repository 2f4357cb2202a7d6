"""PSIAngular: every filter turns by the learning rate, in radians, whatever the size of its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import _fused
from ._base import Params, check_range
from ._scale import ScaleBlock, scale_blocks
from ._turning import TurningOptimizer

__all__ = ["PSIAngular"]


class PSIAngular(TurningOptimizer):
    r"""Turn each scale group by a fixed angle, along the average of its gradients' directions.

    .. math::
        \begin{aligned}
        &m \leftarrow \mu\, m + (1 - \mu)\, (g - \tfrac{\langle w, g\rangle}{r^2} w) / \|g\| \\
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
        foreach, fused: as for `PSISGD`.
        euclidean_lr: learning rate of groups without a manifold that do not bring their own.
        check_finite: as for `PSISGD`.

    Raises:
        ValueError: an option out of range, no weight on a manifold, or one on a manifold without scale groups.

    Choices, by measurement on digits (`retract bench angular`, docs/results.md): directions are averaged rather than
    gradients, which ended at a lower training loss at every learning rate, a third of it at the best; one angle per
    filter was ahead of one per layer; without averaging small learning rates hardly train. A scale group whose
    gradient is zero stays where it is for that step rather than drift along an old momentum (on digits no filter
    died, and the choice made no difference), and so does one whose average holds nothing but rounding.
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
        fused: bool | None = None,
        euclidean_lr: float = 0.3,
        check_finite: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
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
        angle, momentum = float(-group["lr"] if group["maximize"] else group["lr"]), group["momentum"]
        stack = group["foreach"] is None or group["foreach"]
        if _fused.wanted(parameters, group["foreach"], group["fused"]):
            options = _fused.Options(rule=_fused.ANGULAR, lr=angle, momentum=momentum, check_finite=check_finite)
            parameters = _fused.turn(parameters, options)
        for block in scale_blocks(parameters, stack=stack):
            _turn_block(block, angle, momentum, check_finite)


def _turn_block(block: ScaleBlock, angle: float, momentum: float, check_finite: bool) -> None:
    """The algorithm of `PSIAngular` on one block; momentum is kept as in `PSISGD`, transported when next used."""
    buffer = block.momentum
    assert buffer is not None and block.carry is not None
    radius, signal, numbers = block.radius(), block.norm(block.grad), torch.finfo(buffer.dtype)
    if check_finite and not math.isfinite(float(signal.sum())):
        raise FloatingPointError
    buffer.mul_(block.carry * momentum).addcmul_(block.grad, (1 - momentum) / signal.clamp_min(numbers.tiny))
    length = block.norm(block.project_(buffer, radius))
    # The buffer averages unit vectors: what rounding leaves of those along the weight is no direction to turn in.
    turns = (signal > 0) & (length > 16 * numbers.eps) & (radius > numbers.tiny)
    angles = turns.to(radius.dtype) * angle
    cosine, sine = angles.cos(), angles.sin_().mul_(radius).div_(length.clamp_min_(numbers.tiny))
    block.weight.mul_(cosine).addcmul_(buffer, sine.neg_())
    torch.reciprocal(cosine, out=block.carry)
