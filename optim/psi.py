"""PSISGD: stochastic gradient descent with momentum on weights that are scale-invariant (Yi, UAI 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _fused
from ._base import Params, check_sgd_options
from ._scale import ScaleBlock, ScaledParameter, scale_blocks
from ._turning import TurningOptimizer

__all__ = ["PSISGD", "TRANSPORTS", "psisgd"]

TRANSPORTS = ("parallel", "projection", "horizontal", "paper")


class PSISGD(TurningOptimizer):
    r"""torch.optim.SGD for networks whose weights feed a normalisation: each filter moves on its sphere.

    .. math::
        \begin{aligned}
        &\textbf{for each scale group: weight } w,\ r = \|w\|,\ \text{Euclidean gradient } g,\ \text{momentum } b \\
        &\quad b \leftarrow \mu\, b + (1 - \tau)\,(g - \tfrac{\langle w, g\rangle}{r^2} w)
            &&\text{(first step: } b \leftarrow g\text{, as in torch)} \\
        &\quad d \leftarrow b, \text{ or } g + \mu b \text{ with Nesterov} \\
        &\quad n \leftarrow \sqrt{1 + (\gamma r \|d\|)^2} \\
        &\quad w \leftarrow (w - \gamma r^2 d) / n &&\text{(retraction (8), norm kept)} \\
        &\quad b \leftarrow \text{transport of } b \text{ to the new } w
        \end{aligned}

    Parameters of a group without a manifold are stepped by torch.optim.SGD's own functions, bit for bit.

    The norm of every filter stays what it was: nothing overflows, and BatchNorm's running statistics do not lag.
    The trajectory on the quotient does not depend on that norm. A zero filter is not a point of the manifold; it
    stays zero (so pruning survives).

    Args:
        params: parameters or param groups; a weight's manifold is the key ``manifold`` of its group
            (`retract.nets.scale_invariant_groups`) or that of its `geoopt.ManifoldParameter`
            (`retract.nets.register_scale_invariant`).
        lr: on the manifold, radians per unit of gradient at unit norm: a filter turns by
            ``atan(lr * |w| * |d|)``. Elsewhere SGD's learning rate.
        momentum, dampening, nesterov, maximize: as in torch.optim.SGD. The learning rate multiplies the step, not
            the buffer: after a drop of ``lr`` the velocity drops at once (the paper's Algorithm 1 keeps the old
            one for about ``1 / (1 - momentum)`` steps; for constant ``lr`` both are the same).
        weight_decay: acts on groups without a manifold only. On scale-invariant weights decay can do no more than
            change their norm, which the manifold fixes; a group that would have had it warns once.
        foreach: True stacks small weights of equal fan-in, False goes weight by weight.
        fused: True steps all weights in one pass over memory, by a small C kernel that is compiled at first use (CPU,
            float32 and float64; needs a C compiler). With neither given: the kernel if it can be had, else foreach.
        transport: how momentum follows the weight. ``"parallel"``: along the geodesic, length kept.
            ``"projection"``: made tangent at the new point (geoopt's Sphere). ``"horizontal"``: the same at free
            norm, where it also shrinks by the growth of the norm. ``"paper"``: Algorithm 1 to the letter, buffer
            untouched at free norm; its radial part is kept.
        euclidean_lr: learning rate of groups without a manifold that do not bring their own; default ``lr``.
        check_finite: raise FloatingPointError, naming the parameter, before a gradient that is NaN or infinite
            moves its scale group. ``None``: on the CPU, where looking costs no synchronisation. Other weights may
            have moved by then.

    Raises:
        ValueError: an option out of range, no weight on a manifold, or one on a manifold without scale groups.

    Source: Yi 2022, Algorithm 1, in the gauge of fixed norms; parallel transport closes its Remark 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        transport: str = "parallel",
        euclidean_lr: float | None = None,
        check_finite: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "transport": transport,
            "check_finite": check_finite,
        }
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range and weights without scale groups."""
        super().check_group(group)
        check_sgd_options(group)
        if group["transport"] not in TRANSPORTS:
            raise ValueError(f"transport must be one of {TRANSPORTS}, got {group['transport']!r}")

    def turn(self, group: dict[str, Any], *, check_finite: bool) -> None:
        """Step one group on its manifold."""
        parameters = self.scaled_parameters(group, ("momentum_buffer", "carry") if group["momentum"] else ())
        options = {key: group[key] for key in ("momentum", "nesterov", "transport", "foreach", "fused")}
        options["lr"] = -group["lr"] if group["maximize"] else group["lr"]
        if group["dampening"]:  # not on the first gradient, as in torch
            fresh = [p for p in parameters if p.fresh]
            psisgd(fresh, dampening=0, check_finite=check_finite, **options)
            parameters = [p for p in parameters if not p.fresh]
        psisgd(parameters, dampening=group["dampening"], check_finite=check_finite, **options)


class Rule(NamedTuple):
    """The numbers of a step, the same for all parameters; see `PSISGD`. A negative ``lr`` ascends."""

    lr: float | Tensor
    momentum: float
    dampening: float
    nesterov: bool
    transport: str
    check_finite: bool


def psisgd(
    parameters: Sequence[ScaledParameter],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    nesterov: bool,
    transport: str,
    foreach: bool | None = None,
    fused: bool | None = None,
    check_finite: bool = False,
) -> None:
    """Functional form of `PSISGD`: update weights, momenta and carry factors in place."""
    rule = Rule(lr, momentum, dampening, nesterov, transport, check_finite)
    if _fused.wanted(parameters, foreach, fused):
        _fused_psisgd(parameters, rule)
    elif foreach is None or foreach:
        _multi_tensor_psisgd(parameters, rule)
    else:
        _single_tensor_psisgd(parameters, rule)


def _single_tensor_psisgd(parameters: Sequence[ScaledParameter], rule: Rule) -> None:
    for block in scale_blocks(parameters, stack=False):
        _turn_block(block, rule)


def _multi_tensor_psisgd(parameters: Sequence[ScaledParameter], rule: Rule) -> None:
    for block in scale_blocks(parameters, stack=True):
        _turn_block(block, rule)


def _fused_psisgd(parameters: Sequence[ScaledParameter], rule: Rule) -> None:
    options = _fused.Options(
        rule=_fused.SGD,
        lr=float(rule.lr),
        momentum=rule.momentum,
        dampening=rule.dampening,
        nesterov=rule.nesterov,
        transport=TRANSPORTS.index(rule.transport),
        check_finite=rule.check_finite,
    )
    _single_tensor_psisgd(_fused.turn(parameters, options), rule)


def _turn_block(block: ScaleBlock, rule: Rule) -> None:
    """The algorithm of `PSISGD` on one block.

    Momentum is stored as it was before its transport; ``carry`` tells what it is worth at the new weight, and the
    next step's projection of carried momentum plus gradient completes the transport. This is exact: along the
    geodesic that a vector itself spans, its parallel transport is ``n`` times its projection at the end.
    """
    lr, momentum, dampening, nesterov, transport, check_finite = rule
    radius = block.radius()
    buffer, tangent = block.momentum, transport != "paper"
    if buffer is None:
        direction = block.grad.clone()
    else:
        assert block.carry is not None
        keep = block.carry * momentum
        if dampening:
            buffer.mul_(keep).add_(block.grad, alpha=1 - dampening)
        else:
            torch.addcmul(block.grad, buffer, keep, out=buffer)
        if nesterov and tangent:
            block.project_(buffer, radius)
        direction = torch.add(block.grad, buffer, alpha=momentum) if nesterov else buffer
    if tangent:
        block.project_(direction, radius)
    slope = block.norm(direction).mul_(radius)
    if check_finite and not math.isfinite(float(slope.sum())):
        raise FloatingPointError
    advance = radius.square().mul_(-lr)
    if tangent:
        stretch = torch.hypot(slope.mul_(lr), torch.ones_like(slope))
        if buffer is not None and block.carry is not None:
            block.carry.copy_(_carry(block, direction, stretch, nesterov, transport))
        block.weight.div_(stretch).addcmul_(direction, advance.div_(stretch))
    else:
        block.weight.addcmul_(direction, advance)
        stretch = block.radius().div_(radius)
        block.weight.div_(stretch)
        if block.carry is not None:
            torch.reciprocal(stretch, out=block.carry)


def _carry(block: ScaleBlock, direction: Tensor, stretch: Tensor, nesterov: bool, transport: str) -> Tensor:
    """What a unit of momentum is worth after the step, before its projection at the new weight."""
    if transport == "projection":
        return torch.ones_like(stretch)
    if transport == "horizontal":
        return 1 / stretch
    if not nesterov:
        return stretch
    # The momentum is not along the step: only its part along `direction` is stretched by n, the rest stays as it is.
    assert block.momentum is not None
    square = block.dot(direction, direction).clamp_min_(torch.finfo(stretch.dtype).tiny)
    block.momentum.addcmul_(direction, block.dot(block.momentum, direction).div_(square).mul_(stretch - 1))
    return torch.ones_like(stretch)
