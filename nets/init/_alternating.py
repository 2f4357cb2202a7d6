"""Fits of a tensor network of any form by alternating least squares.

The weight is linear in each core, so one core at a time takes its best value while the others are held. tensorly has
this for the canonical form; here it serves formats with loops and blocks, for which no decomposition by singular values
is known. Source: Kolda, Bader, "Tensor decompositions and applications", SIAM Review 2009, section 3.4; for blocks De
Lathauwer, Nion, "Decompositions of a higher-order tensor in block terms III", SIAM J. Matrix Anal. Appl. 2008.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import opt_einsum
import torch
from torch import Tensor

from retract.nets.layers.tensor_network import TensorNetwork

__all__ = ["fit_alternating"]

_STARTS, _TRIAL_SWEEPS, _MOST_SWEEPS = 4, 20, 300
# A sweep that lessens the error by less than this part of it is the last.
_PROGRESS = 5e-4
_EXACT = 1e-13
# Weight of staying where a core is, of the mean eigenvalue of its equations: they may be singular.
_PROXIMAL = 1e-11


def fit_alternating(
    tensor: Tensor, network: TensorNetwork, target: float = 0.0, *, start: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Cores whose weight is near the tensor: the best of some random starts, taken on until it stands still.

    Args:
        tensor: of float64, with a dimension for each of the network's outputs, inputs and kernel indices.
        network: each of its external indices must be in one core only.
        target: a relative error that is near enough. Fits that will not have it are given up early.
        start: cores of one more start. The last may be anything: it is the first to be solved for.
    """
    generator = torch.Generator().manual_seed(0)
    sweep = _Sweep(tensor, network)
    starts = [sweep.random(generator) for _ in range(_STARTS)] + ([] if start is None else [start])
    trials = [sweep.repeat(cores, _TRIAL_SWEEPS) for cores in starts]
    _, best = min(trials, key=lambda trial: trial[0])
    return sweep.repeat(best, _MOST_SWEEPS, target)[1]


class _Sweep:
    """The least squares problems of all cores in turn."""

    def __init__(self, tensor: Tensor, network: TensorNetwork) -> None:
        self.tensor, self.network = tensor, network
        self.norm = float(torch.linalg.vector_norm(tensor))
        self.problems = [_Problem(network, position) for position in range(len(network.cores))]

    def random(self, generator: torch.Generator) -> list[Tensor]:
        """Random cores, scaled so that their weight is of the tensor's size."""
        scale = (self.norm**2 / self.tensor.numel() / self.network.bond_product) ** (0.5 / len(self.network.cores))
        cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.network.core_shapes]
        return [scale * core.to(self.tensor.device) for core in cores]

    def repeat(self, cores: Sequence[Tensor], most: int, target: float = 0.0) -> tuple[float, list[Tensor]]:
        """Sweep until the relative error stands still, or is the target; the error and the cores."""
        cores, error = list(cores), self.error(cores)
        for left in reversed(range(most)):
            if error <= max(target, _EXACT):
                break
            for problem in reversed(self.problems):
                cores[problem.position] = problem.solve(self.tensor, cores)
            before, error = error, self.error(cores)
            gain = before - error
            # Gains lessen from sweep to sweep as a rule: at this rate the target is the most that can be hoped for.
            if gain <= _PROGRESS * error or (target > 0 and error - left * gain > target):
                break
        return error, cores

    def error(self, cores: Sequence[Tensor]) -> float:
        weight = self.network.weight(cores).reshape(self.tensor.shape)
        return float(torch.linalg.vector_norm(weight - self.tensor)) / self.norm


class _Problem:
    """Normal equations of one core: the Gram matrix of the others over its bonds, and their product with the weight."""

    def __init__(self, network: TensorNetwork, position: int) -> None:
        core = network.cores[position]
        self.position = position
        self.bonds = "".join(label for label in core if label in network.bonds)
        self.own = "".join(label for label in core if label not in network.bonds)
        self.order = [(self.own + self.bonds).index(label) for label in core]
        self.shape = [network.dims[label] for label in self.own + self.bonds]
        others = [other for other in network.cores if other is not core]
        labels = network.outputs + network.inputs + network.kernel
        # In the second copy of the cores the bonds have other names; the external indices, summed, have the same.
        fresh = {bond: chr(0x100 + index) for index, bond in enumerate(network.bonds)}
        twins = ["".join(fresh.get(label, label) for label in other) for other in others]
        rows = "".join(fresh[bond] for bond in self.bonds)
        shapes = [shape for other, shape in enumerate(network.core_shapes) if other != position]
        self.gram: Callable[..., Any] = opt_einsum.contract_expression(
            f"{','.join(others + twins)}->{self.bonds}{rows}", *shapes, *shapes
        )
        self.product: Callable[..., Any] = opt_einsum.contract_expression(
            f"{labels},{','.join(others)}->{self.own}{self.bonds}", [network.dims[x] for x in labels], *shapes
        )

    def solve(self, tensor: Tensor, cores: Sequence[Tensor]) -> Tensor:
        others = [core for position, core in enumerate(cores) if position != self.position]
        count = math.prod(self.shape[len(self.own) :])
        gram = self.gram(*others, *others, backend="torch").reshape(count, count)
        product = self.product(tensor, *others, backend="torch").reshape(-1, count)
        present = cores[self.position].permute(_inverse(self.order)).reshape(-1, count)
        damping = _PROXIMAL * gram.diagonal().mean()
        gram = gram + damping * torch.eye(count, dtype=gram.dtype, device=gram.device)
        solution: Tensor = torch.linalg.solve(gram, (product + damping * present).mT).mT
        return solution.reshape(self.shape).permute(self.order)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
