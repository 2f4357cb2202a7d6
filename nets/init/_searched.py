"""Decompositions whose rank no singular value tells: canonical form, tensor ring, block terms.

For given ranks they are fitted by alternating least squares. For a given error there is first a network that is certain
to have it; then ranks below are searched by bisection for the fewest parameters with which a fit reaches it, as long as
they are fewer than those of the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from retract.manifolds.canonical import alternating_least_squares, power_method
from retract.nets.layers._tensor_ranks import proportional_ranks
from retract.nets.layers.tensor_formats import FORMATS
from retract.nets.layers.tensor_network import TensorNetwork

from ._alternating import fit_alternating
from ._blocks import block_spaces
from ._nested import NESTED, fit_to_error, relative_error, with_ranks

__all__ = ["SEARCHED", "search_to_error"]

Terms = tuple[Tensor, tuple[Tensor, ...]]
#: From the weight, a network and an error that is near enough, to cores.
Fit = Callable[[Tensor, TensorNetwork, float], list[Tensor]]
#: A network that has the error, its cores, and the method with which to search for a smaller one, if there may be one.
Certain = tuple[TensorNetwork, list[Tensor], Fit | None]


# Sweeps of the canonical form, and of each rank that is tried for it: they start from terms that are good already.
_ITERATIONS, _SEARCH_ITERATIONS = 200, 100
# The search ends where the largest rank is known to this part of it.
_PRECISION = 32


def search_to_error(
    tensor: Tensor, network: TensorNetwork, error: float, format: str
) -> tuple[TensorNetwork, list[Tensor]]:
    """A network of few parameters, and its cores, whose relative Frobenius error is at most this one.

    Args:
        tensor: of float64, with a dimension for each of the network's outputs, inputs and kernel indices.
        network: of a format of this module; the sizes of its bonds do not matter.
        error: greater than zero.
        format: its name.
    """
    smallest, cores, fit = _CERTAIN[format](tensor, network, error)
    if fit is None:
        return smallest, cores
    chosen = FORMATS[format]
    externals = {label: size for label, size in network.dims.items() if label not in network.bonds}
    shares = chosen.shares_of(network.bonds)
    low, high = 0, max(smallest.dims[bond] for bond in network.bonds) + 1
    # Doubled until there is an upper end, since small ranks are quick to fit; then halved.
    found = False
    while high - low > max(1, high // _PRECISION):
        middle = (low + high) // 2 if found else min(max(1, 2 * low), (low + high) // 2)
        smaller = with_ranks(network, proportional_ranks(network.cores, externals, shares, chosen.limit, middle))
        if smaller.parameters >= min(smallest.parameters, tensor.numel()):
            high, found = middle, True
            continue
        candidate = fit(tensor, smaller, error)
        if relative_error(tensor, smaller, candidate) <= error:
            smallest, cores, high, found = smaller, candidate, middle, True
        else:
            low = middle
    return smallest, cores


# ------------------------------------------------------------------------------------------------------ canonical form


def _fit_terms(tensor: Tensor, network: TensorNetwork) -> list[Tensor]:
    """Terms of the power method, refined all together."""
    rank = network.dims["r"]
    fit = alternating_least_squares(tensor, rank, iterations=_ITERATIONS, generator=_generator(tensor))
    return _cores_of_terms((fit.weights, fit.factors))


def _refine_terms(terms: Terms, tensor: Tensor, network: TensorNetwork, target: float) -> list[Tensor]:
    """The first of some terms, refined all together; as they are if they would diverge."""
    rank = network.dims["r"]
    start = terms[0][:rank], tuple(factor[:rank] for factor in terms[1])
    try:
        fit = alternating_least_squares(tensor, rank, start=start, iterations=_SEARCH_ITERATIONS)
    except ValueError:  # terms that cancel in spite of every ridge
        return _cores_of_terms(start)
    return _cores_of_terms((fit.weights, fit.factors))


def _certain_terms(tensor: Tensor, network: TensorNetwork, error: float) -> Certain:
    """Terms of the power method; the search starts from the first of them. For a matrix they are the fewest."""
    terms = power_method(tensor, error=error, generator=_generator(tensor))
    found = with_ranks(network, {"r": len(terms[0])})
    is_matrix = sum(size > 1 for size in tensor.shape) <= 2
    return found, _cores_of_terms(terms), None if is_matrix else partial(_refine_terms, terms)


def _generator(tensor: Tensor) -> torch.Generator:
    return torch.Generator(tensor.device).manual_seed(0)


def _cores_of_terms(terms: Terms) -> list[Tensor]:
    """Cores (d, R) among which each weight is shared equally; the first has its sign."""
    weights, factors = terms
    shares = weights.abs() ** (1 / len(factors))
    first, *others = ((factor * shares[:, None]).mT for factor in factors)
    return [first * weights.sign(), *others]


# ------------------------------------------------------------------------------------------- tensor ring, block terms


def _certain_ring(tensor: Tensor, network: TensorNetwork, error: float) -> Certain:
    """The tensor train along the ring: the bond that closes it has size one."""
    closing = network.bonds[0]
    train, cores = fit_to_error(tensor, _without(network, closing), error, NESTED["tensor_train"])
    return *_with_unit_bond(network, closing, train, cores), fit_alternating


def _fit_blocks(tensor: Tensor, network: TensorNetwork, target: float = 0.0) -> list[Tensor]:
    blocks, p, q = (network.dims[bond] for bond in "bpq")
    if blocks == 1:
        return _with_unit_bond(network, "b", network, _fit_one_block(tensor, _without(network, "b")))[1]
    spaces = block_spaces(tensor, blocks, p, q)
    if spaces is None:
        return fit_alternating(tensor, network, target)
    left, right = (space.transpose(0, 1) for space in spaces)
    start = [left, right, torch.zeros(network.core_shapes[-1]).to(tensor)]
    return fit_alternating(tensor, network, target, start=start)


def _fit_one_block(tensor: Tensor, network: TensorNetwork) -> list[Tensor]:
    left, core, right = NESTED["tucker2"](tensor, network)
    return [left, right, core]


def _certain_block(tensor: Tensor, network: TensorNetwork, error: float) -> Certain:
    """One block, which is the Tucker-2 decomposition."""
    block, cores = fit_to_error(tensor, _without(network, "b"), error, _fit_one_block)
    return *_with_unit_bond(network, "b", block, cores), _fit_blocks


def _without(network: TensorNetwork, bond: str) -> TensorNetwork:
    cores = [core.replace(bond, "") for core in network.cores]
    dims = {label: size for label, size in network.dims.items() if label != bond}
    return TensorNetwork(cores, dims, inputs=network.inputs, outputs=network.outputs, kernel=network.kernel)


def _with_unit_bond(
    network: TensorNetwork, bond: str, smaller: TensorNetwork, cores: Sequence[Tensor]
) -> tuple[TensorNetwork, list[Tensor]]:
    """A network without a bond, and its cores, as the network with this bond of size one."""
    unit = with_ranks(network, {**smaller.dims, bond: 1})
    return unit, [core.reshape(shape) for core, shape in zip(cores, unit.core_shapes, strict=True)]


_CERTAIN: dict[str, Callable[[Tensor, TensorNetwork, float], Certain]] = {
    "cp": _certain_terms,
    "tensor_ring": _certain_ring,
    "block_term": _certain_block,
}

#: From the weight, with a dimension for each of the network's outputs, inputs and kernel indices, to the cores.
SEARCHED: dict[str, Callable[[Tensor, TensorNetwork], list[Tensor]]] = {
    "cp": _fit_terms,
    "tensor_ring": fit_alternating,
    "block_term": _fit_blocks,
}
