"""Low-rank layers fitted, one after another, to the activations that they really get.

A layer of low rank that is near the dense one in weight, or in function for white inputs, need not be near it on the
activations of a network, which are far from white; and its error changes what the next layers read. Here each layer is
fitted to the dense network's own output at its place, on what the layers that were fitted before it make of the data:
later layers undo errors of earlier ones as far as they can. The fit is a reduced-rank regression in the metric of the
inputs' covariance, and before a ReLU an iteration that counts the error after it
(`retract.nets.init._calibration_fit`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retract.nets._following import Following, following
from retract.nets.layers.low_rank import LowRankLayer

from ._calibration_checks import check_options, matching_layers
from ._calibration_fit import Fit, Sample, fits
from ._calibration_passes import Batch, Network, kept_batches, normalizations, restored_on_error
from ._calibration_regression import Factors
from ._calibration_report import CalibratedLayer, Calibration
from ._calibration_rows import input_rows, output_rows, positions
from .low_rank import _balanced, _singular_basis

__all__ = ["CalibratedLayer", "Calibration", "calibrate"]

#: Every so many-th row is held out.
_HELD_OUT = 5


@torch.inference_mode(False)
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module,
    bias: bool = True,
    iterations: int = 20,
    rows: int = 16384,
    ridge: float = 0.01,
) -> Calibration:
    """Fit the low-rank layers of a model, in place, to what the dense layers of another do on some data.

    Layers are taken in the order of their calls. Each is fitted to the output that the reference has at its place,
    after what follows it there, and reads what the model gives it with the layers before it fitted:

    - a ReLU or leaky ReLU, as a module or a function: the error after it counts;
    - batch normalization: outputs are weighed by its gain and its statistics in the reference. The layer needs no bias
      then, and is given none. The model's batch normalizations that are called after a fitted layer get new running
      statistics, means of those of the batches, and keep their parameters;
    - both, in this order;
    - anything else, also if more than one thing reads the output, such as both the sum and the next layer of a
      residual block: the output itself counts.

    The fit is a reduced-rank regression, a local optimum by alternating least squares where kernel axes belong to the
    rows of the layer's matrix, and then steps for the rectifier. A fifth of the rows is held out, and of all these fits
    and the factors that the layer had the one with the least error there is taken.

    Both models run in evaluation mode, which is then put back: the reference once for each batch, the model once for
    each layer and batch, no further than the layer. Of a layer that a pass calls several times the first call is
    fitted. If the normalizations of the reference have seen no data yet, a copy with statistics of the batches takes
    its place. If an error is raised, the model is as it was. Positions are drawn with a fixed seed; torch's random
    state is not touched.

    Args:
        model: with low-rank layers, such as a copy of ``reference`` with layers exchanged. Layers in half precision are
            fitted in float64 on the activations that the model has.
        batches: any iterable, passed once; the inputs are kept. A batch is an input tensor, or a tuple or list whose
            first entry is the input, as a `DataLoader` gives; an input that is a tuple or list holds the positional
            arguments. They are moved to the device and, floating-point, to the dtype of a model's first parameter.
        reference: the dense model, whose layers have the same names; it is left as it is.
        bias: fit the biases, too, of layers that have one. No layer is given one.
        iterations: most steps for a rectifier after a layer; 0 for linear regression alone.
        rows: most output positions of a layer that are used, spread over the batches. A layer should have several times
            as many as it has inputs.
        ridge: variance, as a share of the mean one of a layer's inputs, of white inputs that count as if the dense
            weight were wanted for them: it decides in directions that the data does not show.

    Returns:
        A `Calibration`: ``layers`` has a row for each layer with its error and output energy before and after, and its
        string is a table.

    Raises:
        TypeError: a model, batch or option of another type.
        ValueError: a model without low-rank layers, or with one that no pass calls; a reference that shares modules
            with the model, has no layer of a name, or one of another shape or geometry; no batches; NaN or infinite
            entries in a batch, or in what the models make of it; an option out of range.
    """
    check_options(iterations, rows, ridge)
    layers = matching_layers(model, reference)
    kept = kept_batches(batches)
    norms = normalizations(model)
    changed: list[Tensor] = [tensor for layer, _ in layers.values() for tensor in layer.parameters()]
    changed += [buffer for norm in norms.values() for buffer in norm.buffers()]
    with restored_on_error(changed), Network(model) as network, _ready(reference, kept) as target:
        dense = {name: target.model.get_submodule(name) for name in layers}
        after = following(dense, lambda: target(kept[0]))
        low = {name: layer for name, (layer, _) in layers.items()}
        order = network.call_order({**low, **norms}, kept[0])
        missed = [name for name in layers if name not in order or name not in after]
        if missed:
            raise ValueError(f"batches: the first batch does not reach the layers {', '.join(missed)}")
        wanted = _wanted(low, dense, target, kept, rows)
        report: list[CalibratedLayer] = []
        stale: list[_BatchNorm] = []
        for name in order:
            if name in norms:
                if report or norms[name].num_batches_tracked == 0:
                    stale.append(norms[name])
                continue
            with network.estimating(stale):
                samples = _samples(name, low[name], network, wanted.pop(name), kept)
            stale = []
            weight = dense[name].get_parameter("weight").detach()
            figures = _calibrated(low[name], weight, samples, after[name], bias, ridge, iterations)
            report.append(CalibratedLayer(name, low[name].rank, str(after[name]), *figures))
        with network.estimating(stale):
            for batch in kept if stale else ():
                network(batch)
    return Calibration(tuple(report))


class _Wanted(NamedTuple):
    """The dense layer's output for one batch, at some positions."""

    #: Of the whole output.
    shape: torch.Size
    #: (rows,) numbers of positions.
    chosen: Tensor
    #: (groups, rows, out / groups).
    outputs: Tensor


def _ready(reference: nn.Module, batches: Sequence[Batch]) -> Network:
    """The reference for passes: a copy with statistics of the batches, if its normalizations have seen none."""
    if all(norm.num_batches_tracked != 0 for norm in normalizations(reference).values()):
        return Network(reference)
    private = Network(copy.deepcopy(reference))
    fresh = [norm for norm in normalizations(private.model).values() if norm.num_batches_tracked == 0]
    with private, private.estimating(fresh):
        for batch in batches:
            private(batch)
    return private


def _wanted(
    layers: Mapping[str, LowRankLayer],
    dense: Mapping[str, nn.Module],
    target: Network,
    batches: Sequence[Batch],
    rows: int,
) -> dict[str, list[_Wanted]]:
    """Outputs of the dense layers at random positions, by one pass for each batch."""
    ends = list(accumulate(max(_length(batch), 1) for batch in batches))
    shares = [rows * end // ends[-1] for end in [0, *ends]]
    found: dict[str, list[_Wanted]] = {name: [] for name in layers}
    for index, batch in enumerate(batches):
        share = shares[index + 1] - shares[index]

        def visit(name: str, output: Tensor, index: int = index, share: int = share) -> None:
            there = positions(layers[name], output.shape)
            # For layers of equal sizes the same positions, whatever other layers there are.
            drawn = torch.randperm(there, generator=torch.Generator().manual_seed(index))
            chosen = drawn[:share].to(output.device)
            found[name].append(_Wanted(output.shape, chosen, output_rows(layers[name], output, chosen)))

        target.visit_outputs(dense, batch, visit)
        for name, parts in found.items():
            if len(parts) <= index:
                raise ValueError(f"batches: batch {index} does not reach layer {name!r}")
            _check_size(parts[index].outputs, f"batch {index} makes the output of layer {name!r}")
    return found


def _samples(
    name: str, layer: LowRankLayer, network: Network, wanted: Sequence[_Wanted], batches: Sequence[Batch]
) -> tuple[Sample, Sample]:
    """What the layer reads where outputs are wanted, with these: rows to fit it on, and rows held out."""
    parts = []
    for index, (batch, (shape, chosen, outputs)) in enumerate(zip(batches, wanted, strict=True)):
        input = network.input_of(layer, batch)
        inputs = input_rows(layer, input, shape, chosen.to(input.device))
        _check_size(inputs, f"batch {index} makes the input of layer {name!r}")
        parts.append((inputs, outputs.to(input.device)))
    last = [torch.arange(inputs.shape[1]) % _HELD_OUT == _HELD_OUT - 1 for inputs, _ in parts]
    fitted, held = _joined(parts, [~held for held in last]), _joined(parts, last)
    return fitted, held if held.rows else fitted


def _check_size(values: Tensor, what: str) -> None:
    if not torch.linalg.vector_norm(values.double()).isfinite():
        raise ValueError(f"batches: {what} NaN, infinite or too large to square")


def _joined(parts: Sequence[tuple[Tensor, Tensor]], rows: Sequence[Tensor]) -> Sample:
    """Some rows of each part."""
    chosen = [(inputs[:, some], outputs[:, some].double()) for (inputs, outputs), some in zip(parts, rows, strict=True)]
    return Sample([inputs for inputs, _ in chosen], torch.cat([outputs for _, outputs in chosen], 1))


def _length(batch: Batch) -> int:
    return next((len(leaf) for leaf in batch if isinstance(leaf, Tensor) and leaf.ndim > 0), 1)


def _calibrated(
    layer: LowRankLayer,
    weight: Tensor,
    samples: tuple[Sample, Sample],
    after: Following,
    bias: bool,
    ridge: float,
    iterations: int,
) -> tuple[float, float, float, float, int, int]:
    """Fit one layer in place. Errors before and after, energies before and after, rows fitted and held out."""
    fitted, held = samples
    start = _fit_of(layer)
    gain, shift = after.affine(fitted.outputs)
    wanted = after.activation(gain * held.outputs + shift)
    energy = wanted.square().sum()

    def figures(fit: Fit) -> tuple[float, float]:
        values = after(held.map(fit))
        return float((wanted - values).square().sum() / energy), float(values.square().sum() / energy)

    groups, out, _ = start.factors.left.shape
    free = after.normalization is not None or (bias and layer.bias is not None)
    candidates = fits(
        fitted,
        layer.unfolding.matrix(weight).to(fitted.outputs).reshape(groups, out, start.factors.taps, -1),
        rank=layer.rank,
        following=after,
        offset=None if free else start.offset,
        ridge=ridge,
        iterations=iterations,
    )
    # Statistics of its own change what a normalization makes of a fit: the error with them decides.
    error_before, energy_before = figures(start)
    best = min(candidates, key=lambda fit: figures(fit)[0])
    if not error_before <= figures(best)[0]:
        _store(best, layer, bias)
    error, now = figures(_fit_of(layer))
    return error_before, error, energy_before, now, fitted.rows, held.rows


def _fit_of(layer: LowRankLayer) -> Fit:
    """The layer as it is, in float64."""
    groups, out = layer.unfolding.groups, layer.unfolding.row_shape[0]
    right = layer.right.detach().double().reshape(groups, layer.rank, -1)
    left = layer.left.detach().double().reshape(groups, out, -1)
    bias = left.new_zeros(groups * out) if layer.bias is None else layer.bias.detach().double()
    return Fit(Factors(left, right), bias.reshape(groups, 1, out))


def _store(fit: Fit, layer: LowRankLayer, bias: bool) -> None:
    """Balanced factors and the offset as the layer's parameters."""
    left, right = fit.factors.left.reshape(len(fit.offset), -1, layer.rank), fit.factors.right
    frame, triangle = torch.linalg.qr(right.mT)
    left, right = _balanced(*_singular_basis(left @ triangle.mT, frame.mT))
    layer.left.copy_(left.reshape(layer.left.shape))
    layer.right.copy_(right.reshape(layer.right.shape))
    if layer.bias is not None and bias:
        layer.bias.copy_(fit.offset.reshape(-1))
