"""PSIAdam: Adam on scale-invariant weights, with one second moment per filter."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from . import _fused
from ._base import Params, check_range
from ._scale import ScaleBlock, ScaledParameter, scale_blocks
from ._turning import TurningOptimizer

__all__ = ["PSIAdam"]


class PSIAdam(TurningOptimizer):
    r"""Adam in the metric of the quotient: one second moment per scale group, of the Riemannian gradient's length.

    .. math::
        \begin{aligned}
        &m \leftarrow \beta_1 m + (1 - \beta_1)\, (g - \tfrac{\langle w, g\rangle}{r^2} w) \\
        &v \leftarrow \beta_2 v + (1 - \beta_2)\, (r \|g\|)^2 &&\text{(one number per scale group)} \\
        &t \leftarrow \gamma\, \frac{r \|m\| / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon} \\
        &w \leftarrow (w - t\, r\, m / \|m\|) / \sqrt{1 + t^2} &&\text{(turns by } \arctan t \text{ radians)} \\
        &m \leftarrow \text{parallel transport of } m
        \end{aligned}

    Every term is a scalar per scale group times a vector that scales with the weight, so the method is equivariant
    under rescaling, which Adam on the entries of a weight is not. State: one buffer of the
    weight's size and two numbers per scale group.

    Parameters of a group without a manifold are stepped by torch.optim.SGD with momentum ``betas[0]``.

    Args:
        params: parameters or param groups, as for `retract.optim.PSISGD`.
        lr: the angle in radians by which a filter turns whose gradients all point one way; noise makes it smaller.
        betas: decay rates of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment, in units of gradient at unit norm.
        weight_decay: for groups without a manifold only; see `PSISGD`.
        maximize: ascend.
        foreach, fused: as for `PSISGD`.
        euclidean_lr: learning rate of groups without a manifold that do not bring their own.
        check_finite: as for `PSISGD`.

    Raises:
        ValueError: an option out of range, no weight on a manifold, or one on a manifold without scale groups.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
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
            "betas": betas,
            "eps": eps,
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
        for index, beta in enumerate(group["betas"]):
            check_range(f"betas[{index}]", beta, 0, 1)
        check_range("eps", group["eps"], 0)

    def momentum_of(self, group: dict[str, Any]) -> float:
        """Groups without a manifold take SGD with the first moment's decay as momentum."""
        return float(group["betas"][0])

    def turn(self, group: dict[str, Any], *, check_finite: bool) -> None:
        """Step one group on its manifold."""
        stack = group["foreach"] is None or group["foreach"]
        for age, aged in self._by_age(group).items():
            parameters = aged
            if _fused.wanted(aged, group["foreach"], group["fused"]):
                parameters = _fused.turn(aged, _options(group, age, check_finite))
            for block in scale_blocks(parameters, stack=stack):
                _turn_block(block, group, age, check_finite)

    def _by_age(self, group: dict[str, Any]) -> dict[int, list[ScaledParameter]]:
        """Parameters by how many steps they have taken, this one included: their bias corrections are the same."""
        moved = [p for p in group["params"] if p.grad is not None]
        parameters = self.scaled_parameters(group, ("momentum_buffer", "carry", "square"))
        ages: dict[int, list[ScaledParameter]] = defaultdict(list)
        for p, parameter in zip(moved, parameters, strict=True):
            age = self.state[p].setdefault("step", torch.zeros(()))  # on the CPU: reading it synchronises nothing
            age += 1
            ages[int(age)].append(parameter)
        return ages


def _options(group: dict[str, Any], age: int, check_finite: bool) -> _fused.Options:
    (beta1, beta2), rate = group["betas"], float(-group["lr"] if group["maximize"] else group["lr"])
    return _fused.Options(
        rule=_fused.ADAM,
        lr=rate / (1 - beta1**age),
        momentum=beta1,
        second=beta2,
        correction=1 - beta2**age,
        eps=group["eps"],
        check_finite=check_finite,
    )


def _turn_block(block: ScaleBlock, group: dict[str, Any], age: int, check_finite: bool) -> None:
    """The algorithm of `PSIAdam` on one block; momentum is kept as in `PSISGD`, transported when next used."""
    buffer, square = block.momentum, block.square
    assert buffer is not None and square is not None and block.carry is not None
    (beta1, beta2), rate = group["betas"], -group["lr"] if group["maximize"] else group["lr"]
    radius = block.radius()
    buffer.mul_(block.carry * beta1).add_(block.grad, alpha=1 - beta1)
    length = block.norm(block.project_(buffer, radius)).mul_(radius)
    if check_finite and not math.isfinite(float(length.sum())):
        raise FloatingPointError
    square.mul_(beta2).add_(block.norm(block.grad).mul_(radius).square_(), alpha=1 - beta2)
    root = (square / (1 - beta2**age)).sqrt_().add_(group["eps"])
    pace = rate / (1 - beta1**age) / root.clamp_min_(torch.finfo(root.dtype).tiny)
    stretch = torch.hypot(length.mul_(pace), torch.ones_like(length))
    block.weight.div_(stretch).addcmul_(buffer, radius.square_().mul_(pace).div_(stretch).neg_())
    block.carry.copy_(stretch)
