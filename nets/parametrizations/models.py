"""Layers of a whole model: parameter groups for Riemannian optimizers, and frames of spectral layers made together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from retract.manifolds.oblique import Oblique

from ._base import SpectralParametrization, spectral_weight, widened
from ._charts import evaluate
from .canonical import Canonical, canonical_weight

__all__ = ["canonical_weights", "manifold_groups", "shared_frames", "spectral_weights"]


def spectral_weights(model: nn.Module) -> Iterator[tuple[str, SpectralParametrization, tuple[Tensor, ...]]]:
    """Every weight of a model made by `SVDP` or `STTP`: its name, the parametrization and the tensors it stores.

    Names are those of the weights, ``"conv1.weight"``; the stored tensors are in the order of the
    parametrization's methods.
    """
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                found = spectral_weight(module, name)
                if found is not None:
                    yield (f"{prefix}.{name}" if prefix else name), *found


def canonical_weights(model: nn.Module) -> Iterator[tuple[str, Canonical, tuple[Tensor, ...]]]:
    """Every weight of a model made by `Canonical`: its name, the parametrization and the tensors it stores."""
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                found = canonical_weight(module, name)
                if found is not None:
                    yield (f"{prefix}.{name}" if prefix else name), *found


def manifold_groups(model: nn.Module, euclidean_lr: float | None = None) -> list[dict[str, Any]]:
    """Param groups for the optimizers of `retract.optim`, from how the weights of a model are parametrized.

    There is one group for each spectral layer in Stiefel form: its parameters are the factors of one point, in order,
    and its manifold is the layer's. All factors of canonical layers in oblique form are in one group, each a
    point of `Oblique`. All other parameters of the model, Householder coordinates and the weights of canonical terms
    among them, are in a last group, with learning rate ``euclidean_lr`` if that is given. Parameters come as
    pairs (name, parameter).
    """
    points: dict[int, int] = {}
    groups: list[dict[str, Any]] = []
    for _, parametrization, originals in spectral_weights(model):
        if parametrization.form == "stiefel":
            points.update((id(p), len(groups)) for p in originals)
            groups.append({"params": [], "manifold": parametrization.manifold})
    factors = [
        id(p) for _, canonical, (_, *rows) in canonical_weights(model) if canonical.form == "oblique" for p in rows
    ]
    if factors:
        points.update(dict.fromkeys(factors, len(groups)))
        groups.append({"params": [], "manifold": Oblique(0)})
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        index = points.get(id(parameter))
        (rest if index is None else groups[index]["params"]).append((name, parameter))
    if rest:
        groups.append({"params": rest} if euclidean_lr is None else {"params": rest, "lr": euclidean_lr})
    return groups


@contextmanager
def shared_frames(model: nn.Module) -> Iterator[None]:
    """Within the block all spectral layers of a model use factors computed once, on entry.

    Frames of equal shape, in whichever layers, are made in one batch. Enter it for each forward pass, with its one
    backward pass inside or after: the graph is shared too. A change of the parameters within the block has
    no effect on the layers before its end::

        with shared_frames(model):
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    """
    weights = [(p, widened(originals)) for _, p, originals in spectral_weights(model)]
    frames = evaluate(
        [chart for p, _ in weights for chart in p.charts],
        [flat for p, originals in weights for flat in p.coordinates(originals)],
    )
    remaining = iter(frames)
    try:
        for p, originals in weights:
            p.shared = p.assemble(originals, [next(remaining) for _ in p.charts])
        yield
    finally:
        for p, _ in weights:
            p.shared = None
