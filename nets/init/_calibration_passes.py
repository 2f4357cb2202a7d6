"""Forward passes of a model over kept batches, each no further than it must go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

__all__ = ["Batch", "Network", "kept_batches", "normalizations", "restored_on_error"]

#: The positional arguments of one forward pass.
Batch: TypeAlias = tuple[Any, ...]


class _Reached(BaseException):
    """Ends a forward pass; no `Exception`, so that no model catches it."""


def kept_batches(batches: Iterable[Any]) -> list[Batch]:
    """The inputs of all batches, from one pass over them.

    Raises:
        TypeError: no iterable of tensors, or of tuples or lists whose first entry is the input.
        ValueError: no batch, or NaN or infinite entries in one.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, such as a list, got {type(batches).__name__}")
    kept: list[Batch] = []
    for index, batch in enumerate(batches):
        first = batch[0] if isinstance(batch, tuple | list) and batch else batch
        arguments = tuple(first) if isinstance(first, tuple | list) else (first,)
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if not tensors:
            raise TypeError(
                f"batches must hold tensors, or tuples or lists whose first entry is the input, got a "
                f"{type(batch).__name__} without a tensor there as batch {index}"
            )
        if any(leaf.is_floating_point() and not bool(leaf.isfinite().all()) for leaf in tensors):
            raise ValueError(f"batches: batch {index} has NaN or infinite entries")
        kept.append(arguments)
    if not kept:
        raise ValueError("batches must have at least one batch, got none")
    return kept


def normalizations(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch normalizations that keep running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


class Network:
    """A model for passes without gradients, in evaluation mode inside of a ``with`` block.

    Inputs are moved to the device, and those of floating-point numbers to the dtype, of its first parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modes: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> Network:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, training in self._modes:
            module.training = training

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Any:
        """The whole forward pass."""
        like = next(self.model.parameters())

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(like) if leaf.is_floating_point() else leaf.to(like.device)

        return self.model(*pytree.tree_map(moved, batch))

    def input_of(self, layer: nn.Module, batch: Batch) -> Tensor:
        """What a layer reads in its first call, by a pass up to there."""

        def reach(_: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
            raise _Reached(arguments[0] if arguments else next(iter(options.values())))

        handle = layer.register_forward_pre_hook(reach, with_kwargs=True)
        try:
            self(batch)
        except _Reached as reached:
            tensor: Tensor = reached.args[0].detach()
            return tensor
        finally:
            handle.remove()
        raise ValueError("batches: a layer that the first batch reaches is not called for another batch")

    def visit_outputs(
        self, layers: Mapping[str, nn.Module], batch: Batch, visit: Callable[[str, Tensor], None]
    ) -> None:
        """Run a whole pass and show what each layer returns in its first call, before anything can overwrite it."""
        visited: set[str] = set()

        def visitor(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def show(module: nn.Module, arguments: Any, output: Tensor) -> None:
                if name not in visited:
                    visited.add(name)
                    visit(name, output.detach())

            return show

        handles = [layer.register_forward_hook(visitor(name)) for name, layer in layers.items()]
        try:
            self(batch)
        finally:
            for handle in handles:
                handle.remove()

    def call_order(self, modules: Mapping[str, nn.Module], batch: Batch) -> list[str]:
        """Names of the modules that a pass calls, in the order of their first calls."""
        called: dict[str, None] = {}

        def recorder(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, arguments: called.setdefault(name)

        handles = [module.register_forward_pre_hook(recorder(name)) for name, module in modules.items()]
        try:
            self(batch)
        finally:
            for handle in handles:
                handle.remove()
        return list(called)

    @contextmanager
    def estimating(self, norms: Sequence[_BatchNorm]) -> Iterator[None]:
        """Batch normalizations estimate their running statistics anew: means over the batches that pass."""
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.training = False


@contextmanager
def restored_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back the values of tensors if the block raises."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        raise
