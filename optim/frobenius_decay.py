"""Decoupled Frobenius decay: the weight decay of a product of factors, as a step of its own after the optimizer's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._base import is_euclidean, parameter_name

__all__ = ["FrobeniusDecay"]

_HALF = (torch.float16, torch.bfloat16)


class FrobeniusDecay:
    r"""Decay the products U V of pairs of parameters after every step of any optimizer, apart from its gradients.

    After each step, with the learning rate that each factor's param group has at that time,

    .. math::
        U \leftarrow U - \eta_U \, c \, U (V V^\top), \qquad V \leftarrow V - \eta_V \, c \, (U^\top U) V,

    both from the old values: one gradient step on :math:`\tfrac{c}{2} \lVert U V \rVert_F^2` alone, which neither
    momentum nor second moments see (as the decay of AdamW: Loshchilov and Hutter, ICLR 2019). It makes Gram matrices
    (r, r) and one temporary of a factor's size at a time, and waits for no device. Like torch's own decay it leaves
    a factor without gradient alone. The learning rate times c times the largest squared singular value of the other
    factor must stay below 2, or the step overshoots.

    The optimizer's state dict is what it is without it. A copy of the optimizer (`copy.deepcopy`, `pickle`) has no
    hooks, so it needs another one of these.

    Args:
        optimizer: of torch or of this package. Its groups must not decay the factors by themselves:
            `retract.nets.frobenius_decay.frobenius_groups` makes groups that do not.
        pairs: factors (rows, r) and (r, columns), or stacks of as many (groups, rows, r) and (groups, r, columns):
            `retract.nets.frobenius_decay.factor_pairs`. Of each pair the optimizer has one at least.
        coefficient: c, as the weight decay of dense layers; may be assigned at any time.

    Raises:
        ValueError: no pairs; shapes that have no product; a pair of which the optimizer has neither; a group with
            weight decay, on a manifold or without learning rate; a coefficient that is negative or not finite.

    Source: Khodak, Tenenholtz, Mackey, Fusi, ICLR 2021 (there as part of the gradient).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, pairs: Iterable[tuple[Tensor, Tensor]], coefficient: float
    ) -> None:
        self.coefficient = coefficient
        # Places of groups, not groups: loading a state dict makes new ones, in the same order.
        places = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._pairs = [(left, right, places.get(id(left)), places.get(id(right))) for left, right in pairs]
        if not self._pairs:
            raise ValueError("pairs must have one pair of factors at least, got none")
        for index, (left, right, *found) in enumerate(self._pairs):
            if left.ndim < 2 or left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-2]:
                shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
                raise ValueError(f"pairs[{index}] must be of shapes (..., rows, r) and (..., r, columns), got {shapes}")
            if found == [None, None]:
                raise ValueError(f"pairs[{index}]: the optimizer has neither of the two factors")
            for factor, place in zip((left, right), found, strict=True):
                if place is not None:
                    _check_group(optimizer.param_groups[place], factor)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def coefficient(self) -> float:
        """c; without effect at 0."""
        return self._coefficient

    @coefficient.setter
    def coefficient(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"coefficient must be finite and >= 0, got {value!r}")
        self._coefficient = value

    def remove(self) -> None:
        """Decay no more."""
        self._hook.remove()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        for left, right, left_place, right_place in self._pairs:
            of_left, of_right = _gram(left.mT) * self.coefficient, _gram(right) * self.coefficient
            if left_place is not None and left.grad is not None:
                left.sub_(_wide(left) @ (of_right * rates[left_place]))
            if right_place is not None and right.grad is not None:
                right.sub_((of_left * rates[right_place]) @ _wide(right))


def _gram(rows: Tensor) -> Tensor:
    """Scalar products of the rows of a matrix, or of a stack of them."""
    wide = _wide(rows)
    return wide @ wide.mT


def _wide(factor: Tensor) -> Tensor:
    """At least in float32: squares overflow half precision."""
    return factor.float() if factor.dtype in _HALF else factor


def _check_group(group: dict[str, Any], factor: Tensor) -> None:
    name = parameter_name(group, next(i for i, p in enumerate(group["params"]) if p is factor))
    if group.get("weight_decay", 0) != 0:
        raise ValueError(
            f"{name} would decay twice: its param group has weight_decay={group['weight_decay']}; allowed is 0, see "
            "retract.nets.frobenius_decay.frobenius_groups"
        )
    if not is_euclidean(group.get("manifold")):
        raise ValueError(f"{name} is on {group['manifold']}: decaying it would leave the manifold")
    if "lr" not in group:
        raise ValueError(f"{name} is in a param group without 'lr', which says how far to decay")
