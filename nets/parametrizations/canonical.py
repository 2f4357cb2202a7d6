r"""Canonical weight normalization: a weight as a sum of rank-one terms of unit vectors.

.. math:: W = \sigma \sum_{r=1}^{R} \lambda_r \; a_r \circ b_r \circ c_r \circ \dots, \qquad |a_r| = |b_r| = \dots = 1

Source: Veeramacheneni, Wolter, Klein, Garcke, "Canonical convolutional neural networks", IJCNN 2022. Here the weights
:math:`\lambda` keep their signs; :math:`\sigma` is fixed, since :math:`\lambda` has its scale already; and the vectors
of modes of size one, which are signs without a gradient, are not stored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from retract.manifolds.cp_terms import cp_normalize
from retract.nets.layers import canonical as layers  # a module, not its names: it imports this one in turn

from ._canonical_base import Canonical, Form, canonical_weight
from ._canonical_start import Mode, fit_terms, gain_scale, random_directions
from ._layout import MatrixLayout
from ._registration import Execution, layout_of

__all__ = ["Canonical", "canonical_weight", "canonical_weight_norm", "put_terms"]

Init = Literal["normal", "uniform", "power", "als"]
Layer = TypeVar("Layer", bound=nn.Module)


def canonical_weight_norm(
    module: Layer,
    rank: int,
    *,
    form: Form = "euclidean",
    init: Init = "normal",
    mode: Mode = "fan_in",
    nonlinearity: str = "relu",
    a: float = 0.0,
    execution: Execution = "auto",
    name: str = "weight",
    generator: torch.Generator | None = None,
) -> Layer:
    r"""Give a layer a weight that is a sum of rank-one terms of unit vectors (`Canonical`), in place.

    Layers are `torch.nn.Linear`, `Conv1d` to `Conv3d` and `ConvTranspose1d` to `ConvTranspose3d`, with groups=1. Their
    parameters become new ones, ``module.parametrizations.weight.original0`` and so on: make optimizers after this.
    Reading ``module.weight`` computes the weight; assigning to it fits the terms by the power method.

    Args:
        module: the layer.
        rank: the number of terms, 1 or more.
        form: ``"euclidean"``, for any optimizer; or ``"oblique"``: factors with unit rows, for the optimizers of
            `retract.optim` with the groups of `manifold_groups`. Both start at unit rows, so that a step turns the
            short vectors of kernels as it turns the long ones of channels.
        init: ``"normal"`` or ``"uniform"``: random directions, all lambda one, sigma at the gain that ``mode`` and
            ``nonlinearity`` ask for, :math:`\sqrt{2 \, \text{out} / R}` by default. ``"power"`` or ``"als"``: the
            terms of the present weight, by greedy deflation or alternating least squares; the root mean square of
            lambda is one then, and ``mode``, ``nonlinearity`` and ``a`` are not used.
        mode: ``"fan_in"`` keeps the variance of signals, ``"fan_out"`` that of gradients, ``"fan_avg"`` uses the mean.
        nonlinearity: whose gain is meant, a name that `torch.nn.init.calculate_gain` knows.
        a: the negative slope, for ``"leaky_relu"``.
        execution: ``"weight"`` builds the weight for every call; ``"factored"`` never does: a convolution becomes a
            1 x 1, depthwise ones, and a 1 x 1. Both give the same results and have the same state dict. ``"auto"``
            takes, call by call, what costs less for the size of the input: multiplications, and maps written to memory.
            It may be changed later, ``module.parametrizations.weight[0].execution = "weight"``.
        name: the parameter.
        generator: for the random draws.

    Returns:
        The layer.

    Raises:
        ValueError, TypeError: an unsupported layer (groups > 1, embeddings, a weight that is parametrized or not there
            yet), a rank or option that is not allowed, a weight with NaN or infinite entries that is to be fitted.
            The layer is unchanged then.

    Warns:
        UserWarning: more terms than can be told apart: more degrees of freedom than the weight has elements (for
            matrices: more terms than their rank can be).
    """
    start_canonical(
        module,
        rank,
        form=form,
        init=init,
        mode=mode,
        nonlinearity=nonlinearity,
        a=a,
        execution=execution,
        name=name,
        generator=generator,
    )
    parametrization, _ = canonical_weight(module, name) or (None, None)
    if parametrization is not None and parametrization.ambiguous:
        warnings.warn(
            f"rank={rank} are more terms than can be told apart in a weight of shape {parametrization.shape}: they "
            f"have {parametrization.degrees_of_freedom} degrees of freedom, it has {math.prod(parametrization.shape)} "
            "elements",
            stacklevel=2,
        )
    return module


def start_canonical(
    module: Layer,
    rank: int,
    *,
    form: Form = "euclidean",
    init: Init = "normal",
    mode: Mode = "fan_in",
    nonlinearity: str = "relu",
    a: float = 0.0,
    execution: Execution = "auto",
    name: str = "weight",
    generator: torch.Generator | None = None,
) -> Layer:
    """`canonical_weight_norm` without its warning."""
    layout = _layout(module, name)
    if init not in ("normal", "uniform", "power", "als"):
        raise ValueError(f"init must be 'normal', 'uniform', 'power' or 'als', got {init!r}")
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"mode must be 'fan_in', 'fan_out' or 'fan_avg', got {mode!r}")
    gain = nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]  # raises on names that are not allowed
    parametrization = Canonical(layout.weight_shape, rank, form=form, transposed=layout.transposed, execution=execution)
    weight = module.get_parameter(name).detach()
    if init == "power" or init == "als":
        weights, factors = fit_terms(parametrization.tensor(weight), rank, init, generator)
        sigma = weights.square().mean().sqrt()
    else:
        factors = random_directions(parametrization.shape, rank, init, weight, generator)
        sigma = factors[0].new_tensor(gain_scale(module, parametrization.shape, rank, mode, gain))
        weights = sigma.expand(rank)
    return _register(module, name, parametrization, sigma, weights, factors)


def put_terms(
    module: Layer,
    weights: Tensor,
    factors: Sequence[Tensor],
    *,
    form: Form | None = None,
    execution: Execution | None = None,
    name: str = "weight",
) -> Layer:
    """Give a layer the canonical weight with these terms, in place: a plain layer, or one that has other terms.

    Args:
        module: the layer.
        weights: (R,), of either sign.
        factors: vectors (R, d) of all modes, in the order out, in, *kernel; their norms go into the weights.
        form: as in `canonical_weight_norm`; by default that of the layer, or ``"euclidean"``.
        execution: as in `canonical_weight_norm`; by default that of the layer, or ``"auto"``.
        name: the parameter.

    Returns:
        The layer. A layer that was canonical keeps its sigma; else the root mean square of lambda is one.

    Raises:
        ValueError, TypeError: an unsupported layer, a vector that is zero or not finite, or of another size.
    """
    found = canonical_weight(module, name)
    old = None if found is None else found[0]
    layout = _layout(module, name) if old is None else old.layout
    if found is not None and len(_chains(module)[name]) > 1:
        raise ValueError(f"{name} has another parametrization on top of its terms: remove that one before")
    parametrization = Canonical(
        layout.weight_shape,
        len(weights),
        form=form or (old.form if old else "euclidean"),
        transposed=layout.transposed,
        execution=execution or (old.execution if old else "auto"),
    )
    sigma = cp_normalize(factors, weights)[0].square().mean().sqrt() if old is None else old.sigma
    return _register(module, name, parametrization, sigma, weights, factors)


def _layout(module: nn.Module, name: str) -> MatrixLayout:
    if isinstance(module, nn.Embedding):
        raise TypeError("module must be a linear layer or a convolution, got Embedding")
    return layout_of(module, name)


def _chains(module: nn.Module) -> Any:
    """The lists of parametrizations of a layer's parameters."""
    return module.parametrizations


def _register(
    module: Layer, name: str, parametrization: Canonical, sigma: Tensor, weights: Tensor, factors: Sequence[Tensor]
) -> Layer:
    """Parametrize; the module changes only after everything has been checked and computed."""
    found = canonical_weight(module, name)
    like = found[1][0] if found else module.get_parameter(name)
    parametrization.sigma = torch.where(sigma > 0, sigma, 1.0).to(like)
    originals = parametrization.originals(weights.to(like.device), [f.to(like.device) for f in factors], like.dtype)
    obstacle, kind = layers.obstacle_to_terms(module, name), module.__class__
    if obstacle is not None and parametrization.execution == "factored":
        raise ValueError(f"execution='factored' is not possible: {obstacle}; use execution='weight'")
    if obstacle is None:
        parametrization.contraction = layers.term_contraction(module, parametrization)
        module.__class__ = layers.CANONICAL.get(kind, kind)  # type: ignore[assignment]  # the variable's type stays true
    # Registration asks for the originals of the layer's own weight: it is given those found above.
    parametrization.__dict__["right_inverse"] = lambda _: originals
    try:
        if found is None:
            parametrize.register_parametrization(module, name, parametrization)
        else:
            whole = nn.Parameter(like.new_empty(parametrization.layout.weight_shape), like.requires_grad)
            _chains(module)[name] = parametrize.ParametrizationList([parametrization], whole)
    except BaseException:
        module.__class__ = kind
        raise
    finally:
        del parametrization.__dict__["right_inverse"]
    return module
