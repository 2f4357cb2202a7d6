"""A chain of products of cores as steps that run: which indices each sums, keeps and adds, and in what order."""

from __future__ import annotations

import math

from ._contraction_operands import Operands
from ._contraction_path import Chain, Tree
from ._contraction_steps import Convolution, Core, CoreProduct, Grouped, Linear, Ordering, Pair, Scaling, Step

__all__ = ["compiled"]


def compiled(problem: Operands, chain: Chain) -> tuple[tuple[Step, ...], Ordering]:
    """The steps of a chain, and how the channels after the last must be ordered to be the output's."""
    return _Compiler(problem, chain).run()


class _Compiler:
    def __init__(self, problem: Operands, chain: Chain) -> None:
        self.problem, self.chain = problem, chain
        self.dims = problem.dims
        self.kernel = "".join(label for label in problem.kernel if label is not None)
        self.external = problem.inputs + problem.outputs + self.kernel
        self.last = self._last_uses()

    def run(self) -> tuple[tuple[Step, ...], Ordering]:
        labels, steps = self.problem.inputs, []
        for position in range(len(self.chain)):
            step, labels = self._step(labels, position)
            steps.append(step)
        return tuple(steps), Ordering.of(labels, self.problem.outputs, self.dims)

    def _step(self, labels: str, position: int) -> tuple[Step, str]:
        """The step at a position of the chain for a map with channels over ``labels``, and the labels after it."""
        tree = self.chain[position]
        factor = self._product_labels(tree)
        summed = "".join(label for label in labels if label in factor and self.last[label] == position)
        kept = "".join(label for label in labels if label not in summed)
        shared = "".join(label for label in kept if label in factor)
        # What is summed next goes last, where a matrix product can sum it as it lies.
        new = "".join(label for label in factor if label not in labels and label not in self.kernel)
        new = "".join(sorted(new, key=lambda label: (-self.last[label], self._rank_of_output(label))))
        axes = tuple(axis for axis, label in enumerate(self.problem.kernel) if label is not None and label in factor)
        if axes:
            return self._convolution(tree, labels, kept, shared, summed, new, axes), kept + new
        if not shared:
            ordering = Ordering.of(labels, kept + summed, self.dims)
            shape = self._size(new), self._size(summed)
            return Linear(ordering, self._product(tree, new + summed), self._size(kept), shape), kept + new
        if not summed and not new:
            view = tuple(self.dims[label] if label in shared else 1 for label in labels)
            return Scaling(self._sizes(labels), self._product(tree, shared), view), labels
        alone = "".join(label for label in kept if label not in shared)
        ordering = Ordering.of(labels, alone + shared + summed, self.dims)
        sizes = self._size(alone), self._size(shared), self._size(new), self._size(summed)
        return Grouped(ordering, self._product(tree, shared + new + summed), sizes), alone + shared + new

    def _convolution(
        self, tree: Tree, labels: str, kept: str, shared: str, summed: str, new: str, axes: tuple[int, ...]
    ) -> Convolution:
        kernel = "".join(label for axis in axes if (label := self.problem.kernel[axis]) is not None)
        count = range(len(self.problem.kernel))
        return Convolution(
            ordering=Ordering.of(labels, kept + summed, self.dims),
            factor=self._product(tree, shared + new + summed + kernel),
            staying=tuple(self.dims[label] if label in shared else 1 for label in kept),
            groups=self._sizes(kept),
            features=(self._size(new), self._size(summed)),
            kernel=tuple(self.dims[self.problem.kernel[axis] or ""] if axis in axes else 1 for axis in count),
            stride=tuple(self.problem.stride[axis] if axis in axes else 1 for axis in count),
            dilation=tuple(self.problem.dilation[axis] if axis in axes else 1 for axis in count),
            axes=axes,
        )

    # ------------------------------------------------------------------------------------------- products of cores

    def _product(self, tree: Tree, wanted: str) -> CoreProduct:
        """The product of a tree, laid out as ``wanted``."""
        if isinstance(tree, int):
            return Core.of(tree, self.problem.cores[tree], wanted, self.dims)
        left, right = (self._product_labels(branch) for branch in tree)
        return Pair.of(self._product(tree[0], left), self._product(tree[1], right), (left, right), wanted)

    def _product_labels(self, tree: Tree) -> str:
        """Indices of a product of cores that something else has, too."""
        inside = _cores_of(tree)
        outside = "".join(core for index, core in enumerate(self.problem.cores) if index not in inside)
        present = dict.fromkeys("".join(self.problem.cores[index] for index in inside))
        return "".join(label for label in present if label in self.external + outside)

    def _last_uses(self) -> dict[str, int]:
        """The place in the chain at which each index is last needed; beyond the chain for outputs."""
        last = {}
        for place, tree in enumerate(self.chain):
            for index in _cores_of(tree):
                last.update(dict.fromkeys(self.problem.cores[index], place))
        return last | dict.fromkeys(self.problem.outputs, len(self.chain))

    # -------------------------------------------------------------------------------------------------------- sizes

    def _rank_of_output(self, label: str) -> int:
        return self.problem.outputs.find(label)

    def _sizes(self, labels: str) -> tuple[int, ...]:
        return tuple(self.dims[label] for label in labels)

    def _size(self, labels: str) -> int:
        return math.prod(self._sizes(labels))


def _cores_of(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [index for branch in tree for index in _cores_of(branch)]
