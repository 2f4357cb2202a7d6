"""A tensor network for the weight of a layer: which cores there are, and which of their indices are contracted.

The weight of a convolution is a tensor of shape (out, in, *kernel). A tensor network writes it as a sum over bonds of
products of small cores, as an einsum does: ``or,ir,hr,wr`` is the canonical form (CP) with the bond ``r``, which four
cores share (a hyperedge). The notation is that of Hayashi, Yamaguchi, Sugawara, Maeda, "Exploring unexplored tensor
network decompositions for convolutional neural networks", NeurIPS 2019.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import opt_einsum
import torch
from opt_einsum.parser import convert_to_valid_einsum_chars
from torch import Tensor

__all__ = ["TensorNetwork"]


@dataclass(frozen=True, init=False, repr=False)
class TensorNetwork:
    """Cores as strings of indices, each index a letter with a size and a role. Immutable and hashable.

    An index that is an input, an output or a position of the kernel is external, and is an index of the weight. All
    others are bonds, and are summed: shared by two cores, by more (a hyperedge), or in one core alone (dangling).
    Cores may share an external index too; the weight is then their elementwise product along it.

    Args:
        cores: the indices of each core, for example ``["or", "ir", "hr", "wr"]``.
        dims: the size of each index.
        inputs: the indices whose sizes multiply to the input channels (of one group), the first the slowest.
        outputs: the indices whose sizes multiply to the output channels, the first the slowest.
        kernel: one index for each spatial dimension, in order; none for a linear layer.

    Raises:
        ValueError: no core, or one without indices; an index that is no letter, is repeated inside a core, has no
            size or one below 1; an external index that is in no core or has two roles; a size for an unknown index.
        TypeError: a size that is no integer, or cores that are no sequence of strings.
    """

    cores: tuple[str, ...]
    inputs: str
    outputs: str
    kernel: str
    # In the order in which the cores have them: networks are equal whatever the order of the mapping that was given.
    _sizes: tuple[tuple[str, int], ...]
    _dims: dict[str, int] = field(compare=False)
    # The path from the cores to the weight. Found here and not when it is first used: `torch.compile` cannot trace it.
    _steps: tuple[tuple[tuple[int, ...], str], ...] = field(compare=False)

    def __init__(
        self, cores: Sequence[str], dims: Mapping[str, int], *, inputs: str, outputs: str, kernel: str = ""
    ) -> None:
        if isinstance(cores, str) or not all(isinstance(core, str) for core in cores):
            raise TypeError(f"cores must be a sequence of strings, such as ['or', 'ir', 'hr', 'wr'], got {cores!r}")
        _check_cores(cores)
        present = dict.fromkeys("".join(cores))
        _check_roles({"inputs": inputs, "outputs": outputs, "kernel": kernel}, present)
        # The class is frozen; this is how a frozen dataclass sets its own fields.
        for name, value in (("cores", tuple(cores)), ("inputs", inputs), ("outputs", outputs), ("kernel", kernel)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_sizes", tuple(_checked_sizes(present, dims)))
        object.__setattr__(self, "_dims", dict(self._sizes))
        object.__setattr__(self, "_steps", _cheapest_steps(self.equation, self.core_shapes))

    @property
    def dims(self) -> Mapping[str, int]:
        """The size of each index, in the order in which the cores have them; it cannot be changed."""
        return MappingProxyType(self._dims)

    @property
    def bonds(self) -> str:
        """The indices that are summed, each once."""
        external = self.outputs + self.inputs + self.kernel
        return "".join(label for label in self._dims if label not in external)

    @property
    def bond_product(self) -> int:
        """Terms of the sum for one entry of the weight: the product of the sizes of all bonds, each taken once."""
        return self.size(self.bonds)

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each core."""
        return tuple(tuple(self._dims[label] for label in core) for core in self.cores)

    @property
    def parameters(self) -> int:
        """Entries of all cores."""
        return sum(self.size(core) for core in self.cores)

    @property
    def in_features(self) -> int:
        """Input features, or input channels of one group."""
        return self.size(self.inputs)

    @property
    def out_features(self) -> int:
        """Output features or channels."""
        return self.size(self.outputs)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Size of the kernel in each spatial dimension; empty for a linear layer."""
        return tuple(self._dims[label] for label in self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.out_features, self.in_features, *self.kernel_size

    @property
    def equation(self) -> str:
        """The einsum from the cores to the weight with all its indices: outputs, inputs, kernel."""
        return f"{','.join(self.cores)}->{self.outputs}{self.inputs}{self.kernel}"

    def size(self, labels: str) -> int:
        """Product of the sizes of some indices."""
        return math.prod([self._dims[label] for label in labels])  # a list: `torch.compile` traces no generator here

    def weight(self, cores: Sequence[Tensor]) -> Tensor:
        """The weight (out, in, *kernel) of cores of the shapes `core_shapes`, contracted along the cheapest path.

        Raises:
            ValueError: the cores have other shapes.
        """
        self.check_cores(cores)
        remaining = list(cores)
        for positions, equation in self._steps:
            taken = [remaining.pop(position) for position in positions]
            remaining.append(torch.einsum(equation, *taken))
        return remaining[0].reshape(self.weight_shape)

    def check_cores(self, cores: Sequence[Tensor]) -> None:
        """Compare cores with the network.

        Raises:
            ValueError: their number or their shapes are not those of the network.
        """
        shapes = tuple(tuple(core.shape) for core in cores)
        if shapes != self.core_shapes:
            raise ValueError(f"cores of {self} must have shapes {self.core_shapes}, got {shapes}")

    def __repr__(self) -> str:
        roles = ", ".join(f"{role}={getattr(self, role)!r}" for role in ("inputs", "outputs", "kernel"))
        return f"TensorNetwork({list(self.cores)}, {self._dims}, {roles})"

    def __str__(self) -> str:
        external = " ".join(filter(None, (self.outputs, self.inputs, self.kernel)))
        bonds = ", ".join(f"{label}={self._dims[label]}" for label in self.bonds)
        return f"{','.join(self.cores)} -> {external}" + (f" ({bonds})" if bonds else "")


@lru_cache(maxsize=1024)
def _cheapest_steps(equation: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[tuple[int, ...], str], ...]:
    """The operands of each step and its einsum, written in the letters that `torch.einsum` knows."""
    _, path = opt_einsum.contract_path(equation, *shapes, shapes=True)
    return tuple((step[0], convert_to_valid_einsum_chars(step[2])) for step in path.contraction_list)


def _check_cores(cores: Sequence[str]) -> None:
    if not cores:
        raise ValueError("cores must be one string or more, got none")
    for core in cores:
        if not core:
            raise ValueError(f"cores must each have an index, got an empty string in {list(cores)}")
        if not core.isalpha():
            raise ValueError(f"cores must be made of letters, one an index, got {core!r}")
        repeated = [label for label in dict.fromkeys(core) if core.count(label) > 1]
        if repeated:
            raise ValueError(f"core {core!r} has index {repeated[0]!r} more than once; a core's indices must differ")


def _check_roles(roles: Mapping[str, str], present: Mapping[str, None]) -> None:
    role_of: dict[str, str] = {}
    for role, labels in roles.items():
        if not isinstance(labels, str):
            raise TypeError(f"{role} must be a string of indices, got {labels!r}")
        for label in labels:
            if label in role_of:
                raise ValueError(f"index {label!r} is in {role_of[label]} and again in {role}; it must have one role")
            if label not in present:
                raise ValueError(f"{role} has index {label!r}, which no core has: cores have {', '.join(present)}")
            role_of[label] = role


def _checked_sizes(present: Mapping[str, None], dims: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    if not isinstance(dims, Mapping):
        raise TypeError(f"dims must map each index to its size, got {dims!r}")
    unknown = [label for label in dims if label not in present]
    if unknown:
        raise ValueError(f"dims has a size for {unknown[0]!r}, which no core has: cores have {', '.join(present)}")
    for label in present:
        if label not in dims:
            raise ValueError(f"dims must have the size of every index, got none for {label!r}")
        if isinstance(dims[label], bool) or not hasattr(dims[label], "__index__"):
            raise TypeError(f"dims must be integers, got {dims[label]!r} for index {label!r}")
        size = operator.index(dims[label])
        if size < 1:
            raise ValueError(f"dims must be at least 1, got {size} for index {label!r}")
        yield label, size
