"""The canonical representative: every scale group at one norm, eval outputs kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from retract.manifolds import PSI

from ._probe import Probe

__all__ = ["CANONICAL_NORM", "canonicalize"]

CANONICAL_NORM = 16.0
"""Norm of every scale group in the canonical representative.

BatchNorm's epsilon adds to the variance of what the filter puts out, about ``norm ** 2`` for standardised
inputs, so exact invariance is missed by about ``eps / norm ** 2``. Measured with eps = 1e-5, largest
|cos(w, grad)| over filters (DigitsNet on digits, ResNet-20 on noise): 1e-5 at norm 1, 7e-7 at 4, 5e-8 at
16, 2e-10 at 256; float32 rounding is 1e-6 there. A float64 PSI-SGD run on digits had directions 1e-3 from
the run without epsilon after 100 steps at norms up to 8, and 1.5e-8 at 16 (an epsilon this small no longer
flips a ReLU). Larger norms buy nothing in float32 and use up the range of float16: the largest input of a
BatchNorm was 170 at norm 16, 2700 at 256.
"""

_ROUNDS = 2


@torch.no_grad()
def canonicalize(
    model: nn.Module,
    example_input: tuple[Any, ...],
    manifolds: Mapping[str, PSI],
    norm: float = CANONICAL_NORM,
) -> None:
    r"""Bring every scale group of the named weights to norm ``norm``, in place, and keep the eval outputs.

    A channel that reaches a BatchNorm as :math:`z' = c z + d` instead of :math:`z` needs running statistics

    .. math:: \mu' = c \mu + d, \qquad \sigma'^2 + \epsilon = c^2 (\sigma^2 + \epsilon),

    the second with epsilon, so that outputs in eval mode stay exactly. ``c`` and ``d`` are measured per
    channel, by running the old and the new weights, so concatenation, pooling, groups and several consumers
    need no rules. Behind layers without running statistics (GroupNorm, LayerNorm) outputs stay up to their
    epsilon.

    Raises:
        ValueError: ``norm`` is not a positive number, ``example_input`` leaves a channel constant, or the
            eval outputs changed (a layer keeps statistics of its own kind). The model is then as it was.
    """
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < float("inf"):
        raise ValueError(f"norm must be a positive finite number, got {norm!r}")
    parameters = dict(model.named_parameters())
    factors = {name: norm / psi.norms(parameters[name].double()).flatten() for name, psi in manifolds.items()}
    maps = _channel_maps(model, example_input, manifolds, factors)
    before = _eval_outputs(model, example_input)
    with _undone_on_error(model):
        for name, psi in manifolds.items():
            parameters[name].copy_(psi.act(parameters[name].double(), factors[name]))
        for name, (c, d) in maps.items():
            _carry(model.get_submodule(name), c, d)
        change = _relative_change(before, _eval_outputs(model, example_input))
        if not change < _tolerance(model):
            raise ValueError(
                f"canonical=True would change the eval outputs on example_input by {change:.2g} of their "
                "size: a layer keeps running statistics that are not a torch BatchNorm's; use canonical=False"
            )


def _carry(layer: nn.Module, c: Tensor, d: Tensor) -> None:
    assert isinstance(layer, _NormBase)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, variance = layer.running_mean.double(), layer.running_var.double()
    layer.running_mean.copy_(c * mean + d)
    layer.running_var.copy_((c * c * (variance + layer.eps) - layer.eps).clamp(min=0))


def _channel_maps(
    model: nn.Module,
    example_input: tuple[Any, ...],
    manifolds: Mapping[str, PSI],
    factors: Mapping[str, Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer with running statistics the (c, d) of z' = c z + d, each of shape ``(channels,)``.

    ``c`` holds for any parameters and comes from generic ones, where hardly a channel is dead. ``d`` is the
    part of biases before the layer and comes from the model's own.
    """
    probe = Probe(model, example_input)
    generic = []
    for seed in range(1, _ROUNDS + 1):
        probe.randomize(seed, signs=True)
        generic.append(_before_and_after(probe, manifolds, factors, seed))
    probe.reset()
    own_old, own_new = _before_and_after(probe, manifolds, factors, seed=0)
    maps = {}
    for name in own_old:
        old = torch.stack([before[name][1] for before, _ in generic]).sum(0)
        new = torch.stack([after[name][1] for _, after in generic]).sum(0)
        dead = (old == 0).nonzero().flatten().tolist()
        if dead:
            raise ValueError(
                f"example_input leaves channels {dead[:8]} of {name} constant, so canonical=True cannot tell "
                "how to rescale their running statistics; give a larger example_input"
            )
        c = (new / old).sqrt()
        maps[name] = (c, own_new[name][0] - c * own_old[name][0])
    return maps


Statistics = dict[str, tuple[Tensor, Tensor]]


def _before_and_after(
    probe: Probe, manifolds: Mapping[str, PSI], factors: Mapping[str, Tensor], seed: int
) -> tuple[Statistics, Statistics]:
    before = _input_statistics(probe, seed)
    for name, psi in manifolds.items():
        probe.parameters[name].copy_(psi.act(probe.parameters[name], factors[name]))
    return before, _input_statistics(probe, seed)


def _input_statistics(probe: Probe, seed: int) -> Statistics:
    """Mean and variance per channel of what each layer with running statistics is given."""
    seen: Statistics = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            channels = args[0].detach().transpose(0, 1).flatten(1)
            seen[name] = (channels.mean(1), channels.var(1, correction=0))

        return layer.register_forward_pre_hook(hook)

    layers = [(n, m) for n, m in probe.model.named_modules() if isinstance(m, _NormBase)]
    handles = [watch(name, layer) for name, layer in layers if layer.running_mean is not None]
    try:
        probe.outputs(seed)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _eval_outputs(model: nn.Module, example_input: tuple[Any, ...]) -> list[Tensor]:
    """Outputs in eval mode, but for epsilons of layers without running statistics: nothing carries those."""
    probe = Probe(model, example_input)
    probe.model.eval()
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase) and layer.running_var is not None:
            probe.buffers[f"{name}.running_var"] += layer.eps
    return probe.outputs()


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    pairs = zip(before, after, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for b, a in pairs)


def _tolerance(model: nn.Module) -> float:
    """Rounding of the rescaled weights and statistics in their own type, with room for a deep network."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return 1e4 * max(torch.finfo(dtype).eps for dtype in types)


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    tensors = [*model.parameters(), *model.buffers()]
    saved = [t.detach().clone() for t in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        raise
