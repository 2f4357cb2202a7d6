"""The optimizers that `retract bench convergence` compares, by the names that readers know, each with its grid.

Every method of a kind has a grid of the same shape: as many learning rates of the scale-invariant weights, half a
decade apart, as many of the others', and as many decays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from retract.nets import CANONICAL_NORM
from retract.nets.cnn import ZooModel

from ..optimizers import OPTIMIZERS, build

__all__ = ["FIXED_DECAY", "FULL_BATCH", "METHODS", "STOCHASTIC", "Method", "Setting", "find_method"]


@dataclass(frozen=True)
class Setting:
    """What is tuned: learning rates of the scale-invariant weights and of all others, and decay."""

    lr: float
    euclidean_lr: float
    weight_decay: float


@dataclass(frozen=True)
class Method:
    """An optimizer and the grid it is tuned on.

    Args:
        optimizer: of `.optimizers.OPTIMIZERS`.
        lrs: learning rates of the scale-invariant weights.
        euclidean_lrs: of all others.
        weight_decays: as `.optimizers.build` takes it: of the others alone, for a method on a manifold.
        momentum: as `.optimizers.build` takes it.
        options: further keys of the optimizer's groups.
    """

    optimizer: str
    lrs: tuple[float, ...]
    euclidean_lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    momentum: float = 0.9
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def equivariant(self) -> bool:
        """Whether it does not see the norms of scale-invariant weights: it turns them, or fixes their norms itself."""
        return OPTIMIZERS[self.optimizer].manifold in ("psi", "any", "sphere")

    @property
    def grid(self) -> list[Setting]:
        """Every combination."""
        return [Setting(*values) for values in product(self.lrs, self.euclidean_lrs, self.weight_decays)]

    def at_edges(self, lr: float, euclidean_lr: float) -> tuple[bool, bool]:
        """Whether each learning rate is the lowest or the highest of its grid, so that one beyond may be better."""
        pairs = ((lr, self.lrs), (euclidean_lr, self.euclidean_lrs))
        first, second = (
            any(math.isclose(rate, end, rel_tol=1e-4) for end in (min(rates), max(rates))) for rate, rates in pairs
        )
        return first, second

    def build(self, model: ZooModel, setting: Setting, *, canonical: bool = True) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters.

        Changes the model for methods on manifolds: their filters get a norm at which BatchNorm's epsilon does not
        matter, or become unit vectors. BatchNorm's statistics stay, and are then of other weights.

        Args:
            model: a network with scale-invariant weights.
            setting: learning rates and decay.
            canonical: False leaves PSI weights at the norms they have.

        Raises:
            ValueError: the optimizer refuses a rate, or the model has no scale-invariant weight.
        """
        if canonical and OPTIMIZERS[self.optimizer].manifold in ("psi", "any"):
            _put_at_canonical_norm(model)
        optimizer = build(
            self.optimizer,
            model,
            lr=setting.lr,
            euclidean_lr=setting.euclidean_lr,
            weight_decay=setting.weight_decay,
            momentum=self.momentum,
        )
        for group in optimizer.param_groups:
            group.update(self.options)
        return optimizer


@torch.no_grad()
def _put_at_canonical_norm(model: ZooModel) -> None:
    for group in model.manifold_groups():
        if "manifold" in group:
            manifold = group["manifold"]
            for _, weight in group["params"]:
                weight.copy_(manifold.act(weight, CANONICAL_NORM / manifold.norms(weight).flatten()))


def _rates(lowest: float, count: int = 6) -> tuple[float, ...]:
    """1, 3, 10, 30, ... times a power of ten."""
    first = round(2 * math.log10(lowest))
    return tuple(float(f"{(1, 3)[half % 2]}e{half // 2}") for half in range(first, first + count))


SGD_RATES, SGD_OTHERS, SGD_DECAYS = _rates(0.01), _rates(0.03, 4), (0.0, 5e-4)
GROWING = _rates(0.03)  # of methods under which norms grow, so that steps shrink: they want higher rates
ADAM_RATES, ADAM_OTHERS, ADAM_DECAYS = _rates(3e-4), _rates(3e-4, 4), (0.0, 0.05)
ANGLES = _rates(1e-3)  # radians


def _sgd(optimizer: str, lrs: tuple[float, ...] = SGD_RATES, momentum: float = 0.9, **options: Any) -> Method:
    return Method(optimizer, lrs, SGD_OTHERS, SGD_DECAYS, momentum, options)


STOCHASTIC: dict[str, Method] = {
    "SGD": _sgd("sgd", GROWING),
    "SGD Nesterov": _sgd("nesterov", GROWING),
    "Adam": Method("adam", ADAM_RATES, ADAM_OTHERS, SGD_DECAYS),
    "AdamW": Method("adamw", ADAM_RATES, ADAM_OTHERS, ADAM_DECAYS),
    "Muon": Method("muon", _rates(1e-3), ADAM_OTHERS, ADAM_DECAYS, momentum=0.95),
    "SGDP": _sgd("sgdp", GROWING),
    "AdamP": Method("adamp", ADAM_RATES, ADAM_OTHERS, ADAM_DECAYS),
    "geoopt RiemannianSGD (Sphere)": _sgd("geoopt-sphere"),
    "geoopt RiemannianAdam (Sphere)": Method("geoopt-sphere-adam", _rates(1e-3), ADAM_OTHERS, SGD_DECAYS),
    "SGD-G": _sgd("sgd-g"),
    "unit norm": _sgd("unit-norm"),
    "PSISGD": _sgd("psisgd"),
    "PSISGD (projection)": _sgd("psisgd", transport="projection"),
    "PSISGD (horizontal)": _sgd("psisgd", transport="horizontal"),
    "PSISGD (paper)": _sgd("psisgd", transport="paper"),
    "PSISGD without momentum": _sgd("psisgd", _rates(0.03), momentum=0.0),
    "PSIAngular": _sgd("psiangular", ANGLES),
    "PSIAdam": _sgd("psiadam", _rates(3e-3)),
    "RiemannianSGD": _sgd("riemannian-sgd"),
}
"""What trains on batches."""

# At rates of 3 and more the output layer can end a classification at once: images far from the boundary, no gradient.
FULL_BATCH_RATES, FULL_BATCH_OTHERS = _rates(0.1), _rates(0.03, 4)


def _descent(optimizer: str, lrs: tuple[float, ...] = FULL_BATCH_RATES, momentum: float = 0.0) -> Method:
    return Method(optimizer, lrs, FULL_BATCH_OTHERS, (0.0,), momentum)


FULL_BATCH: dict[str, Method] = {
    "GD": _descent("sgd"),
    "GD momentum": _descent("sgd", GROWING, momentum=0.9),
    "PSIGD": _descent("psigd"),
    "PSIGD momentum": _descent("psisgd", GROWING, momentum=0.9),
    "RiemannianGD": _descent("riemannian-gd"),
    "Adam": Method("adam", _rates(1e-3), _rates(3e-3, 4), (0.0,)),
}
"""What descends on all data at once; its convergence is measured without decay."""

METHODS: dict[str, Method] = {**STOCHASTIC, **FULL_BATCH, "Adam": STOCHASTIC["Adam"]}
FIXED_DECAY = ", decay "  # and a number, after a method's name


def find_method(name: str) -> Method:
    """The method of a name. ``"SGD, decay 5e-4"`` is that of the table with its decay fixed rather than tuned.

    Raises:
        ValueError: a name that is not in the table, or a decay that is no number of at least 0.
    """
    base, _, decay = name.partition(FIXED_DECAY)
    if base not in METHODS:
        raise ValueError(f"method must be of {'; '.join(METHODS)}, got {base!r}")
    if not decay:
        return METHODS[base]
    try:
        value = float(decay)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ValueError(f"decay of a method must be a number of at least 0, got {decay!r} in {name!r}")
    return replace(METHODS[base], weight_decays=(value,))
