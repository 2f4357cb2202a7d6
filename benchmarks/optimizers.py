"""The optimizers that the benchmarks compare, by name, each built for a model in the way that it is meant to
be used.

The learning rate of a Euclidean method multiplies a gradient. On scale-invariant weights it is an angle: in
radians per unit of gradient at unit norm (psisgd, psigd, geoopt-sphere) or of normalised gradient (psiadam),
or radians (psiangular).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from retract.nets.layers.tensor import TensorConv1d, TensorConv2d, TensorConv3d, TensorLinear
from retract.nets.parametrizations.models import canonical_weights, manifold_groups, spectral_weights

__all__ = ["OPTIMIZERS", "Choice", "build"]

Groups = list[dict[str, Any]]

PEERS = "retract.benchmarks.peer_optimizers"
TENSOR_LAYERS = (TensorConv1d, TensorConv2d, TensorConv3d, TensorLinear)


@dataclass(frozen=True)
class Choice:
    """An optimizer to choose: the module and name of its class, what it is, its default learning rate, and
    ``arguments(momentum, weight_decay)``, the keywords by which it takes what all have in common.

    ``manifold`` says what its scale-invariant weights are to it: "psi" (their group carries the manifold),
    "any" (the same, and it moves points of every other manifold too), "sphere" (each filter is a unit vector),
    "matrix" (weights that it steps otherwise than all others, on no manifold), or None (weights like all others).
    """

    module: str
    name: str
    summary: str
    lr: float
    arguments: Callable[[float, float], dict[str, Any]]
    manifold: str | None = None


def _sgd_like(momentum: float, weight_decay: float) -> dict[str, Any]:
    return {"momentum": momentum, "weight_decay": weight_decay}


def _adam_like(momentum: float, weight_decay: float) -> dict[str, Any]:
    return {"betas": (momentum, 0.999), "weight_decay": weight_decay}


def _nesterov(momentum: float, weight_decay: float) -> dict[str, Any]:
    return {**_sgd_like(momentum, weight_decay), "nesterov": True}


def _plain(momentum: float, weight_decay: float) -> dict[str, Any]:
    if weight_decay:
        raise ValueError(f"psigd and riemannian-gd have no weight decay, got {weight_decay}")
    return {}


def _filter_adam(momentum: float, weight_decay: float) -> dict[str, Any]:
    return {"betas": (momentum, 0.99), "weight_decay": weight_decay}


OPTIMIZERS: dict[str, Choice] = {
    "sgd": Choice("torch.optim", "SGD", "SGD with momentum", 0.1, _sgd_like),
    "nesterov": Choice("torch.optim", "SGD", "SGD with Nesterov momentum", 0.1, _nesterov),
    "adamw": Choice("torch.optim", "AdamW", "Adam with decoupled decay", 1e-3, _adam_like),
    "adam": Choice("torch.optim", "Adam", "Adam", 1e-3, _adam_like),
    "muon": Choice(PEERS, "MuonAdamW", "orthogonalised momentum; AdamW for the rest", 0.02, _sgd_like, "matrix"),
    "sgdp": Choice("adamp", "SGDP", "SGD without radial steps", 0.1, _sgd_like),
    "adamp": Choice("adamp", "AdamP", "AdamW without radial steps", 1e-3, _adam_like),
    "geoopt-sphere": Choice("geoopt.optim", "RiemannianSGD", "geoopt, filters of unit norm", 0.1, _sgd_like, "sphere"),
    "geoopt-sphere-adam": Choice(
        PEERS, "RiemannianAdam", "geoopt's Adam, filters of unit norm", 1e-2, _adam_like, "sphere"
    ),
    "unit-norm": Choice(PEERS, "UnitNormSGD", "SGD, filters put back to unit norm", 0.1, _sgd_like, "psi"),
    "sgd-g": Choice(PEERS, "SGDG", "SGD on great circles, gradients clipped", 0.2, _sgd_like, "psi"),
    "psisgd": Choice("retract.optim", "PSISGD", "SGD on PSI weights", 0.1, _sgd_like, "psi"),
    "psigd": Choice("retract.optim", "PSIGD", "the same without momentum", 1.0, _plain, "psi"),
    "psiangular": Choice(
        "retract.optim", "PSIAngular", "each filter turns by the learning rate", 0.015, _sgd_like, "psi"
    ),
    "psiadam": Choice("retract.optim", "PSIAdam", "one second moment per filter", 0.1, _filter_adam, "psi"),
    "riemannian-sgd": Choice("retract.optim", "RiemannianSGD", "SGD on any manifold", 0.1, _sgd_like, "any"),
    "riemannian-gd": Choice("retract.optim", "RiemannianGD", "the same without momentum", 1.0, _plain, "any"),
}


def build(
    name: str,
    model: nn.Module,
    example_input: Tensor | None = None,
    *,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    euclidean_lr: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` for the parameters of ``model``.

    "geoopt-sphere" changes the model: its scale-invariant filters become unit vectors, and
    `geoopt.ManifoldParameter`s.

    Args:
        name: a key of :data:`OPTIMIZERS`.
        model: its ``manifold_groups()`` says which weights are scale-invariant; without it they are measured.
        example_input: a batch of two or more to measure with; needless for a model with
            ``manifold_groups()`` or with factored layers.
        lr: learning rate; None for the optimizer's own default.
        momentum: of the methods that have one; the first beta of the Adam family.
        weight_decay: of all weights, for a Euclidean method and for muon. A method on a manifold gets it for the other
            weights alone, since on the manifold decay changes nothing. Householder coordinates get it like other
            weights: it keeps their reflectors short, and with them the chart well conditioned.
        euclidean_lr: learning rate of the weights that are not scale-invariant; in a model with spectral, canonical
            or tensor layers, of all but these layers' weights. None for the optimizer's own default (0.3 for psiangular
            and psiadam), or else ``lr``.

    Raises:
        ValueError: an unknown name, a number out of range, or no weight for a method on a manifold.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    choice = OPTIMIZERS[name]
    lr = choice.lr if lr is None else lr
    given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "euclidean_lr": euclidean_lr}
    for argument, value in given.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{argument} must be finite and at least 0, got {value}")

    tuned: Groups = []
    others: Groups = [{"params": list(model.parameters())}]
    if factored := _factored_weights(model):
        tuned, others = _factored(name, model, factored)
    elif choice.manifold is not None or euclidean_lr is not None:
        tuned, others = _scale_invariant(name, model, example_input)
    if euclidean_lr is not None:
        for group in others:
            group["lr"] = euclidean_lr
    if choice.manifold not in (None, "matrix") and weight_decay:
        for group in tuned:
            group["weight_decay"] = 0.0
    if choice.manifold == "sphere":
        _put_on_spheres(tuned)
    groups = tuned + others
    if choice.manifold in (None, "sphere"):
        groups = [_euclidean(group) for group in groups]
    optimizer_class = getattr(import_module(choice.module), choice.name)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, lr=lr, **choice.arguments(momentum, weight_decay))
    return optimizer


def _scale_invariant(name: str, model: nn.Module, example_input: Tensor | None) -> tuple[Groups, Groups]:
    """(groups of scale-invariant weights, with their manifolds; the group of all others)."""
    if hasattr(model, "manifold_groups"):
        zoo_model: Any = model
        groups: Groups = list(zoo_model.manifold_groups())
    elif example_input is None:
        raise ValueError(f"example_input is needed: {type(model).__name__} has no manifold_groups()")
    else:
        from retract.nets import scale_invariant_groups

        groups = scale_invariant_groups(model, example_input)
    invariant = [group for group in groups if "manifold" in group]
    if OPTIMIZERS[name].manifold is not None and not invariant:
        raise ValueError(f"{name} needs scale-invariant weights, and {type(model).__name__} has none")
    return invariant, [group for group in groups if "manifold" not in group]


def _factored_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters in which spectral, canonical and tensor layers store their weights."""
    stored = [weights for _, _, weights in (*spectral_weights(model), *canonical_weights(model))]
    stored += [tuple(module.cores) for module in model.modules() if isinstance(module, TENSOR_LAYERS)]
    return {id(weight) for weights in stored for weight in weights}


def _factored(name: str, model: nn.Module, factored: set[int]) -> tuple[Groups, Groups]:
    """(groups of the weights of factored layers, with manifolds where they have one; the group of all others)."""
    moves = OPTIMIZERS[name].manifold
    if moves in ("psi", "sphere", "matrix"):
        raise ValueError(
            f"{name} turns scale-invariant filters, and factored layers have none: use sgd or riemannian-sgd"
        )
    points = [group for group in manifold_groups(model) if "manifold" in group]
    if points and moves is None:
        raise ValueError(
            f"{name} would leave the manifold of the layers: use riemannian-sgd, or the householder or euclidean form"
        )
    if not points and moves is not None:
        raise ValueError(
            f"{name} needs weights on a manifold, and these layers have none: use sgd, or the stiefel or oblique form"
        )
    on_manifolds = {id(weight) for group in points for _, weight in group["params"]}
    free = [entry for entry in model.named_parameters() if id(entry[1]) not in on_manifolds]
    own = [entry for entry in free if id(entry[1]) in factored]
    others = [entry for entry in free if id(entry[1]) not in factored]
    return points + _group(own), _group(others)


def _group(entries: list[tuple[str, nn.Parameter]]) -> Groups:
    return [{"params": entries}] if entries else []


def _tensors(group: dict[str, Any]) -> list[Tensor]:
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]


def _euclidean(group: dict[str, Any]) -> dict[str, Any]:
    """The group as every optimizer takes it: tensors without names, no manifold."""
    options = {key: value for key, value in group.items() if key not in ("params", "manifold")}
    return {"params": _tensors(group), **options}


@torch.no_grad()
def _put_on_spheres(groups: Groups) -> None:
    """Turn PSI weights into manifold parameters on products of unit spheres, one per filter."""
    import geoopt

    from retract.manifolds import PSI, Oblique

    for group in groups:
        if str(group["manifold"]) != str(PSI()):
            raise ValueError(
                f"geoopt-sphere knows one scale per filter, and this model has weights on {group['manifold']}"
            )
        sphere = Oblique(dim=0)
        for weight in _tensors(group):
            weight.copy_(sphere.projx(weight))
            # The parameter stays the object that the model holds, and becomes one that geoopt knows.
            parameter: Any = weight
            parameter.__class__, parameter.manifold = geoopt.ManifoldParameter, sphere
