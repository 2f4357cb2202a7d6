"""What comes after a layer: a batch normalization, a ReLU or leaky ReLU, both, or anything else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Following", "following"]

#: A channel that batch normalization removes (scale 0) keeps this share of the largest scale: it stays determined.
_LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class Normalization:
    """A batch normalization, with the statistics that it uses in evaluation."""

    scale: Tensor
    shift: Tensor
    mean: Tensor | None
    variance: Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Following:
    """An elementwise map after a layer: x -> s(gain x + offset), with s of slope ``slope`` below 0."""

    #: 0 for ReLU, 1 where there is none.
    slope: float = 1.0
    normalization: Normalization | None = None

    def __str__(self) -> str:
        names = [] if self.normalization is None else ["BatchNorm"]
        if self.slope != 1:
            names.append("ReLU" if self.slope == 0 else f"leaky ReLU {self.slope:g}")
        return ", ".join(names)

    def activation(self, x: Tensor) -> Tensor:
        """The rectifier."""
        if self.slope == 0:
            return F.relu(x)
        return x if self.slope == 1 else F.leaky_relu(x, self.slope)

    def affine(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and offset (groups, 1, out / groups) of the normalization, 1 and 0 if there is none.

        Args:
            outputs: (groups, rows, out / groups) of the layer, for a normalization without statistics of its own.
        """
        one = outputs.new_ones(1, 1, 1)
        if self.normalization is None:
            return one, 0 * one
        norm = self.normalization
        mean, variance = (
            (outputs.mean(1, keepdim=True), outputs.var(1, keepdim=True, correction=0))
            if norm.mean is None or norm.variance is None
            else (_per_channel(norm.mean, outputs), _per_channel(norm.variance, outputs))
        )
        scale = _per_channel(norm.scale, outputs) / (variance + norm.epsilon).sqrt()
        least = (_LEAST_SCALE * scale.abs().max()).clamp(min=torch.finfo(scale.dtype).tiny)
        scale = torch.where(scale < 0, scale.clamp(max=-least), scale.clamp(min=least))
        return scale, _per_channel(norm.shift, outputs) - scale * mean

    def __call__(self, outputs: Tensor) -> Tensor:
        """What follows, applied to outputs (groups, rows, out / groups) with statistics of their own."""
        if self.normalization is not None:
            norm = self.normalization
            variance, mean = torch.var_mean(outputs, 1, correction=0, keepdim=True)
            scale, shift = (_per_channel(x, outputs) for x in (norm.scale, norm.shift))
            outputs = (outputs - mean) * (scale / (variance + norm.epsilon).sqrt()) + shift
        return self.activation(outputs)


def _per_channel(values: Tensor, outputs: Tensor) -> Tensor:
    return values.to(outputs).reshape(len(outputs), 1, -1)


def following(layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> dict[str, Following]:
    """What follows each of some layers in one forward pass, of those that it calls.

    It is what reads the layer's output if nothing else does, be it a module or a function: batch normalization and
    then perhaps a rectifier, or a rectifier. Of a layer called several times the first call counts.

    Args:
        layers: of a model in evaluation mode, by name.
        forward: runs it.
    """
    watch = _Watch()
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, arguments: Any, output: Any) -> None:
            if name not in outputs:
                outputs[name] = output
                watch.begin(output)

        return record

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        with watch:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: watch.following(output) for name, output in outputs.items()}


class _Watch(TorchFunctionMode):
    """Notes which functions of torch read some tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._readers: dict[int, list[tuple[str, dict[str, Any], Tensor]]] = {}
        self._tensors: list[Tensor] = []  # kept, so that no other tensor takes their identities
        self._overwritten: set[int] = set()

    def begin(self, tensor: Tensor) -> None:
        """Watch a tensor from now on."""
        self._tensors.append(tensor)
        self._readers[id(tensor)] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = {id(leaf): leaf for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self._readers}
        versions = {one: leaf._version for one, leaf in leaves.items() if one not in self._overwritten}
        result = func(*args, **kwargs)
        # Sizes and the like are no reading.
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        name = getattr(func, "__name__", "")
        for one, version in versions.items():
            overwritten = leaves[one]._version != version
            if id(result) == one and not overwritten:
                continue  # dropout in evaluation, for one: the tensor as it is
            self._readers[one].append((name, _arguments(name, args, kwargs), result))
            if overwritten:
                self._overwritten.add(one)
        if versions and name == "batch_norm":
            self.begin(result)
        return result

    def following(self, output: Tensor) -> Following:
        """What follows a watched tensor."""
        name, arguments, result = self._only_reader(output)
        normalization = None
        if name == "batch_norm":
            normalization = _normalization(arguments, output)
            name, arguments, _ = self._only_reader(result)
        if name in ("relu", "relu_"):
            return Following(0.0, normalization)
        if name in ("leaky_relu", "leaky_relu_"):
            return Following(float(arguments["negative_slope"]), normalization)
        return Following(1.0, normalization)

    def _only_reader(self, tensor: Tensor) -> tuple[str, dict[str, Any], Tensor]:
        readers = self._readers[id(tensor)]
        return readers[0] if len(readers) == 1 else ("", {}, tensor)


_SIGNATURES = {
    "batch_norm": inspect.signature(F.batch_norm),
    "leaky_relu": inspect.signature(F.leaky_relu),
    "leaky_relu_": inspect.Signature(
        [
            inspect.Parameter("input", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("negative_slope", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=0.01),
        ]
    ),
}


def _arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if name not in _SIGNATURES:
        return {}
    bound = _SIGNATURES[name].bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _normalization(arguments: Mapping[str, Any], output: Tensor) -> Normalization:
    own = not arguments["training"]
    scale, shift = arguments["weight"], arguments["bias"]
    return Normalization(
        output.new_ones(output.shape[1]) if scale is None else scale.detach(),
        output.new_zeros(output.shape[1]) if shift is None else shift.detach(),
        arguments["running_mean"] if own else None,
        arguments["running_var"] if own else None,
        float(arguments["eps"]),
    )
