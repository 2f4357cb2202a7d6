"""Named tensor networks for weights (out, in, *kernel) of linear layers and of convolutions in one to three dimensions.

The cores of a two-dimensional convolution; a linear layer has the same ones without the kernel's indices:

=======================  ======================================  ======================================================
format                   cores                                   ranks, in order
=======================  ======================================  ======================================================
``cp``                   or, ir, hr, wr                          terms r
``tucker2``              op, pqhw, iq                            output p, input q
``tucker``               op, iq, hs, wt, pqst                    output, input, each kernel dimension
``tensor_train``         ia, ahb, bwc, co                        the bonds from input to output
``tt_matrix``            hwa, aixb, bjyc, ckz                    the bonds from the kernel on
``tensor_ring``          ria, ajb, bkc, chwe, exf, fyg, gzr      the bonds, the one that closes the ring first
``block_term``           obp, ibq, bpqhw                         blocks b, output p, input q
``hierarchical_tucker``  ip, oq, hs, wt, pqu, stv, uv            input, output, each kernel dimension, both, the kernel
=======================  ======================================  ======================================================

The order of the ranks is that of `TensorNetwork.bonds`. ``tt_matrix`` and ``tensor_ring`` split channels into modes.

Sources: cp Lebedev et al. 2015; tucker2 Kim et al. 2016; tucker and tensor_train Kossaifi et al. 2020; tt_matrix
Garipov et al. 2016; tensor_ring Wang et al. 2018; block_term Ye et al. 2018; hierarchical_tucker Hackbusch, Kühn 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType

from ._tensor_modes import channel_modes, integers
from ._tensor_ranks import Limit, Ranks, Sizes, count_parameters, largest_ranks, two_core_limit, useful_ranks
from .tensor_network import TensorNetwork

__all__ = ["FORMATS", "Format", "tensor_network"]

# Indices of channels that are split, of the kernel, and of the bonds of chains: each letter once.
_OUTPUTS, _INPUTS, _KERNEL = "xyzuvtXYZUVT", "ijklmnIJKLMN", "hwd"
_CHAIN = "abcefgpqsoABCDEFGHOPQRSW"


@dataclass(frozen=True)
class Format:
    """A family of tensor networks.

    Attributes:
        cores: from the indices of outputs, inputs and kernel to the cores.
        splits: whether it splits the channels into modes: not at all, freely, or into as many outputs as inputs.
        shares: by bond, the size that a budget gives it beside the others, if not 1; infinite for as large as is of
            use: bonds of kernel dimensions, so small that to cut them saves nothing.
        limit: the largest size of a bond that is of use.
    """

    cores: Callable[[str, str, str], tuple[str, ...]]
    splits: str | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    limit: Limit = two_core_limit

    def shares_of(self, bonds: str) -> dict[str, float]:
        """The share of each bond."""
        return {bond: self.shares.get(bond, 1.0) for bond in bonds}


def tensor_network(
    format: str,
    shape: Sequence[int],
    *,
    rank: int | Sequence[int] | None = None,
    budget: float | None = None,
    in_modes: Sequence[int] | None = None,
    out_modes: Sequence[int] | None = None,
) -> TensorNetwork:
    """A network of a named format for weights of a shape, with ranks that are given, or as large as a budget allows.

    Args:
        format: a key of `FORMATS`.
        shape: of the weight: (out, in / groups, *kernel), with up to three kernel dimensions.
        rank: an int for every bond, cut for each to the largest that is of use; or a sequence with the rank of each
            bond, in the order that the table above gives, taken as it is.
        budget: an int is a number of parameters, a float in (0, 1] a fraction of those of the dense weight. All ranks
            are then as equal as their largest useful sizes and the parameters that remain allow; those of kernel
            dimensions (``tucker``, ``hierarchical_tucker``) are full. ``block_term`` has half as many blocks as the
            rank of a block.
        in_modes: for ``tt_matrix`` and ``tensor_ring``, the factors of ``in``, the first the slowest. By default three,
            or the prime factors if they are fewer, and as equal as they can be.
        out_modes: the same of ``out``. ``tt_matrix`` needs as many as of ``in``, and fills up with ones.

    Returns:
        The network. Its `parameters` exceed those of the dense weight if the ranks are large enough.

    Raises:
        ValueError: an unknown format; both or neither of ``rank`` and ``budget``; a rank below 1, or ranks whose number
            is not that of the bonds; a budget out of range, or below the least that the format needs; modes that do
            not multiply to the channels, or for a format that splits none; a shape that is no weight's.
        TypeError: ranks, modes or sizes that are no integers.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if (rank is None) == (budget is None):
        raise ValueError(f"one of rank and budget must be given, got rank={rank!r} and budget={budget!r}")
    chosen = FORMATS[format]
    shape = integers("shape", shape)
    if not 2 <= len(shape) <= 2 + len(_KERNEL):
        raise ValueError(f"shape must be (out, in, *kernel) with up to {len(_KERNEL)} kernel dimensions, got {shape}")
    outputs, inputs, outs, ins = _channels(format, shape, out_modes, in_modes)
    kernel = _KERNEL[: len(shape) - 2]
    cores = chosen.cores(outputs, inputs, kernel)
    dims = dict(zip(outputs + inputs + kernel, (*outs, *ins, *shape[2:]), strict=True))
    bonds = "".join(label for label in dict.fromkeys("".join(cores)) if label not in dims)
    if budget is not None:
        ranks = _ranks_of_budget(budget, format, shape, bonds, cores, dims)
    else:
        assert rank is not None
        ranks = _given_ranks(rank, bonds, cores, dims, chosen.limit)
    return TensorNetwork(cores, {**dims, **ranks}, inputs=inputs, outputs=outputs, kernel=kernel)


def _channels(
    format: str, shape: Sequence[int], out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
) -> tuple[str, str, tuple[int, ...], tuple[int, ...]]:
    """Indices and modes of the outputs, and of the inputs."""
    splits = FORMATS[format].splits
    if splits is None:
        for name, modes in (("out_modes", out_modes), ("in_modes", in_modes)):
            if modes is not None:
                raise ValueError(f"{name} must be None for format {format!r}, which splits no channels, got {modes}")
        return "o", "i", (shape[0],), (shape[1],)
    outs, ins = channel_modes(shape[0], shape[1], out_modes, in_modes, paired=splits == "paired")
    return _OUTPUTS[: len(outs)], _INPUTS[: len(ins)], outs, ins


def _given_ranks(rank: int | Sequence[int], bonds: str, cores: Sequence[str], dims: Sizes, limit: Limit) -> Ranks:
    if not isinstance(rank, Sequence):
        (cap,) = integers("rank", (rank,))
        return useful_ranks(cores, dims, dict.fromkeys(bonds, cap), limit)
    ranks = integers("rank", rank)
    if len(ranks) != len(bonds):
        raise ValueError(f"rank must be an int, or {len(bonds)} for the bonds {', '.join(bonds)}, got {ranks}")
    return dict(zip(bonds, ranks, strict=True))


def _ranks_of_budget(
    budget: float, format: str, shape: Sequence[int], bonds: str, cores: Sequence[str], dims: Sizes
) -> Ranks:
    dense, chosen = math.prod(shape), FORMATS[format]
    shares = chosen.shares_of(bonds)
    parameters = _parameters(budget, dense)
    ranks = largest_ranks(cores, dims, shares, chosen.limit, parameters)
    least = count_parameters(cores, {**dims, **ranks})
    if least > parameters:
        raise ValueError(
            f"budget must be at least {least} parameters ({least / dense:.3g} of {dense}) for format {format!r} "
            f"and shape {tuple(shape)}, got {budget}"
        )
    return ranks


def _parameters(budget: float, dense: int) -> int:
    """A budget as a number of parameters."""
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"budget must be a number, got {budget!r}")
    if isinstance(budget, Integral):
        return integers("budget", (int(budget),))[0]
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be an int, or a fraction of the dense parameters in (0, 1], got {budget}")
    return int(budget * dense)


# ---------------------------------------------------------------------------------------------------------- formats


def _cp(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    return tuple(label + "r" for label in outputs + inputs + kernel)


def _tucker2(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    return outputs + "p", "pq" + kernel, inputs + "q"


def _tucker(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    leaves = [position + bond for position, bond in zip(kernel, "ste", strict=False)]
    return outputs + "p", inputs + "q", *leaves, "pq" + "ste"[: len(kernel)]


def _tensor_train(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    return _chain((inputs, *kernel, outputs))


def _tt_matrix(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    pairs = [first + second for first, second in zip(inputs, outputs, strict=True)]
    return _chain((kernel, *pairs) if kernel else pairs)


def _tensor_ring(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    first, *middle, last = _chain((*inputs, kernel, *outputs) if kernel else (*inputs, *outputs))
    return "r" + first, *middle, last + "r"


def _block_term(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    return outputs + "bp", inputs + "bq", "bpq" + kernel


def _hierarchical_tucker(outputs: str, inputs: str, kernel: str) -> tuple[str, ...]:
    """The binary tree of channels, (output, input), and of the kernel, ((h, w), d)."""
    leaves = [position + bond for position, bond in zip(kernel, "ste", strict=False)]
    if not kernel:
        return inputs + "p", outputs + "q", "pq"
    subtree = ("stv", "vef")[: len(kernel) - 1]
    return inputs + "p", outputs + "q", *leaves, "pqu", *subtree, "u" + "svf"[len(kernel) - 1]


def _chain(externals: Sequence[str]) -> tuple[str, ...]:
    """Cores in a row, each bonded to the next: bond to the left, own indices, bond to the right."""
    bonds = _CHAIN[: len(externals) - 1]
    return tuple(left + own + right for left, own, right in zip(("", *bonds), externals, (*bonds, ""), strict=True))


def _terms_limit(cores: Sequence[str], sizes: Sizes, bond: str) -> int:
    """Terms of CP that any tensor can be written with: its fibres along the longest mode."""
    modes = [sizes[label] for core in cores for label in core if label != bond]
    return math.prod(modes) // max(modes)


def _block_limit(cores: Sequence[str], sizes: Sizes, bond: str) -> int:
    """Blocks that tile the matrix of output by input; and inside a block the limits of Tucker-2."""
    if bond != "b":
        return two_core_limit(cores, sizes, bond)
    out_channels, in_channels, p, q = (sizes[label] for label in "oipq")
    taps = math.prod([sizes[label] for label in cores[-1] if label not in "bpq"])
    p, q = min(p, out_channels, min(q, in_channels) * taps), min(q, in_channels, min(p, out_channels) * taps)
    return math.ceil(out_channels / p) * math.ceil(in_channels / q)


def _ring_limit(cores: Sequence[str], sizes: Sizes, bond: str) -> int:
    """What a chain needs at this bond, if the ring is opened at the worst other one; and what its two cores have."""
    externals = [math.prod([sizes[label] for label in core[1:-1]]) for core in cores]
    ends = [position for position, core in enumerate(cores) if bond == core[-1]]
    around = externals[ends[0] + 1 :] + externals[: ends[0] + 1]
    arcs = [math.prod(around[:length]) for length in range(1, len(around))]
    return min(two_core_limit(cores, sizes, bond), max(min(arc, math.prod(externals) // arc) for arc in arcs))


_FULL = math.inf

#: The formats that `tensor_network` knows, by name.
FORMATS: dict[str, Format] = {
    "cp": Format(_cp, limit=_terms_limit),
    "tucker2": Format(_tucker2),
    "tucker": Format(_tucker, shares=dict.fromkeys("ste", _FULL)),
    "tensor_train": Format(_tensor_train),
    "tt_matrix": Format(_tt_matrix, splits="paired"),
    "tensor_ring": Format(_tensor_ring, splits="free", limit=_ring_limit),
    "block_term": Format(_block_term, shares={"b": 0.5}, limit=_block_limit),
    "hierarchical_tucker": Format(_hierarchical_tucker, shares=dict.fromkeys("ste", _FULL)),
}
