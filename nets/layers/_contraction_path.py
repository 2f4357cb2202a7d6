"""The cheapest order in which a map of features absorbs the cores of a tensor network.

A contraction is a chain: the map absorbs a product of cores, then another, until none is left. What a link costs
depends on the sets of cores before and after it alone, so the cheapest chain of a few cores is found exactly, by
dynamic programming over subsets; for many cores, `opt_einsum` proposes chains and the cheapest of them is taken.

Costs are counted for one position of the output. Two things tell a convolution from an einsum: a link whose cores
have a kernel index convolves that axis, so before it the map has as many positions as the input, and after it as the
output (a stride of 2 halves them); and a map is read and written from memory, which takes as long as `MEMORY`
multiplications for each of its numbers. Without that term the search would split a depthwise 3 x 3 convolution into
3 x 1 and 1 x 3: fewer multiplications, and slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import opt_einsum

from ._contraction_operands import Operands

__all__ = ["MEMORY", "Chain", "Cost", "Tree", "building_products", "cheapest_chain"]

#: Reading or writing one number of a map, in multiplications: 40 to 80 as measured on a CPU, forward and backward.
MEMORY = 50
#: Positions over which the products of cores are shared when a cost is estimated: those of a batch of small maps.
POSITIONS = 4096
#: Rows that a linear layer multiplies at once, for the same purpose.
ROWS = 128
#: Cores up to which the search is exact: it takes 3^n steps.
EXACT = 8

#: A product of cores: the position of one, or two products.
Tree: TypeAlias = "int | tuple[Tree, Tree]"
#: The products of cores that the map absorbs, in order.
Chain: TypeAlias = tuple[Tree, ...]


@dataclass(frozen=True)
class Cost:
    """What a chain costs: multiplications and memory for one position of the output, and once for all positions."""

    multiplications: int
    elements: int  # of maps, read and written
    products: int  # multiplications of cores with cores, whatever the number of positions
    positions: int  # over which they are shared

    @property
    def total(self) -> float:
        """Everything in multiplications for one position."""
        return self.multiplications + MEMORY * self.elements + self.products / self.positions


@lru_cache(maxsize=1024)
def cheapest_chain(problem: Operands) -> tuple[Chain, Cost]:
    """The cheapest chain, and what it costs."""
    search = _Search(problem)
    if len(problem.cores) <= EXACT:
        chain = search.exact_chain()
    else:
        chain = min(search.proposed_chains(), key=lambda chain: search.cost(chain).total)
    return chain, search.cost(chain)


@lru_cache(maxsize=1024)
def building_products(problem: Operands) -> int:
    """Multiplications that build the weight from the cores."""
    search = _Search(problem)
    if len(problem.cores) <= EXACT:
        return search.product(search.all)[0]
    return min(search.tree_products(tree) for tree in search.proposed_weights())


class _Search:
    """Sets of cores and of indices are bits of an integer."""

    def __init__(self, problem: Operands) -> None:
        self.problem = problem
        self.labels = [label for label, _ in problem.sizes]
        self.sizes = [size for _, size in problem.sizes]
        self.cores = [self.bits(core) for core in problem.cores]
        self.all = (1 << len(self.cores)) - 1
        self.inputs, self.outputs = self.bits(problem.inputs), self.bits(problem.outputs)
        kernel = [label for label in problem.kernel if label is not None]
        self.kernel = self.bits("".join(kernel))
        self.external = self.inputs | self.outputs | self.kernel
        # An axis is convolved once: by a product of all cores that have its index.
        self.convolving = [
            (sum(1 << index for index, core in enumerate(problem.cores) if label in core), stride)
            for label, stride in zip(problem.kernel, problem.stride, strict=True)
            if label is not None
        ]
        self.positions = POSITIONS if problem.kernel else ROWS
        self._size: dict[int, int] = {}
        self._present: dict[int, int] = {}
        self._products: dict[int, tuple[int, Tree]] = {}

    # ------------------------------------------------------------------------------------------ indices and sizes

    def bits(self, labels: str) -> int:
        return sum(1 << self.labels.index(label) for label in labels)

    def size(self, labels: int) -> int:
        """Product of the sizes of a set of indices."""
        if labels not in self._size:
            self._size[labels] = math.prod(size for bit, size in enumerate(self.sizes) if labels >> bit & 1)
        return self._size[labels]

    def present(self, cores: int) -> int:
        """Indices in any of these cores."""
        if cores not in self._present:
            found = 0
            for index, labels in enumerate(self.cores):
                if cores >> index & 1:
                    found |= labels
            self._present[cores] = found
        return self._present[cores]

    def product_labels(self, cores: int) -> int:
        """Indices of the product of these cores: those that something else has, too."""
        return self.present(cores) & (self.external | self.present(self.all ^ cores))

    def map_labels(self, absorbed: int) -> int:
        """Indices of the map that has absorbed these cores."""
        needed = self.outputs | self.present(self.all ^ absorbed)
        return (self.inputs | self.present(absorbed)) & needed & ~self.kernel

    def map_positions(self, absorbed: int) -> int:
        """Positions of that map for each of the output's."""
        return math.prod(stride for cores, stride in self.convolving if not cores & absorbed)

    def map_size(self, absorbed: int) -> int:
        return self.size(self.map_labels(absorbed)) * self.map_positions(absorbed)

    def link(self, absorbed: int, product: int) -> tuple[int, int]:
        """Multiplications, and numbers read and written, as the map absorbs a product."""
        after = absorbed | product
        labels = self.map_labels(absorbed) | self.product_labels(product)
        multiplications = self.size(labels) * self.map_positions(after)
        return multiplications, self.map_size(absorbed) + self.map_size(after)

    # ------------------------------------------------------------------------------------------------ exact search

    def product(self, cores: int) -> tuple[int, Tree]:
        """Multiplications of the cheapest way to multiply these cores, and the way."""
        if cores not in self._products:
            self._products[cores] = min(self._pairs(cores), default=(0, cores.bit_length() - 1), key=lambda way: way[0])
        return self._products[cores]

    def _pairs(self, cores: int) -> Iterator[tuple[int, Tree]]:
        first = cores & -cores  # the left one has it: each pair once
        for left in _subsets(cores ^ first):
            left |= first
            if left == cores:
                continue
            right = cores ^ left
            multiplications = self.size(self.product_labels(left) | self.product_labels(right))
            (cost_left, tree_left), (cost_right, tree_right) = self.product(left), self.product(right)
            yield cost_left + cost_right + multiplications, (tree_left, tree_right)

    def convolves_whole(self, product: int) -> bool:
        """Whether each kernel index of a product is in no other core."""
        return all(product & cores in (0, cores) for cores, _ in self.convolving)

    def exact_chain(self) -> Chain:
        best: dict[int, tuple[float, Chain]] = {0: (0.0, ())}
        # The product of all cores is the weight: it is built only if a kernel index that all have leaves no choice.
        possible = [product for product in range(1, self.all) if self.convolves_whole(product)] or [self.all]
        for absorbed in range(self.all):  # a superset is a larger number: its best is complete when it is reached
            if absorbed not in best:
                continue
            so_far, chain = best[absorbed]
            for product in possible:
                if product & absorbed:
                    continue
                multiplications, elements = self.link(absorbed, product)
                products, tree = self.product(product)
                total = so_far + multiplications + MEMORY * elements + products / self.positions
                after = absorbed | product
                if after not in best or total < best[after][0]:
                    best[after] = total, (*chain, tree)
        return best[self.all][1]

    # ------------------------------------------------------------------------------------------------- many cores

    def proposed_chains(self) -> Iterator[Chain]:
        """Chains that `opt_einsum` finds cheapest.

        An einsum cannot say that a convolution takes up kernel indices without making the map larger: with them on the
        map the links before it look too dear, with them on the output those after it.
        """
        atoms = list(self._atoms())
        kernel = self._names(self.kernel)
        batch = opt_einsum.get_symbol(10_000)
        sizes = {**self.problem.dims, batch: self.positions}
        terms = [self._names(self.product_labels(_cores_of(atom))) for atom in atoms]
        for before, after in ((kernel, ""), ("", kernel)):
            equation = ",".join([batch + self.problem.inputs + before, *terms])
            yield _chain_of(_path(f"{equation}->{batch}{self.problem.outputs}{after}", sizes), atoms)

    def proposed_weights(self) -> Iterator[Tree]:
        """The way to multiply all cores that `opt_einsum` finds cheapest."""
        equation = f"{','.join(self.problem.cores)}->{self._names(self.external & self.present(self.all))}"
        nodes: list[Tree] = list(range(len(self.cores)))
        for step in _path(equation, self.problem.dims):
            nodes.append(_fold([nodes.pop(position) for position in sorted(step, reverse=True)]))
        yield _fold(nodes)

    def _atoms(self) -> Iterator[Tree]:
        """The cores, those that share a kernel index multiplied with each other."""
        sets: list[int] = [1 << index for index in range(len(self.cores))]
        for cores, _ in self.convolving:
            joined = [one for one in sets if one & cores]
            sets = [one for one in sets if not one & cores] + [sum(joined)]
        for cores in sets:
            yield _fold([index for index in range(len(self.cores)) if cores >> index & 1])

    def _names(self, labels: int) -> str:
        return "".join(label for bit, label in enumerate(self.labels) if labels >> bit & 1)

    # ------------------------------------------------------------------------------------------------------- costs

    def tree_products(self, tree: Tree) -> int:
        """Multiplications of a product of cores along its tree."""
        if isinstance(tree, int):
            return 0
        left, right = tree
        labels = self.product_labels(_cores_of(left)) | self.product_labels(_cores_of(right))
        return self.tree_products(left) + self.tree_products(right) + self.size(labels)

    def cost(self, chain: Chain) -> Cost:
        """The cost of any chain."""
        absorbed = multiplications = elements = 0
        for tree in chain:
            cores = _cores_of(tree)
            more, moved = self.link(absorbed, cores)
            multiplications, elements, absorbed = multiplications + more, elements + moved, absorbed | cores
        products = sum(map(self.tree_products, chain))
        return Cost(multiplications, elements, products, self.positions)


def _subsets(bits: int) -> Iterator[int]:
    """All subsets, the empty one and the whole included."""
    subset = bits
    while True:
        yield subset
        if not subset:
            return
        subset = (subset - 1) & bits


def _cores_of(tree: Tree) -> int:
    return 1 << tree if isinstance(tree, int) else _cores_of(tree[0]) | _cores_of(tree[1])


def _fold(trees: Sequence[Tree]) -> Tree:
    first, *rest = trees
    for tree in rest:
        first = (first, tree)
    return first


def _path(equation: str, sizes: Mapping[str, int]) -> Iterable[tuple[int, ...]]:
    shapes = [tuple(sizes[label] for label in term) for term in equation.partition("->")[0].split(",")]
    steps: Iterable[tuple[int, ...]] = opt_einsum.contract_path(equation, *shapes, shapes=True)[0]
    return steps


def _chain_of(path: Iterable[tuple[int, ...]], atoms: Sequence[Tree]) -> Chain:
    """The chain of a path over the map, the first operand, and products of cores."""
    chain: list[Tree] = []
    nodes: list[Tree | None] = [None, *atoms]  # None is the map
    for step in path:
        taken = [nodes.pop(position) for position in sorted(step, reverse=True)]
        trees = [tree for tree in taken if tree is not None]
        if len(trees) < len(taken):
            chain += trees
            nodes.append(None)
        else:
            nodes.append(_fold(trees))
    return tuple(chain)
