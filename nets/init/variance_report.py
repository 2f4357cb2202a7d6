"""How a network scales signals and gradients, layer by layer: what an initialisation is meant to keep at one.

The quantities are those of He et al., ICCV 2015, sections 2.2 and 2.3: second moments of the responses of each layer,
before its activation, and of the gradients with respect to them. A network of L layers multiplies L of the ratios, so
that a deep one without normalisation trains only if all are close to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from retract.nets._probe import float_tensors
from retract.nets._text_table import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["WINDOW", "LayerVariance", "Means", "VarianceReport", "variance_report"]

WINDOW = (0.85, 1.2)
"""Where the ratios of a layer should lie: sixteen layers then keep a second moment within 0.07 and 18 times itself."""


@dataclass(frozen=True)
class LayerVariance:
    """One call of a layer. Moments are means over all elements of a tensor, batch included."""

    #: Name of the module in the model; a second call is ``name (2)``.
    name: str
    #: Class of the module.
    kind: str
    #: E[y²] of what the layer returns, before its activation.
    moment: float
    #: E[y²] / E[y²] of the layer called before; for the first layer, of the model's input. NaN if that is of integers.
    forward: float
    #: E[g²] of the gradient with respect to y; NaN if y does not reach an output.
    gradient_moment: float
    #: E[g²] of the layer called before / E[g²]; for the first layer, of the model's input.
    backward: float


class Means(NamedTuple):
    """Of the ratios of all layers but the first, whose input no activation has been applied to."""

    arithmetic: float
    geometric: float


@dataclass(frozen=True)
class VarianceReport:
    """Forward and backward ratios of a model's layers, in the order of their calls. ``str`` is a table."""

    layers: tuple[LayerVariance, ...]

    @property
    def forward(self) -> Means:
        """Means of the forward ratios; NaN for a model of one layer."""
        return _means([layer.forward for layer in self.layers[1:]])

    @property
    def backward(self) -> Means:
        """Means of the backward ratios; NaN for a model of one layer."""
        return _means([layer.backward for layer in self.layers[1:]])

    def __str__(self) -> str:
        rows = [_HEADER, *(_cells(layer) for layer in self.layers)]
        for name in Means._fields:
            forward, backward = (_figure(getattr(means, name)) for means in (self.forward, self.backward))
            rows.append((f"{name} mean", "", "", forward, "", backward))
        header, rule, *lines = text_table(rows, 2)
        return "\n".join([header, rule, *lines[:-2], rule, *lines[-2:]])

    def plot(self, target: str | Path | Axes) -> Axes:
        """Draw both ratios against the layers, on a logarithmic scale, with the window shaded.

        Args:
            target: axes to draw on, or the file to write a figure to (its suffix says in which format).

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        if not isinstance(target, str | Path):
            self._draw(target)
            return target
        figure = Figure(figsize=(max(5.0, 0.22 * len(self.layers) + 2), 3.6), layout="constrained")
        axes = figure.subplots()
        self._draw(axes)
        figure.savefig(target)
        return axes

    def _draw(self, axes: Axes) -> None:
        positions = range(1, len(self.layers) + 1)
        axes.axhspan(*WINDOW, color="0.5", alpha=0.15, linewidth=0)
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.plot(positions, [layer.forward for layer in self.layers], marker="o", markersize=3, label="forward")
        axes.plot(positions, [layer.backward for layer in self.layers], marker="s", markersize=3, label="backward")
        axes.set_yscale("log")
        axes.set_xticks(positions, [layer.name for layer in self.layers], rotation=90, fontsize="x-small")
        axes.set_ylabel("ratio of second moments")
        axes.legend()


def variance_report(model: nn.Module, *inputs: Any) -> VarianceReport:
    """Run a model once forward and once backward, and compare second moments from layer to layer.

    Layers are `torch.nn.Linear`, all convolutions and all layers of a tensor network, parametrized or not, one row for
    each call. "The layer before" is the one called before: in a network with branches that need not be the one whose
    output a layer reads. Gradients are those of <output, random normal cotangent>, the same cotangent in every report.

    The model runs in the mode it is in. Its parameters, their gradients, its buffers and torch's random state are left
    as they were.

    Args:
        model: any network.
        *inputs: the positional arguments of one forward pass, of the scale of real data. Of the first floating-point
            tensor in them the first layer's ratios are taken.

    Returns:
        A `VarianceReport`: ``layers`` has a row for each call, ``forward`` and ``backward`` are means of the ratios,
        ``plot`` draws them, and its string is a table.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the forward or the backward pass fails, the output holds no floating-point tensor, no layer is
            called, or a lazy layer has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise ValueError("model has layers without a shape yet: run one forward pass of the lazy model first")
    layers = {name: module for name, module in model.named_modules() if _is_layer(module)}
    calls: list[_Call] = []
    handles = [module.register_forward_hook(_recorder(name, calls)) for name, module in layers.items()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(_cuda_devices(model)), torch.inference_mode(False), torch.enable_grad():
            arguments = pytree.tree_map(_differentiable, inputs)
            source = _source(arguments)
            outputs = _outputs(model, arguments)
            calls = [source, *calls]  # another list: recomputing a checkpointed block calls its hooks again
            gradients = _gradient_moments(outputs, [call.edge for call in calls])
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    if len(calls) == 1:
        raise ValueError("model: its forward pass calls no linear layer, convolution or tensor layer")
    return VarianceReport(_rows(calls, gradients))


# ------------------------------------------------------------------------------------------------ one forward pass


class _Call(NamedTuple):
    name: str
    kind: str
    moment: Tensor
    edge: GradientEdge | None


_NAN = torch.tensor(math.nan, dtype=torch.float64)


def _is_layer(module: nn.Module) -> bool:
    """Layers of a tensor network are known by their attributes: their own module imports this package."""
    tensorial = hasattr(module, "network") and hasattr(module, "cores")
    return tensorial or isinstance(module, nn.Linear | _ConvNd)


def _differentiable(value: Any) -> Any:
    """A copy to differentiate by, and no leaf, so that the model may write into it."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_().clone()
    return value


def _source(arguments: Any) -> _Call:
    """The model's input, as if it were what a layer before the first one returned."""
    first = next(float_tensors(arguments), None)
    return _Call("", "", _NAN, None) if first is None else _call("", "", first)


def _call(name: str, kind: str, tensor: Tensor) -> _Call:
    return _Call(name, kind, _moment(tensor), get_gradient_edge(tensor) if tensor.requires_grad else None)


def _recorder(name: str, calls: list[_Call]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook. It keeps an edge of the graph, not the output, which an activation may overwrite."""
    count = 0

    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal count
        count += 1
        for tensor in float_tensors(output):
            label = name or "(model)"
            calls.append(_call(label if count == 1 else f"{label} ({count})", type(module).__name__, tensor))

    return record


def _outputs(model: nn.Module, arguments: Any) -> list[Tensor]:
    try:
        outputs = list(float_tensors(model(*arguments)))
    except Exception as error:
        raise ValueError(f"the model's forward pass failed on the inputs: {error}") from error
    if not outputs:
        raise ValueError("model: its forward pass returns no floating-point tensor")
    return outputs


def _gradient_moments(outputs: Sequence[Tensor], edges: Sequence[GradientEdge | None]) -> list[Tensor]:
    """E[g^2] at each edge, for a random normal cotangent; NaN where the outputs do not depend on it."""
    reached = [output for output in outputs if output.requires_grad]
    known = [edge for edge in edges if edge is not None]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(output.shape, generator=generator).to(output) for output in reached]
    found: Iterator[Tensor | None] = iter(())
    if reached and known:
        try:
            found = iter(torch.autograd.grad(reached, known, cotangents, allow_unused=True))
        except RuntimeError as error:  # checkpoint(..., use_reentrant=True) knows no gradients but of all leaves
            raise ValueError(f"the model's backward pass failed: {error}") from error
    gradients = [None if edge is None else next(found, None) for edge in edges]
    return [_NAN if gradient is None else _moment(gradient) for gradient in gradients]


def _moment(tensor: Tensor) -> Tensor:
    """Mean square, in float64: that of an exploding float32 tensor is finite, too."""
    return tensor.detach().double().square().mean()


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({parameter.device for parameter in model.parameters() if parameter.is_cuda})


# --------------------------------------------------------------------------------------------------------- figures


def _rows(calls: Sequence[_Call], gradients: Sequence[Tensor]) -> tuple[LayerVariance, ...]:
    """Ratios from one call to the next; 0 / 0 is NaN."""
    moments = torch.stack([call.moment.cpu() for call in calls])
    squares = torch.stack([moment.cpu() for moment in gradients])
    columns = (moments[1:], moments[1:] / moments[:-1], squares[1:], squares[:-1] / squares[1:])
    rows = zip(calls[1:], *(column.tolist() for column in columns), strict=True)
    return tuple(LayerVariance(call.name, call.kind, *figures) for call, *figures in rows)


def _means(ratios: Sequence[float]) -> Means:
    if not ratios:
        return Means(math.nan, math.nan)
    values = torch.tensor(ratios, dtype=torch.float64)
    return Means(float(values.mean()), float(values.log().mean().exp()))


_HEADER = ("layer", "module", "E[y²]", "forward", "E[g²]", "backward")


def _cells(layer: LayerVariance) -> tuple[str, ...]:
    figures = (layer.moment, layer.forward, layer.gradient_moment, layer.backward)
    return (layer.name, layer.kind, *map(_figure, figures))


def _figure(value: float) -> str:
    return f"{value:.3g}"
