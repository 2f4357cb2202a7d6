"""Constraints on the spectra of a network's weights, by name: of a discriminator first, of any network as well.

===========================  ==========================================================================================
name                         weight of every layer
===========================  ==========================================================================================
``none``                     dense, free
``sn``                       dense, over its spectral norm by one power iteration a pass (Miyato et al., ICLR 2018)
``sr``                       dense, of spectral norm 1, its lower values kept up (Liu et al., ICCV 2019)
``svdp-c``, ``sttp-c``       of given rank, every singular value 1
``svdp-l``, ``sttp-l``       of given rank, the largest singular value 1, the others learned below it
``svdp-r``, ``sttp-r``       the same, with the D-optimal penalty on their decay
``lipschitz-operator``       of given rank, its convolution's own norm at most 1, not only that of its matrix
===========================  ==========================================================================================

``svdp`` keeps the frames of singular vectors as they are, ``sttp`` as tensor trains; modes C, L and R are those of
Obukhov et al., "Spectral tensor train parameterization of deep learning layers", AISTATS 2021, sections 3.3 and 4.
Spectra are those of the matrices (out, fan_in), but for the last constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from retract.manifolds.spectrum import Identity, Lipschitz, Spectrum
from retract.manifolds.tensor_train import prime_modes

from .._exchange import exchange, twin
from .._layers import matrix_obstacle, naming, obstacles
from .._selection import Selection, Skip
from .._spectral_penalties import spectral_penalty
from ..compress import factorize
from ..parametrizations._base import Form
from ..parametrizations._layout import Modes
from ..parametrizations._registration import layout_of
from ..parametrizations.spectral_regularization import spectral_regularization

__all__ = ["CONSTRAINTS", "DEFAULT_RANK", "Constraint", "constrain"]

Model = TypeVar("Model", bound=nn.Module)

#: The rank of every published discriminator, cut for each layer to what its matrix allows.
DEFAULT_RANK = 64


@dataclass(frozen=True)
class Constraint:
    """What holds for the weights of a network."""

    name: str
    #: How layers keep their dense weight and normalise it, in place.
    normalize: Callable[[nn.Module], nn.Module] | None = None
    #: Or the kind of factors that layers have instead, and which singular values these allow.
    kind: Literal["svdp", "sttp"] | None = None
    spectrum: Spectrum | None = None
    #: Whether training adds `penalty` to the network's loss.
    penalized: bool = False

    @property
    def factored(self) -> bool:
        """Whether it takes a rank and a form."""
        return self.kind is not None

    def penalty(self, model: nn.Module) -> Tensor:
        """What to add to the loss of a network under this constraint, with the published weight of 1.

        Returns:
            The mean D-optimal penalty over all singular values if `penalized`, zero otherwise: a scalar.
        """
        if self.penalized:
            return spectral_penalty(model, "d_optimal", "mean")
        return next(model.parameters()).new_zeros(())


def _factored(kind: Literal["svdp", "sttp"]) -> tuple[Constraint, ...]:
    return (
        Constraint(f"{kind}-c", kind=kind, spectrum=Identity()),
        Constraint(f"{kind}-l", kind=kind, spectrum=Lipschitz()),
        Constraint(f"{kind}-r", kind=kind, spectrum=Lipschitz(), penalized=True),
    )


CONSTRAINTS: dict[str, Constraint] = {
    constraint.name: constraint
    for constraint in (
        Constraint("none"),
        Constraint("sn", normalize=spectral_norm),
        Constraint("sr", normalize=spectral_regularization),
        *_factored("svdp"),
        *_factored("sttp"),
        Constraint("lipschitz-operator", kind="svdp", spectrum=Lipschitz(of="operator")),
    )
}
"""Constraints by name."""


def constrain(
    model: Model,
    name: str,
    *,
    rank: int | None = None,
    form: Form = "householder",
    skip: Skip = (),
) -> Model:
    """Put every linear layer, convolution and embedding of a network under a constraint, in place.

    Factors start from the frames of the nearest weight to each layer's own, with singular values that are all 1
    (``-c``) or evenly from 1 down to 1/2, whatever the scale of the weight was. Parameters become new ones: make
    optimizers after this. Layers that `retract.nets.factorize` cannot convert stay as they are under any
    constraint, and `retract.nets.summary` lists them with the reason: groups, a weight that several layers share or
    that is parametrized already.

    Args:
        model: discriminator or generator, of `retract.nets.gan` or of the user's own.
        name: of `CONSTRAINTS`.
        rank: of factored weights, cut for each layer to the largest that its matrix allows. Default: `DEFAULT_RANK`.
        form: of factored weights: ``"householder"``, coordinates for any optimizer, or ``"stiefel"``, points for the
            optimizers of `retract.optim` with the groups of ``model.manifold_groups()`` or
            `retract.nets.manifold_groups`.
        skip: layers to leave as they are, as in `retract.nets.factorize`.

    Returns:
        The model. ``CONSTRAINTS[name].penalty`` is what training adds to its loss.

    Raises:
        ValueError: an unknown name; a ``rank`` or Stiefel ``form`` for dense weights; no layer left to constrain;
            weights that are not finite (``sn`` lets them pass) or, for ``sr``, zero. The model is unchanged then.
    """
    if name not in CONSTRAINTS:
        raise ValueError(f"name must be one of {', '.join(CONSTRAINTS)}, got {name!r}")
    constraint = CONSTRAINTS[name]
    if constraint.kind is not None:
        modes = published_modes if constraint.kind == "sttp" else None
        rank = DEFAULT_RANK if rank is None else rank
        return factorize(
            model, constraint.kind, rank, constraint.spectrum, modes=modes, form=form, skip=skip, init="spread"
        )
    if rank is not None:
        raise ValueError(f"rank must be None for constraint {name!r}, whose weights are dense, got {rank!r}")
    if form != "householder":
        raise ValueError(f"form must be left out for constraint {name!r}, whose weights are dense, got {form!r}")
    if constraint.normalize is not None:
        _normalize(model, constraint.normalize, skip)
    return model


def _normalize(model: nn.Module, normalize: Callable[[nn.Module], nn.Module], skip: Skip) -> None:
    layers = Selection(model)
    reasons = obstacles(model) | dict.fromkeys(layers.skipped(skip), "skip names it")
    chosen = {name: module for name, module in layers.modules.items() if name not in reasons}
    if not chosen:
        listed = "".join(f"\n  {name or 'the layer itself'}: {reasons[name]}" for name in layers.modules)
        raise ValueError(f"model has no layer to constrain{listed or ': no linear layer, embedding or convolution'}")
    converted = {}
    for name, module in chosen.items():
        with naming(name):
            converted[name] = normalize(twin(module))
    for name, module in chosen.items():
        exchange(module, converted[name])


def published_modes(name: str, module: nn.Module) -> Modes | None:
    """Modes of the published tensor trains: the channels' primes, and the kernel as one mode on the outside."""
    if matrix_obstacle(module) is not None:
        return None
    layout = layout_of(module, "weight")
    channels, *kernel = layout.fan_in_shape
    taps = math.prod(kernel)
    fan_in = (*((taps,) if taps > 1 else ()), *prime_modes(channels)[::-1])
    return prime_modes(layout.matrix_shape[0]), fan_in
