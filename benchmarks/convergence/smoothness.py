"""The constants of the theorems, estimated: how fast gradients change at unit norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .problems import Problem

__all__ = ["Smoothness", "smoothness"]

TOLERANCE = 1e-3  # relative, of an eigenvalue

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Smoothness:
    """Spectral norms of the Hessian's blocks, at unit norms: of the scale-invariant weights V, of the others g, and of
    both together. All filters are one block, where [Yi22, (13)] adds up one norm for each pair: these are no larger.
    """

    invariant: float
    others: float
    mixed: float

    @property
    def step(self) -> float:
        """Of the scale-invariant weights: 1 / (L_vv + L_vg) [Yi22, Theorem 2]."""
        return 1 / (self.invariant + self.mixed)

    @property
    def euclidean_step(self) -> float:
        """Of the others: 1 / (L_gg + L_vg)."""
        return 1 / (self.others + self.mixed)

    @property
    def largest(self) -> float:
        """L of the bound 2 L (loss_0 - inf loss) / T on the least squared gradient norm."""
        return self.mixed + max(self.invariant, self.others)


def smoothness(problem: Problem) -> Smoothness:
    """Estimate the constants at the problem's weights, by Lanczos' method on products with the Hessian.

    Weights of other norms than one are looked at in the PSI metric, which takes each filter by its norm. Gradients
    that the weights hold stay.
    """
    hessian = _Hessian(problem)
    invariant, others = hessian.sizes

    def mixed(vector: Array) -> Array:
        return hessian.multiply(hessian.multiply(vector, 0, 1), 1, 0)

    return Smoothness(
        invariant=_spectral_norm(lambda vector: hessian.multiply(vector, 0, 0), invariant),
        others=_spectral_norm(lambda vector: hessian.multiply(vector, 1, 1), others),
        mixed=_spectral_norm(mixed, invariant) ** 0.5,
    )


class _Hessian:
    """Of a problem's loss, in two blocks: 0, of the scale-invariant weights, and 1, of the others."""

    def __init__(self, problem: Problem) -> None:
        self.blocks = problem.weights
        with torch.no_grad():
            invariant = [weight.norm(dim=1, keepdim=True).expand_as(weight) for weight in self.blocks[0]]
            self.scales = (invariant, [torch.ones_like(weight) for weight in self.blocks[1]])
        weights = [weight for block in self.blocks for weight in block]
        gradients = torch.autograd.grad(problem.loss(), weights, create_graph=True)
        count = len(self.blocks[0])
        self.gradients = (gradients[:count], gradients[count:])

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers in each block."""
        invariant, others = (sum(weight.numel() for weight in block) for block in self.blocks)
        return invariant, others

    def multiply(self, vector: Array, source: int, target: int) -> Array:
        """Rows of block ``target``, columns of block ``source``."""
        parts = torch.from_numpy(np.ascontiguousarray(vector)).split([w.numel() for w in self.blocks[source]])
        scaled = [part.view_as(s) * s for part, s in zip(parts, self.scales[source], strict=True)]
        products = torch.autograd.grad(
            self.gradients[source], self.blocks[target], grad_outputs=scaled, retain_graph=True
        )
        rows: list[Tensor] = [row * s for row, s in zip(products, self.scales[target], strict=True)]
        found: Array = torch.cat([row.reshape(-1) for row in rows]).numpy()
        return found


def _spectral_norm(multiply: Callable[[Array], Array], size: int) -> float:
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    value = eigsh(operator, k=1, which="LM", v0=start, tol=TOLERANCE, return_eigenvectors=False)
    return float(abs(value[0]))
