"""Gradient clipping by the norm that the manifolds of the weights define."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._base import split_by_manifold
from ._points import points

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    param_groups: torch.optim.Optimizer | Iterable[dict[str, Any]] | Iterable[Tensor] | Tensor,
    max_norm: float,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    r"""Scale all gradients, in place, by ``min(1, max_norm / total)``.

    ``total`` is the norm of the gradient on the product of all manifolds: the root of the sum of |grad|^2 in
    the metric over weights on manifolds and of |g|^2 over the others. torch.nn.utils.clip_grad_norm_ sums
    Euclidean norms, and so clips a network and its rescaled equal differently; on `PSI` weights this total is
    the same.

    Nothing waits for the device unless ``error_if_nonfinite``. A NaN total makes all gradients NaN, as in
    torch. With a torch.amp.GradScaler, unscale first.

    Args:
        param_groups: an optimizer, its ``param_groups``, or parameters (`geoopt.ManifoldParameter`s are
            honoured).
        max_norm: largest total that is left alone; ``math.inf`` only measures.
        error_if_nonfinite: raise RuntimeError, leaving gradients alone, if the total is NaN or infinite.

    Returns:
        ``total`` as it was before, a scalar of at least float32 on the device of the first gradient.

    Raises:
        ValueError: ``max_norm`` is not positive.
        TypeError: a sparse gradient.

    Source: Pascanu, Mikolov, Bengio, ICML 2013 (clipping by norm), in the metric of the manifold.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    squares: list[Tensor] = []
    grads: list[Tensor] = []
    for point in (point for group in _groups(param_groups) for point in points(group)):
        squares.append(point.derivative(point.rgrad))
        grads.extend(point.egrad)
    total = _root_of_sum(squares)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(f"the total norm of the gradients is {float(total)}; gradients were left as they are")
    if max_norm < math.inf:
        coefficient = (max_norm / total).clamp(max=1)
        for g in grads:
            g.mul_(coefficient.to(g.device))
    return total


def _root_of_sum(squares: list[Tensor]) -> Tensor:
    """Root of the sum of scalars that may lie on several devices; rounding may have made one negative."""
    if not squares:
        return torch.tensor(0.0)
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in squares) else torch.float32
    return torch.stack([s.to(squares[0].device, dtype) for s in squares]).sum().clamp_(min=0).sqrt_()


def _groups(source: Any) -> Iterator[dict[str, Any]]:
    """Param groups with a manifold and plain parameters, from whatever holds them."""
    if isinstance(source, torch.optim.Optimizer):
        source = source.param_groups
    entries: list[Any] = [source] if isinstance(source, Tensor) else list(source)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    for group in groups:
        for part in [group] if "manifold" in group else split_by_manifold(group):
            yield {
                **part,
                "params": [entry[1] if isinstance(entry, tuple) else entry for entry in part["params"]],
            }
