"""Decompositions by singular values of unfoldings: Tucker-2, Tucker, tensor train, TT-matrix, hierarchical Tucker.

In these formats every bond cuts the network in two, so its rank is that of an unfolding of the weight, and the error is
bounded: |W - W'|² is at most the sum over the cuts of the squared singular values that each leaves out (De Lathauwer,
De Moor, Vandewalle 2000 for Tucker; Oseledets 2011, theorem 2.2, for trains; Grasedyck 2010, theorem 3.11, for trees).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import tensorly
import torch
from tensorly.decomposition import partial_tucker, tensor_train
from torch import Tensor

from retract.nets.layers._tensor_ranks import count_parameters, two_core_limit, useful_ranks
from retract.nets.layers.tensor_network import TensorNetwork

__all__ = ["NESTED", "fit_to_error", "relative_error", "with_ranks"]


# Attempts to save parameters where the bound is not sharp, each with a bound that is larger by this at most.
_ATTEMPTS, _LOOSENING = 6, 1.15


def fit_to_error(
    tensor: Tensor, network: TensorNetwork, error: float, fit: Callable[[Tensor, TensorNetwork], list[Tensor]]
) -> tuple[TensorNetwork, list[Tensor]]:
    """A network of few parameters, and its cores, whose relative Frobenius error is at most this one.

    Args:
        tensor: the weight, with a dimension for each of the network's outputs, inputs and kernel indices.
        network: of a format of this module; the sizes of its bonds do not matter.
        error: greater than zero.
        fit: the method of the format.
    """
    squares = _squares_of_cuts(tensor, network)
    norm = torch.linalg.vector_norm(tensor).item()
    bound = error
    smallest = with_ranks(network, _ranks_of_bound(squares, network, (bound * norm) ** 2))
    cores = fit(tensor, smallest)
    left = relative_error(tensor, smallest, cores)
    for _ in range(_ATTEMPTS):
        bound *= min(error / left, _LOOSENING) if left > 0 else _LOOSENING
        smaller = with_ranks(network, _ranks_of_bound(squares, network, (bound * norm) ** 2))
        if smaller == smallest:
            continue
        candidate = fit(tensor, smaller)
        left = relative_error(tensor, smaller, candidate)
        if left > error:
            break
        smallest, cores = smaller, candidate
    return smallest, cores


def relative_error(tensor: Tensor, network: TensorNetwork, cores: Sequence[Tensor]) -> float:
    """|W - W'| / |W| in the Frobenius norm."""
    difference = network.weight(cores).to(tensor.device).reshape(tensor.shape) - tensor
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(tensor))


def with_ranks(network: TensorNetwork, ranks: Mapping[str, int]) -> TensorNetwork:
    """The network with other sizes of some bonds."""
    dims = {**network.dims, **ranks}
    return TensorNetwork(network.cores, dims, inputs=network.inputs, outputs=network.outputs, kernel=network.kernel)


def _squares_of_cuts(tensor: Tensor, network: TensorNetwork) -> dict[str, list[float]]:
    """Squared singular values by the bonds to which they belong: all that cut the network in the same two parts."""
    cuts: dict[frozenset[str], str] = {}
    for bond in network.bonds:
        part = _part(network, bond)
        cuts[part] = cuts.get(part, "") + bond
    return {
        bonds: torch.linalg.svdvals(_unfold(tensor, network, part)).square().tolist() for part, bonds in cuts.items()
    }


def _ranks_of_bound(squares: Mapping[str, list[float]], network: TensorNetwork, left: float) -> dict[str, int]:
    """Ranks with few parameters for which the squares left out sum to no more than ``left``.

    From full ranks on, the singular value is left out whose rank saves most parameters for its square, as long as
    there is one that fits.
    """
    ranks = {bonds: len(values) for bonds, values in squares.items()}

    def parameters(ranks: dict[str, int]) -> int:
        sizes = {bond: rank for bonds, rank in ranks.items() for bond in bonds}
        return count_parameters(network.cores, {**network.dims, **sizes})

    while True:
        now = parameters(ranks)
        worth = {
            bonds: (now - parameters({**ranks, bonds: rank - 1})) / max(squares[bonds][rank - 1], 1e-300)
            for bonds, rank in ranks.items()
            if rank > 1 and squares[bonds][rank - 1] <= left
        }
        if not worth:
            break
        best = max(worth, key=worth.__getitem__)
        left -= squares[best][ranks[best] - 1]
        ranks[best] -= 1
    externals = {label: size for label, size in network.dims.items() if label not in network.bonds}
    single = {bond: rank for bonds, rank in ranks.items() for bond in bonds}
    # What one cut leaves out may leave less to another than its own singular values say.
    return useful_ranks(network.cores, externals, single, two_core_limit)


def _unfold(tensor: Tensor, network: TensorNetwork, rows: frozenset[str] | str) -> Tensor:
    """The tensor as a matrix: some external indices by the others."""
    labels = network.outputs + network.inputs + network.kernel
    order = sorted(range(len(labels)), key=lambda position: labels[position] not in rows)
    return tensor.permute(order).reshape(math.prod([network.dims[label] for label in rows]), -1)


def _part(network: TensorNetwork, bond: str) -> frozenset[str]:
    """External indices on one side of a bond: the side that has not the first output, or else the first input."""
    reached = {bond}
    rest = list(network.cores)
    first = next(core for core in rest if bond in core)
    rest.remove(first)
    found = set(first) - reached
    while joined := [core for core in rest if found & (set(core) - {bond})]:
        rest = [core for core in rest if core not in joined]
        found |= set("".join(joined)) - {bond}
    external = network.outputs + network.inputs + network.kernel
    part = frozenset(external) & found
    return frozenset(external) - part if external[0] in part else part


# ------------------------------------------------------------------------------------------------- cores of given ranks


def _tucker2(tensor: Tensor, network: TensorNetwork) -> list[Tensor]:
    core, (left, right) = _partial_tucker(tensor, (network.dims["p"], network.dims["q"]))
    return [left, core, right]


def _tucker(tensor: Tensor, network: TensorNetwork) -> list[Tensor]:
    core, factors = _partial_tucker(tensor, network.core_shapes[-1])
    return [*factors, core]


def _partial_tucker(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Core and factors of the first modes by higher-order orthogonal iteration, which starts from the HOSVD."""
    with tensorly.backend_context("numpy", local_threadsafe=True):
        (core, factors), _ = partial_tucker(tensor.cpu().numpy(), list(ranks), modes=list(range(len(ranks))))
    return torch.from_numpy(core.copy()), [torch.from_numpy(factor.copy()) for factor in factors]


def _chain(tensor: Tensor, network: TensorNetwork) -> list[Tensor]:
    """Cores of a tensor train by successive singular value decompositions."""
    bonds = network.bonds
    own = ["".join(label for label in core if label not in bonds) for core in network.cores]
    labels = network.outputs + network.inputs + network.kernel
    permuted = tensor.permute([labels.index(label) for label in "".join(own)])
    if not bonds:
        return [permuted.clone()]
    with tensorly.backend_context("numpy", local_threadsafe=True):
        train = tensor_train(
            permuted.reshape([network.size(labels) for labels in own]).cpu().numpy(),
            [1, *(network.dims[bond] for bond in bonds), 1],
        )
    return [
        torch.from_numpy(core.copy()).reshape(shape) for core, shape in zip(train, network.core_shapes, strict=True)
    ]


def _tree(tensor: Tensor, network: TensorNetwork) -> list[Tensor]:
    """Cores of a hierarchical Tucker tensor: bases of leaves and of nodes by successive projections, then the root."""
    remaining, labels = tensor, network.outputs + network.inputs + network.kernel
    cores = []
    for core, shape in zip(network.cores[:-1], network.core_shapes, strict=False):
        children, bond = core[:-1], core[-1]
        others = "".join(label for label in labels if label not in children)
        remaining = remaining.permute([labels.index(label) for label in children + others])
        matrix = remaining.reshape(math.prod(shape[:-1]), -1)
        basis = torch.linalg.svd(matrix, full_matrices=False).U[:, : shape[-1]]
        cores.append(basis.reshape(shape))
        remaining = (basis.mT @ matrix).reshape(shape[-1], *remaining.shape[len(children) :])
        labels = bond + others
    return [*cores, remaining.permute([labels.index(label) for label in network.cores[-1]])]


#: From the weight, with a dimension for each of the network's outputs, inputs and kernel indices, to the cores.
NESTED: dict[str, Callable[[Tensor, TensorNetwork], list[Tensor]]] = {
    "tucker2": _tucker2,
    "tucker": _tucker,
    "tensor_train": _chain,
    "tt_matrix": _chain,
    "hierarchical_tucker": _tree,
}
