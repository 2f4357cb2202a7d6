"""Which weights of a network are scale-invariant: measured, since graph order does not settle it.

A weight is positively scale-invariant per filter, per block of filters or as a whole when rescaling each such
scale group by its own positive factor leaves the outputs as they are (Yi, UAI 2022, the PSI property). Then
the gradient of every function of the outputs is orthogonal to the weight within each scale group (Euler),
which one backward pass shows for all parameters at once; a rescaling by random powers of two then confirms
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import geoopt
import torch
from torch import Tensor, nn

from retract.manifolds import PSI

from ._candidates import Candidate, Layout, Moments, candidates, layouts
from ._canonical import CANONICAL_NORM, canonicalize
from ._groups import check_nonzero, check_plain, named_groups, put_on_manifolds
from ._probe import Probe

__all__ = ["Invariance", "find_scale_invariant", "register_scale_invariant", "scale_invariant_groups"]

Kind = Literal["filter", "group", "whole", "bias", "none"]

_ROUNDS = 2
# Cosines of invariant weights are rounding, below 1e-12; those of others are above 1e-3.
_COSINE = 1e-8
# Gradient times norm, against the strongest parameter's: below it the gradient is rounding.
_SIGNAL = 1e-11
# Filters far weaker than the strongest of their weight are judged on its scale, not on their own rounding.
_WEAK = 1e-6
_OUTPUT = 1e-9
_GRANULARITY = {"filter": "per filter", "group": "per group", "whole": "as a whole"}


@dataclass(frozen=True)
class Invariance:
    """What rescaling does to one parameter.

    Attributes:
        kind: the finest rescaling that leaves the outputs as they are: of each ``"filter"``, of each
            ``"group"`` of filters, of the ``"whole"`` weight, of weight and ``"bias"`` jointly; or
            ``"none"``.
        manifold: where the parameter lives, for the first three kinds.
        partner: the name of the bias, for kind ``"bias"``.
        residual: largest |cos| between the scale groups of the weight and of its gradient, for ``"none"`` at
            the finest rescaling. NaN where there was no gradient.
        reason: at which granularity it is ``"bias"``, or why it is ``"none"`` if not simply because rescaling
            changes the outputs.
    """

    kind: Kind
    manifold: PSI | None = None
    partner: str | None = None
    residual: float = float("nan")
    reason: str = ""


def find_scale_invariant(model: nn.Module, *example_input: Any) -> dict[str, Invariance]:
    """Measure the scale invariance of every parameter.

    The measurement runs on float64 copies in training mode, at generic parameter values near the model's
    own, with tiny epsilons. ``model``, its buffers, gradients, flags and the random state stay as they are.
    A model in training mode keeps the flags of its modules, so a BatchNorm frozen by ``.eval()`` counts as
    frozen; a model in eval mode is measured as if ``.train()`` had been called.

    Args:
        model: any network whose outputs are tensors, or mappings, sequences or dataclasses of them.
        example_input: positional arguments of one forward pass: a small batch of data or noise, not
            constant.

    Returns:
        One `Invariance` per name of ``model.named_parameters()``: shared parameters once, invariant only if
        every use of them is.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model cannot be copied, does not run in float64, or the input cannot show anything.
    """
    probe = Probe(model, example_input)
    layout = layouts(probe.model)
    evidence = {name: _Evidence(p.shape, layout[name]) for name, p in probe.parameters.items()}
    for seed in range(1, _ROUNDS + 1):
        probe.randomize(seed)
        gradients = probe.gradients(seed)
        strongest = max((_strength(probe.parameters[name], g) for name, g in gradients.items()), default=0.0)
        for name in gradients:
            evidence[name].add(probe.parameters, name, gradients, floor=_SIGNAL * strongest)
    claims = {name: found for name, e in evidence.items() if (found := e.claim()) is not None}
    held = _confirmed(probe, claims)
    return {name: e.verdict(name in held) for name, e in evidence.items()}


def scale_invariant_groups(
    model: nn.Module,
    *example_input: Any,
    canonical: bool = False,
    norm: float = CANONICAL_NORM,
    euclidean_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for the PSI optimizers: one per manifold, then one for all other parameters.

    Args:
        model: the network to train.
        example_input: see `find_scale_invariant`.
        canonical: bring every scale group to the norm ``norm`` first, in place, and carry that through the
            running statistics so that eval outputs stay. ``False`` leaves the weights, of a pretrained
            network say, alone. A BatchNorm that never ran holds placeholders (0, 1), which are carried like
            any statistics; ``reset_running_stats()`` on it, afterwards, makes rescaled twins equal in eval
            mode too.
        norm: that norm (see `retract.nets.CANONICAL_NORM` for the choice).
        euclidean_lr: learning rate of the last group, the optimizer's own if ``None``.

    Returns:
        Dictionaries with ``"params"``, a list of ``(name, parameter)``, and ``"manifold"`` except in the
        last. A parameter that is a `geoopt.ManifoldParameter` already keeps its manifold and is in the last
        group unless that manifold is the measured one.

    Raises:
        TypeError, ValueError: as `find_scale_invariant`; a filter of an invariant weight is zero; ``norm`` is
            not positive; the eval outputs cannot be kept.
    """
    manifolds = _measured_manifolds(model, example_input)
    if canonical:
        canonicalize(model, example_input, manifolds, norm)
    return named_groups(model, manifolds, euclidean_lr)


def register_scale_invariant(
    model: nn.Module, *example_input: Any, canonical: bool = False, norm: float = CANONICAL_NORM
) -> nn.Module:
    """Make every scale-invariant parameter a `geoopt.ManifoldParameter` on its `PSI`, in place.

    The parameters keep their identity: shared weights stay shared, and an optimizer made before holds the
    same objects; but it may have looked for manifolds already, so make optimizers after. Of a parametrized
    weight the tensor behind it is registered, ``parametrizations.weight.original1`` of a weight-normalised
    layer for example.

    Args and errors are those of `scale_invariant_groups`, and a TypeError for a parameter of another class
    than `torch.nn.Parameter`. Returns ``model``.
    """
    manifolds = _measured_manifolds(model, example_input)
    parameters = dict(model.named_parameters())
    new = {n: m for n, m in manifolds.items() if not isinstance(parameters[n], geoopt.ManifoldParameter)}
    check_plain(model, new)
    if canonical:
        canonicalize(model, example_input, manifolds, norm)
    put_on_manifolds(model, new)
    return model


def _measured_manifolds(model: nn.Module, example_input: tuple[Any, ...]) -> dict[str, PSI]:
    found = find_scale_invariant(model, *example_input)
    parameters = dict(model.named_parameters())
    manifolds: dict[str, PSI] = {}
    for name, invariance in found.items():
        present = getattr(parameters[name], "manifold", None)
        if invariance.manifold is not None and (present is None or str(present) == str(invariance.manifold)):
            manifolds[name] = invariance.manifold
    check_nonzero(model, manifolds)
    return manifolds


class _Evidence:
    """Cosines of one parameter, per candidate rescaling, over the rounds in which a gradient reached it."""

    def __init__(self, shape: torch.Size, layout: Layout) -> None:
        self._candidates = candidates(shape, layout)
        self._residuals: dict[Candidate, float] = {}
        self._reached = False

    def add(self, parameters: Mapping[str, Tensor], name: str, gradients: Mapping[str, Tensor], floor: float) -> None:
        self._reached = True
        weight, gradient = parameters[name].detach(), gradients[name]
        if _strength(weight, gradient) <= floor:
            return
        by_filter = {f: Moments.of(f, weight, gradient) for f in {c.filters for c in self._candidates}}
        for candidate in self._candidates:
            moments = by_filter[candidate.filters].blocks(candidate.scales)
            if candidate.partner is not None:
                bias, bias_gradient = parameters[candidate.partner].detach(), gradients.get(candidate.partner)
                if bias_gradient is None or bias.numel() % candidate.scales:
                    continue
                moments = moments.joined(Moments.of(PSI(), bias, bias_gradient).blocks(candidate.scales))
            self._residuals[candidate] = max(_residual(moments), self._residuals.get(candidate, 0.0))

    def claim(self) -> Candidate | None:
        """The first, finest candidate that every round bears out."""
        return next((c for c in self._candidates if self._residuals.get(c, 1.0) < _COSINE), None)

    def verdict(self, confirmed: bool) -> Invariance:
        claim = self.claim()
        if claim is None:
            worst = next(iter(self._residuals.values()), float("nan"))
            return Invariance("none", residual=worst, reason=self._why_none())
        residual = self._residuals[claim]
        if not confirmed:
            return Invariance("none", residual=residual, reason="the gradient is orthogonal, yet rescaling is seen")
        if claim.partner is not None:
            return Invariance("bias", partner=claim.partner, residual=residual, reason=_GRANULARITY[claim.kind])
        return Invariance(claim.kind, claim.manifold, residual=residual)

    def _why_none(self) -> str:
        if not self._reached:
            return "takes no part in the forward pass"
        if not self._residuals:
            return "its gradient is zero: nothing to train, or dead on this input"
        return ""


def _strength(weight: Tensor, gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach()) * torch.linalg.vector_norm(gradient))


def _residual(moments: Moments) -> float:
    size = (moments.weight * moments.gradient).sqrt()
    return float((moments.inner.abs() / size.clamp(min=float(_WEAK * size.max()))).max())


def _confirmed(probe: Probe, claims: Mapping[str, Candidate]) -> set[str]:
    """Names of the claims that a rescaling by random powers of two bears out, found by bisection."""
    reference = probe.outputs()

    def unchanged(names: list[str]) -> bool:
        with torch.no_grad():
            inverses = [_rescale(probe.parameters, n, claims[n], seed) for seed, n in enumerate(names)]
            outputs = probe.outputs()
            for name, inverse in zip(names, inverses, strict=True):
                claims[name].rescale_(probe.parameters, name, inverse)
        return all(_close(a, b) for a, b in zip(outputs, reference, strict=True))

    def search(names: list[str]) -> Iterator[str]:
        if not names or unchanged(names):
            yield from names
        elif len(names) > 1:
            yield from search(names[: len(names) // 2])
            yield from search(names[len(names) // 2 :])

    return set(search(list(claims)))


def _rescale(parameters: Mapping[str, Tensor], name: str, claim: Candidate, seed: int) -> Tensor:
    """Rescale by powers of two between 1/16 and 16, never 1, and return the inverse: both are exact."""
    weight = parameters[name]
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(1, 5, (claim.scales,), generator=generator)
    sign = 2 * torch.randint(0, 2, exponent.shape, generator=generator) - 1
    scales = torch.pow(2.0, exponent * sign).to(weight)
    claim.rescale_(parameters, name, scales)
    return 1 / scales


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= _OUTPUT * float(b.abs().max())
