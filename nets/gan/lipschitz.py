"""Upper bound of a discriminator's Lipschitz constant, from the norms of its layers and how they are connected.

For L2 norms of images and scores, a chain of maps has at most the product of their constants, and a sum of branches
at most the sum, so that a residual block x + f(x) has 1 + L(f). The graph of the network is read by `torch.fx`; one
image is sent through it for the sizes. The bound is far from sharp: each layer attains its norm at another input. It
tells whether a constraint holds for the whole network, and by how much a network without one has grown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._conv_norm import circular_excess, conv_norm_bound
from .._layers import weight_layers
from ..parametrizations._base import spectral_weight, widened
from .spectra import evaluating

__all__ = ["lipschitz_bound"]


@torch.no_grad()
def lipschitz_bound(discriminator: nn.Module, input_shape: Sequence[int]) -> float:
    """Bound max |D(x) - D(y)| / ||x - y|| over images, in the evaluation mode of the network, from above.

    Linear layers count with their spectral norm, convolutions with `retract.nets.spectral.conv_norm_bound`, which
    strided ones take as convolutions of stride 1 of the image's phases. The call changes no state.

    Args:
        discriminator: a network of linear layers and convolutions, sums, activations and pooling that `torch.fx`
            can trace: no branch that depends on values of its input, no normalisation, no attention.
        input_shape: (channels, height, width) of one image.

    Returns:
        The bound; NaN or infinite if a weight is.

    Raises:
        ValueError: an operation without a known constant, which is named; or a network that `torch.fx` cannot trace.
    """
    like = next(discriminator.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    root = nn.Sequential(discriminator)  # since a root is always looked into, and it may be a layer
    with evaluating(discriminator):
        try:
            graph = _Tracer(weight_layers(root).values()).trace(root)
        except Exception as error:  # whatever the network's own code raises when it meets a proxy
            raise ValueError(f"discriminator cannot be traced by torch.fx: {error}") from error
        interpreter = _Bounding(root, graph)
        interpreter.run(image)
    return interpreter.bound_of_output


class _Tracer(fx.Tracer):
    """Reads layers with a weight as one operation, unless their class is the user's own and may do anything."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = frozenset(layers)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one operation."""
        if m in self.layers:
            return type_before_parametrizations(m).__module__.startswith(("torch.nn.", "retract.nets.layers"))
        return super().is_leaf_module(m, module_qualified_name)


class _Bounding(fx.Interpreter):
    """Runs the network on one image; next to each value, bounds its Lipschitz constant as a function of the image."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # messages say what is wrong, without the graph
        #: Of sizes, and of values that do not depend on the image, zero.
        self.bounds: dict[fx.Node, float] = {}
        self.bound_of_output = 0.0

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, then bound it."""
        result = super().run_node(n)
        incoming = sum(self._incoming(n))
        if n.op == "placeholder":
            self.bounds[n] = 1.0
        elif n.op == "output":
            self.bound_of_output = incoming
        elif not incoming or isinstance(result, int | torch.Size):
            self.bounds[n] = 0.0
        else:
            self.bounds[n] = incoming * self._constant(n, result)
        return result

    def _incoming(self, node: fx.Node) -> list[float]:
        """Bounds of all arguments: of one that is given twice, twice."""
        found: list[float] = []
        fx.map_arg((node.args, node.kwargs), lambda argument: found.append(self.bounds[argument]))
        return found

    def _constant(self, node: fx.Node, result: Tensor) -> float:
        """Of the operation by itself; of several tensors that it adds, that of each."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            name, options = type_before_parametrizations(module).__name__, vars(module)
            if module in weight_layers(module).values() and not isinstance(module, nn.Embedding):
                return _norm(module, args[0].shape[2:])
        else:
            name = node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
            options = _options(name, args[1:], kwargs)
        key = name.lower().strip("_")
        if key not in _CONSTANTS or (key in _SUMS and kwargs):
            known = ", ".join(sorted({"linear layers", "convolutions", *_CONSTANTS}))
            raise ValueError(f"discriminator has the operation {name}, of unknown Lipschitz constant; known: {known}")
        return _CONSTANTS[key](args, options, result)


# -------------------------------------------------------------------------------------- operations without a weight

Constant = Callable[[Sequence[Any], dict[str, Any], Tensor], float]

_SUMS = ("add", "iadd", "sub")
_WINDOW = ("kernel_size", "stride", "padding")
_MAX, _AVERAGE = (*_WINDOW, "dilation"), (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override")


def _options(name: str, given: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a function by the names that the module of the same operation has for them."""
    names = ("negative_slope",) if name.startswith("leaky") else _MAX if name.startswith("max") else _AVERAGE
    return dict(zip(names, given, strict=False)) | kwargs


def _leaky(args: Sequence[Any], options: dict[str, Any], result: Tensor) -> float:
    return max(1.0, abs(float(options.get("negative_slope", 0.01))))


def _reduction(power: float) -> Constant:
    """Of n values each: n^(1/2) for their sum, n^(-1/2) for their mean."""
    return lambda args, options, result: math.pow(args[0].numel() / result.numel(), power)


def _adaptive(args: Sequence[Any], options: dict[str, Any], result: Tensor) -> float:
    if any(before % after for before, after in zip(args[0].shape[2:], result.shape[2:], strict=True)):
        raise ValueError(
            f"discriminator pools maps of {tuple(args[0].shape[2:])} to {tuple(result.shape[2:])}, "
            "which must divide them to have a known Lipschitz constant"
        )
    return _reduction(-0.5)(args, options, result)


def _pooling(args: Sequence[Any], options: dict[str, Any], result: Tensor) -> float:
    """Square root of the number of windows that a position is in at most, since each window has constant one."""
    kernel, stride = _window(options, result.ndim - 2)
    return math.sqrt(math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True)))


def _average(args: Sequence[Any], options: dict[str, Any], result: Tensor) -> float:
    """The same, and a window of n positions has constant n^(-1/2), if none are missing at the border."""
    kernel, _ = _window(options, result.ndim - 2)
    cut = options.get("ceil_mode") or any(_tuple(options.get("padding", 0), result.ndim - 2))
    return _pooling(args, options, result) / (1.0 if cut else math.sqrt(math.prod(kernel)))


def _window(options: dict[str, Any], ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if set(_tuple(options.get("dilation", 1), ndim)) != {1} or options.get("divisor_override"):
        raise ValueError("discriminator has pooling with dilation or divisor_override, of unknown Lipschitz constant")
    kernel = _tuple(options["kernel_size"], ndim)
    stride = options.get("stride")
    return kernel, kernel if stride is None else _tuple(stride, ndim)


def _tuple(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


_NOT_EXPANSIVE = """identity flatten unflatten reshape view squeeze unsqueeze contiguous permute transpose
    relu relu6 tanh softplus sigmoid hardtanh dropout dropout2d"""

#: By the name of the function, method or class, in small letters. What is the same in all is so in evaluation mode.
_CONSTANTS: dict[str, Constant] = {
    **dict.fromkeys((*_NOT_EXPANSIVE.split(), *_SUMS), lambda args, options, result: 1.0),
    **dict.fromkeys(("leakyrelu", "leaky_relu"), _leaky),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "avgpool1d", "avgpool2d", "avgpool3d"), _average),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "maxpool1d", "maxpool2d", "maxpool3d"), _pooling),
    **dict.fromkeys(("adaptive_avg_pool2d", "adaptiveavgpool2d"), _adaptive),
    "sum": _reduction(0.5),
    "mean": _reduction(-0.5),
}


# -------------------------------------------------------------------------------------------- layers with a weight


def _norm(layer: Any, sizes: Sequence[int]) -> float:
    """Norm of a linear layer, or a bound of that of a convolution of inputs of these sizes."""
    weight = _kernel(layer)
    if not bool(torch.isfinite(weight).all()):
        return math.nan
    if weight.ndim == 2:
        return float(torch.linalg.matrix_norm(weight, 2))
    if layer.padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"discriminator has a convolution with padding_mode={layer.padding_mode!r}, of unknown Lipschitz "
            "constant; known: 'zeros', 'circular'"
        )
    # A circle whose length the stride does not divide has no phases.
    separable = layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    groups = (_phases(group, layer.stride) if separable else group for group in weight.chunk(layer.groups))
    bound = max(float(conv_norm_bound(group)) for group in groups)
    if layer.padding_mode == "zeros":
        return bound
    around = [1 + -(-max(0, more) // n) for more, n in zip(circular_excess(layer), sizes, strict=True)]
    return bound * math.sqrt(math.prod(around))  # as often as an output may be repeated


def _kernel(layer: Any) -> Tensor:
    """A weight with the norm of the layer's: of a spectral weight U diag(s) Vᵀ that is diag(s) Vᵀ, a smaller one."""
    found = spectral_weight(layer, "weight")
    if found is None or len(layer.parametrizations["weight"]) > 1:
        (weight,) = widened((layer.weight,))
        return weight
    parametrization, originals = found
    _, s, v = parametrization.factors(*originals)
    kernel = parametrization.layout.kernel(v * s)
    return kernel.transpose(0, 1) if parametrization.layout.transposed else kernel


def _phases(kernel: Tensor, stride: Sequence[int]) -> Tensor:
    """The kernel of stride 1 that does the same to the phases of an image, x[s n + p] for each p < s.

    (out, in, k...) becomes (out, in s..., k / s...), rounded up.
    """
    missing = [-k % s for k, s in zip(kernel.shape[2:], stride, strict=True)]
    kernel = F.pad(kernel, [side for count in reversed(missing) for side in (0, count)])
    for dim, s in enumerate(stride, start=2):
        kernel = kernel.unflatten(dim, (-1, s)).movedim(dim + 1, 2).flatten(1, 2)
    return kernel
