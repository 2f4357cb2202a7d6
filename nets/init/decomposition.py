"""A trained weight as a tensor network of a named format, with given ranks or within a given error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from retract.nets.layers._tensor_ranks import useful_ranks
from retract.nets.layers.tensor_formats import FORMATS, tensor_network
from retract.nets.layers.tensor_network import TensorNetwork

from ._nested import NESTED, fit_to_error, relative_error
from ._searched import SEARCHED, search_to_error

__all__ = ["Decomposition", "decompose"]

_FITS = {**NESTED, **SEARCHED}


@dataclass(frozen=True)
class Decomposition:
    """A tensor network, its cores, and how near its weight is to the one that was decomposed.

    Attributes:
        network: the network, with the ranks that were chosen.
        cores: its cores, all of the same Frobenius norm, in the dtype and on the device of the weight.
        error: the relative error |W - W'| / |W| of these cores, in the Frobenius norm.
    """

    network: TensorNetwork
    cores: tuple[Tensor, ...]
    error: float


def decompose(
    weight: Tensor,
    format: str,
    *,
    rank: int | Sequence[int] | None = None,
    budget: float | None = None,
    error: float | None = None,
    in_modes: Sequence[int] | None = None,
    out_modes: Sequence[int] | None = None,
) -> Decomposition:
    """Cores of a format whose weight is near a given one, computed in float64.

    ======================================  =======================================================================
    format                                  method
    ======================================  =======================================================================
    ``tucker2``, ``tucker``                 higher-order orthogonal iteration (tensorly)
    ``tensor_train``, ``tt_matrix``         successive singular value decompositions (tensorly)
    ``hierarchical_tucker``                 successive singular value decompositions, from the leaves to the root
    ``cp``                                  `retract.manifolds.canonical.alternating_least_squares`, whose terms do
                                            not diverge; of a matrix, singular vectors
    ``tensor_ring``, ``block_term``         alternating least squares from several random starts, seeded
    ======================================  =======================================================================

    The first three find cores for which the error is at most the square root of the number of bonds times the least
    one. The others find a local minimum, so a lower rank may do than the one they need for an error.

    Args:
        weight: (out, in / groups, *kernel), real, finite, and not zero everywhere.
        format: a key of `retract.nets.layers.tensor_formats.FORMATS`.
        rank: as for `retract.nets.layers.tensor_formats.tensor_network`, no larger than is of use.
        budget: as for `tensor_network`.
        error: the relative error, in (0, 1), that the cores reach with few parameters. Every format reaches each
            error, down to the precision of the weight's dtype; for a small one it may take more than the dense weight.
        in_modes: as for `tensor_network`.
        out_modes: as for `tensor_network`.

    Raises:
        ValueError: not exactly one of rank, budget and error; a weight that is not finite, is zero, or has no shape of
            a weight; an error out of range; a rank larger than is of use; or what `tensor_network` raises.
        TypeError: a weight that is not real and floating-point, or what `tensor_network` raises.
    """
    _check_weight(weight)
    given = {name: value for name, value in (("rank", rank), ("budget", budget), ("error", error)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"one of rank, budget and error must be given, got {given or 'none'}")
    if error is not None:
        _check_error(error)
        rank = 1  # which the error replaces
    network = tensor_network(format, weight.shape, rank=rank, budget=budget, in_modes=in_modes, out_modes=out_modes)
    if error is None:
        _check_useful(network, format)
    tensor = weight.detach().double()
    scale = float(tensor.abs().max())  # what is squared below neither overflows nor vanishes
    tensor = (tensor / scale).reshape(
        [network.dims[label] for label in network.outputs + network.inputs + network.kernel]
    )
    if error is None:
        cores = _FITS[format](tensor, network)
    elif format in NESTED:
        network, cores = fit_to_error(tensor, network, error, NESTED[format])
    else:
        network, cores = search_to_error(tensor, network, error, format)
    share = scale ** (1 / len(cores))
    placed = tuple((core * share).to(weight) for core in _balanced(cores))
    return Decomposition(network, placed, relative_error(tensor, network, [core.to(tensor) / share for core in placed]))


def _balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores scaled to the same norm, with the same product."""
    norms = [torch.linalg.vector_norm(core).item() for core in cores]
    mean = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a tensor of real floating-point numbers, got {got}")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got NaN or infinite entries")
    if not weight.any():
        raise ValueError("weight must not be zero everywhere: cores for it would all but one be arbitrary")


def _check_error(error: float) -> None:
    if isinstance(error, bool) or not isinstance(error, Real):
        raise TypeError(f"error must be a number, got {error!r}")
    if not 0 < error < 1:
        raise ValueError(f"error must be relative, in (0, 1), got {error}")


def _check_useful(network: TensorNetwork, format: str) -> None:
    """No decomposition has more ranks than the weight can have: what is more would stay zero."""
    ranks = {bond: network.dims[bond] for bond in network.bonds}
    externals = {label: size for label, size in network.dims.items() if label not in ranks}
    useful = useful_ranks(network.cores, externals, ranks, FORMATS[format].limit)
    if useful != ranks:
        raise ValueError(
            f"rank must be at most {tuple(useful.values())} beside the others, got {tuple(ranks.values())}"
        )
