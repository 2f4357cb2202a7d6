"""What `retract bench spectra` times: weights of controlled spectrum, factored convolutions, training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from retract.nets.compress import factorize
from retract.nets.gan.sngan import SNGANDiscriminator
from retract.nets.parametrizations.models import manifold_groups
from retract.nets.parametrizations.spectral import sttp, svdp
from retract.optim import RiemannianSGD

__all__ = [
    "BASELINE",
    "DENSE",
    "TRAININGS",
    "WEIGHTS",
    "Step",
    "Training",
    "convolutions",
    "dense_pass",
    "weight_steps",
]

Step = Callable[[], object]
Made = tuple[Callable[[], Tensor], list[Tensor]]  # a function of no arguments, and its parameters

#: Layers of ours, by name: ``(layer, rank, execution=...)``. Their spectrum has values to compute, and a cap.
SPECTRAL: dict[str, Callable[..., nn.Module]] = {
    "SVDP, Householder": partial(svdp, spectrum="lipschitz", form="householder", init="spread"),
    "SVDP, Stiefel": partial(svdp, spectrum="lipschitz", form="stiefel", init="spread"),
    "STTP, Householder": partial(sttp, spectrum="lipschitz", form="householder", init="spread"),
    "STTP, Stiefel": partial(sttp, spectrum="lipschitz", form="stiefel", init="spread"),
}


# ----------------------------------------------------------------------------------- weights, 3x3 convolutions


class Weight(NamedTuple):
    """How a weight is made: ``make(channels, rank)``."""

    make: Callable[[int, int], Made]
    affordable: Callable[[int, int], bool] = lambda channels, rank: True  # a call takes less than about a second
    package: str | None = None


def _plain(channels: int, rank: int) -> Made:
    a, b = torch.randn(channels, rank, requires_grad=True), torch.randn(rank, 9 * channels, requires_grad=True)
    return lambda: a @ b, [a, b]


def _spectral(name: str) -> Callable[[int, int], Made]:
    return lambda channels, rank: _weight_of(SPECTRAL[name](_convolution(channels), rank, execution="weight"))


def _weight_of(layer: nn.Module) -> Made:
    return lambda: cast("Tensor", layer.weight), list(layer.parameters())


def _spectral_norm(channels: int, rank: int) -> Made:
    return _weight_of(parametrizations.spectral_norm(_convolution(channels)))


def _torch_orthogonal(channels: int, rank: int) -> Made:
    """U diag(s) Vᵀ with torch's Householder frames, in their faster form."""
    (u, u_parameters), (v, v_parameters) = (
        _weight_of(
            parametrizations.orthogonal(
                nn.Linear(rank, rows, bias=False), orthogonal_map="householder", use_trivialization=False
            )
        )
        for rows in (channels, 9 * channels)
    )
    s = torch.linspace(1, 0.5, rank).requires_grad_()
    return lambda: u() * s @ v().mT, [*u_parameters, *v_parameters, s]


def _geotorch(channels: int, rank: int) -> Made:
    """By the Cayley map: the matrix exponential takes twenty times as long."""
    import geotorch

    layer = nn.Linear(9 * channels, channels, bias=False)
    geotorch.fixed_rank(layer, "weight", rank, triv="cayley")
    return _weight_of(layer)


def _convolution(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


BASELINE = "two factors A @ B"
DENSE = "dense"
WEIGHTS: dict[str, Weight] = {
    BASELINE: Weight(_plain),
    **{name: Weight(_spectral(name)) for name in SPECTRAL},
    "torch spectral_norm (full rank)": Weight(_spectral_norm),
    "torch orthogonal, Householder, on U and V": Weight(
        _torch_orthogonal, affordable=lambda channels, rank: channels**2 * rank <= 128**3
    ),
    "geotorch fixed_rank, Cayley": Weight(_geotorch, lambda channels, rank: channels <= 128, package="geotorch"),
}


def weight_steps(channels: int, rank: int) -> tuple[dict[str, Step], dict[str, str]]:
    """Forward and backward of each way to make the weight; and why the others are missing."""
    steps, missing = {}, {}
    for name, weight in WEIGHTS.items():
        if weight.package is not None and find_spec(weight.package) is None:
            missing[name] = f"{weight.package} is not installed"
        elif not weight.affordable(channels, rank):
            missing[name] = "left out"
        else:
            steps[name] = _backward_step(*weight.make(channels, rank))
    return steps, missing


def _backward_step(function: Callable[[], Tensor], parameters: list[Tensor]) -> Step:
    gradient = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), parameters, gradient)


def dense_pass(channels: int, batch: int, size: int) -> Step:
    """Forward and backward of a dense convolution with a weight of this shape, for scale."""
    layer = _convolution(channels)
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    gradient = torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(x), [x, layer.weight], gradient)


def convolutions(channels: int, rank: int, batch: int, size: int) -> dict[str, Step]:
    """Forward of the dense convolution, and of factored ones whose frames are computed in every call."""
    x = torch.randn(batch, channels, size, size)

    def forward(layer: nn.Module) -> Step:
        def step() -> None:
            with torch.no_grad():
                layer(x)

        return step

    layers = {
        name: SPECTRAL[name](_convolution(channels), rank, execution="factored")
        for name in ("SVDP, Householder", "STTP, Householder")
    }
    return {DENSE: forward(_convolution(channels))} | {name: forward(layer) for name, layer in layers.items()}


# -------------------------------------------------------------------------------------------------- training

Kind = Literal["svdp", "sttp"]
Spectrum = Literal["identity", "lipschitz"]


@dataclass(frozen=True)
class Training:
    """One step of an SNGAN discriminator, in its two parts."""

    passes: Step  # hinge loss of a batch, forward and backward
    step: Step  # of the optimizer


def _discriminator(width: int | None) -> nn.Module:
    return SNGANDiscriminator(32, width)


def _training(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> Training:
    images = torch.randn(batch, 3, 32, 32)
    signs = torch.ones(batch)
    signs[batch // 2 :] = -1  # the first half is data

    def passes() -> None:
        optimizer.zero_grad()
        torch.relu(1 - signs * model(images)).mean().backward()

    passes()
    return Training(passes, optimizer.step)


def _riemannian(kind: Kind, spectrum: Spectrum) -> Callable[[int | None, int, int], Training]:
    def make(width: int | None, rank: int, batch: int) -> Training:
        model = factorize(_discriminator(width), kind, rank, spectrum, form="stiefel", init="spread")
        return _training(model, RiemannianSGD(manifold_groups(model), lr=1e-4, momentum=0.9), batch)

    return make


def _adam(kind: Kind) -> Callable[[int | None, int, int], Training]:
    def make(width: int | None, rank: int, batch: int) -> Training:
        return _with_adam(factorize(_discriminator(width), kind, rank, "lipschitz", init="spread"), batch)

    return make


def _dense(width: int | None, rank: int, batch: int) -> Training:
    model = _discriminator(width)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrizations.spectral_norm(module)
    return _with_adam(model, batch)


def _with_adam(model: nn.Module, batch: int) -> Training:
    return _training(model, torch.optim.Adam(model.parameters(), lr=2e-4, betas=(0.0, 0.9)), batch)


#: Layers and optimizer: ``make(width, rank, batch)``; a width of None is the paper's.
TRAININGS: dict[str, Callable[[int | None, int, int], Training]] = {
    "SVDP, Stiefel, identity: RiemannianSGD": _riemannian("svdp", "identity"),
    "SVDP, Stiefel, lipschitz: RiemannianSGD": _riemannian("svdp", "lipschitz"),
    "STTP, Stiefel, identity: RiemannianSGD": _riemannian("sttp", "identity"),
    "STTP, Stiefel, lipschitz: RiemannianSGD": _riemannian("sttp", "lipschitz"),
    "SVDP, Householder, lipschitz: Adam": _adam("svdp"),
    "STTP, Householder, lipschitz: Adam": _adam("sttp"),
    "dense, torch spectral_norm: Adam": _dense,
}
