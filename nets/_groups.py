"""From manifolds by parameter name to what optimizers take: parameter groups, or manifold parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from retract.manifolds import PSI

__all__ = ["check_nonzero", "check_plain", "named_groups", "put_on_manifolds"]


def named_groups(model: nn.Module, manifolds: Mapping[str, PSI], euclidean_lr: float | None) -> list[dict[str, Any]]:
    """One group per distinct manifold, then one with every other parameter (``euclidean_lr`` is its rate).

    Each parameter of the model is in one group, as a pair ``(name, parameter)``.
    """
    groups: dict[str, dict[str, Any]] = {}
    rest: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        manifold = manifolds.get(name)
        if manifold is None:
            rest.append((name, parameter))
        else:
            group = groups.setdefault(str(manifold), {"params": [], "manifold": manifold})
            group["params"].append((name, parameter))
    if rest:
        groups[""] = {"params": rest} if euclidean_lr is None else {"params": rest, "lr": euclidean_lr}
    return list(groups.values())


def put_on_manifolds(model: nn.Module, manifolds: Mapping[str, PSI]) -> None:
    """Make the named parameters `geoopt.ManifoldParameter`, in place.

    The parameter object stays and changes its class, as torch does for lazy parameters; so shared weights
    stay shared, and an optimizer or a hook that holds the parameter holds the manifold parameter.
    """
    check_plain(model, manifolds)
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, manifold in manifolds.items():
        parameters[name].__class__ = geoopt.ManifoldParameter
        parameters[name].manifold = manifold


def check_plain(model: nn.Module, manifolds: Mapping[str, PSI]) -> None:
    """Refuse parameters whose class has a meaning of its own."""
    parameters = dict(model.named_parameters())
    for name in manifolds:
        if type(parameters[name]) is not nn.Parameter:
            raise TypeError(
                f"parameter {name} is a {type(parameters[name]).__name__}; only a plain torch.nn.Parameter "
                "can be put on a manifold in place: use the groups of scale_invariant_groups instead"
            )


@torch.no_grad()
def check_nonzero(model: nn.Module, manifolds: Mapping[str, PSI]) -> None:
    """Refuse weights with a zero scale group: such a filter has no direction and is on no quotient."""
    parameters = dict(model.named_parameters())
    for name, manifold in manifolds.items():
        norms = manifold.norms(parameters[name]).flatten()
        bad = (~(torch.isfinite(norms) & (norms > 0))).nonzero().flatten().tolist()
        if bad:
            shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise ValueError(
                f"parameter {name} cannot lie on {manifold}: filters {shown} ({len(bad)} of {norms.numel()}) "
                "have norm zero or not finite; initialise them, or remove them from the layer"
            )
