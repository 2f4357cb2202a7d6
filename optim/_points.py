"""Points as optimizers meet them: a parameter, or the parameters of a group that are one point's factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._base import parameter_name

__all__ = ["Factors", "Point", "check_on_manifold", "is_factored", "points"]

Factors: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Point:
    """A point and its Euclidean gradient, as tuples of factors: of one, unless the manifold is ``factored``.

    A manifold's verbs take and return bare tensors, a factored manifold's take tuples; here all are tuples.
    ``x`` are the parameters themselves, keys of the optimizer's state, and ``egrad`` their ``grad``.
    """

    manifold: Any
    x: Factors
    egrad: Factors

    @cached_property
    def rgrad(self) -> Factors:
        """Riemannian gradient; off every manifold the Euclidean one itself."""
        if self.manifold is None:
            return self.egrad
        return self._factors(self._call("egrad2rgrad", self.x, self.egrad))

    def proju(self, u: Factors) -> Factors:
        """Project onto the tangent space."""
        return self._factors(self._call("proju", self.x, u))

    def retr(self, x: Factors, u: Factors) -> Factors:
        """Retract from ``x`` along ``u``."""
        return self._factors(self._call("retr", x, u))

    def retr_transp(self, u: Factors, v: Factors) -> tuple[Factors, Factors]:
        """Retract from here along ``u`` and carry ``v`` along."""
        y, moved = self._call("retr_transp", self.x, u, v)
        return self._factors(y), self._factors(moved)

    def derivative(self, v: Factors) -> Tensor:
        """Derivative of the loss along ``v``, at least float32: plain products with the Euclidean gradient.

        Along the Riemannian gradient this is its squared norm in the metric, whichever metric that is.
        """
        return torch.stack([_real_dot(g, u) for g, u in zip(self.egrad, v, strict=True)]).sum()

    def write(self, y: Sequence[Tensor]) -> None:
        """Put the weights at ``y``, in their own memory: a column-major result would slow all later steps."""
        for p, new in zip(self.x, y, strict=True):
            p.copy_(new)

    def _call(self, verb: str, *arguments: Factors) -> Any:
        return getattr(self.manifold, verb)(*(a if is_factored(self.manifold) else a[0] for a in arguments))

    def _factors(self, result: Any) -> Factors:
        return tuple(result) if is_factored(self.manifold) else (result,)


def points(group: dict[str, Any]) -> Iterator[Point]:
    """The points of a group whose gradient is known.

    A factor without a gradient, beside factors that have one, is one that the loss does not see: its is zero.

    Raises:
        TypeError: a sparse gradient.
    """
    manifold, parameters = group["manifold"], group["params"]
    indices = range(len(parameters))
    for members in [tuple(indices)] if is_factored(manifold) else [(i,) for i in indices]:
        if all(parameters[i].grad is None for i in members):
            continue
        for i in members:
            if parameters[i].grad is not None and parameters[i].grad.layout != torch.strided:
                raise TypeError(f"{parameter_name(group, i)} has a sparse gradient; this needs dense ones")
        x = tuple(parameters[i] for i in members)
        grads = (parameters[i].grad for i in members)
        egrad = tuple(torch.zeros_like(w) if g is None else g for w, g in zip(x, grads, strict=True))
        yield Point(manifold, x, egrad)


def is_factored(manifold: Any) -> bool:
    """Whether a group of this manifold holds the factors of one point."""
    return bool(getattr(manifold, "factored", False))


def check_on_manifold(group: dict[str, Any]) -> None:
    """Refuse weights that do not lie on their manifold, to half the digits of their type.

    Raises:
        ValueError: a weight is off its manifold; steps from there would be wrong without a sign of it.
    """
    manifold, parameters = group["manifold"], group["params"]
    if manifold is None or any(p.is_meta for p in parameters):
        return
    atol = max(1e-5, max(torch.finfo(p.dtype).eps for p in parameters) ** 0.5)
    weights = tuple(p.detach() for p in parameters)
    for index, point in [(0, weights)] if is_factored(manifold) else enumerate(weights):
        ok, reason = manifold.check_point_on_manifold(point, explain=True, atol=atol)
        if not ok:
            raise ValueError(
                f"{parameter_name(group, index)} is not a point of {manifold}: {reason}. "
                "weight.copy_(manifold.projx(weight)) under torch.no_grad() puts most weights there"
            )


def _real_dot(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype).conj() * b.to(dtype)).real.sum()
