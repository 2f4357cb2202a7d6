"""Whole models at once: dense layers into factored ones (`factorize`), and factored ones into dense (`decompress`).

`truncate` makes canonical layers smaller that have been trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from retract.manifolds.spectrum import SpectrumLike, as_spectrum

from ._conversion import KINDS
from ._exchange import exchange, make_low_rank_dense, make_parametrized_dense, make_tensor_dense
from ._layers import is_low_rank_layer, is_tensor_layer, naming, obstacles, set_note
from ._selection import PerLayer, Selection, Skip
from ._sizes import StaysDense
from ._truncation import Truncation, canonical_penalty, shrink_terms_, truncate
from ._unfolding import UnfoldingKind
from .parametrizations._base import SpectralParametrization
from .parametrizations._layout import Modes
from .parametrizations.canonical import Canonical, canonical_weight

__all__ = ["Truncation", "canonical_penalty", "decompress", "factorize", "shrink_terms_", "truncate"]

Model = TypeVar("Model", bound=nn.Module)
Rank = int | Sequence[int]

_SIZES = ("rank", "budget", "error", "energy")
_PARAMETRIZATIONS = (SpectralParametrization, Canonical)


def factorize(
    model: Model,
    kind: str,
    rank: Rank | PerLayer[Rank] | None = None,
    spectrum: SpectrumLike | None = None,
    *,
    budget: float | PerLayer[float] | None = None,
    error: float | PerLayer[float] | None = None,
    energy: float | PerLayer[float] | None = None,
    skip: Skip = (),
    modes: Modes | PerLayer[Modes] | None = None,
    form: Literal["householder", "stiefel", "euclidean", "oblique"] | None = None,
    execution: Literal["auto", "factored", "weight"] | None = None,
    init: str | None = None,
    mode: Literal["fan_in", "fan_out", "fan_avg"] | None = None,
    nonlinearity: str | None = None,
    generator: torch.Generator | None = None,
    unfolding: UnfoldingKind | PerLayer[UnfoldingKind] | None = None,
    slope: float | PerLayer[float] | None = None,
    correct_bias: bool | None = None,
    cost: Literal["parameters", "multiplications"] | None = None,
    example_input: Any = None,
) -> Model:
    """Give every linear layer, convolution and embedding of a model a weight made of a few factors, in place.

    ========================  ==================================================  ==================================
    kind                      weight                                              options
    ========================  ==================================================  ==================================
    ``"svdp"``                of chosen rank and spectrum, U diag(s) Vᵀ           rank, spectrum, form
    ``"sttp"``                the same, U and V tensor trains                     rank, spectrum, form, modes
    ``"canonical"``           sum of rank-one terms of unit vectors               rank, budget or error; form
    ``"lowrank"``             U V, in a low-rank layer (`low_rank_layer`)         rank, budget or energy; unfolding,
                                                                                  slope, correct_bias, cost,
                                                                                  example_input
    ``"cp"``, ``"tucker2"``,  a tensor network (`retract.nets.layers.             rank, budget or error; modes
    ...                       tensor_formats`), in a tensor layer                 (``"tt_matrix"``, ``"tensor_ring"``)
    ========================  ==================================================  ==================================

    All take ``skip`` and ``init``, and all but ``"lowrank"``, which is always factored, ``execution``; where ``init``
    may be a random start, ``mode``, ``nonlinearity`` and ``generator`` are its options. Of ``rank``, ``budget``,
    ``error`` and ``energy`` exactly one is given.

    A layer stays as it is if its weight is parametrized already, is shared with another layer or is no plain
    parameter; if it has groups (all kinds but ``"lowrank"`` and tensor networks); if it is an embedding
    (``"canonical"``, ``"lowrank"`` and tensor networks); or if it is a transposed convolution, or of a class derived
    from torch's (``"lowrank"`` and tensor networks). It does too if its ``budget``, ``error`` or ``energy`` would not
    make it smaller. `retract.nets.summary` lists such layers with the reason. A layer that a model holds under several
    names is converted once. The layers remain the objects they were, with their hooks; the parameters are new ones:
    make the optimizer after this.

    Args:
        model: a network, or a single layer.
        kind: of the table.
        rank: an int, cut for each layer to the largest of use: that its matrix allows (``"svdp"``, ``"lowrank"``), for
            each bond the largest that its tensor allows (``"sttp"``, tensor networks), the most terms that a tensor of
            its shape can need (``"canonical"``). For ``"sttp"`` and tensor networks also a tuple of the ranks of all
            bonds. Or a mapping from names or patterns (`fnmatch`) to such ranks, where the first that fits a layer
            holds; or a function of name and module. A layer without a rank, or with ``None``, stays dense.
        spectrum: which singular values are allowed, by name or object (`retract.manifolds.spectrum`). Default:
            ``"free"``.
        budget: of each layer, the most elements that it may store: a float in (0, 1] is a fraction of those of its
            weight, an int a number. Or in the ways of ``rank``. For ``"lowrank"`` a number is one budget for the
            weights of all layers that are neither skipped nor impossible to convert, those that stay dense included:
            singular values are kept down to one threshold for all of them. It is on what a term adds to the logarithm
            of the share of its layer's squared singular values that is kept, per cost (`retract.nets._rank_budget`).
            A mapping or function still gives each layer its own.
        error: of each layer, the relative Frobenius error to which its weight is decomposed with as few elements as the
            kind's method finds, in (0, 1). Or in the ways of ``rank``.
        energy: of each layer, the fraction in (0, 1] of its squared singular values that is kept. Or in the ways of
            ``rank``.
        skip: layers to leave as they are: names or patterns, of layers or of modules that contain them, or a
            predicate of name and module.
        modes: the factors of each layer's dimensions, as one value or in the ways of ``rank``: for ``"sttp"`` (of
            out, of fan_in), by default primes; for ``"tt_matrix"`` and ``"tensor_ring"`` (of out, of in), by
            default as equal as they can be.
        form: ``"householder"`` (default) or ``"stiefel"`` for spectral kinds, ``"euclidean"`` (default) or
            ``"oblique"`` for ``"canonical"``. The second one is for the optimizers of `retract.optim`.
        execution: ``"auto"`` (default), ``"factored"`` or ``"weight"``.
        init: ``"fit"`` (default) to approximate the present weights: ``"canonical"`` does it by the power method,
            and by alternating least squares for ``"als"``. Otherwise ``"spread"`` for spectral kinds; ``"kaiming"``
            for a random start of the others (`retract.nets.init`), whose vectors ``"canonical"`` draws normal, or
            ``"uniform"``. For ``"lowrank"`` a method of `retract.nets.init.lowrank_factors`, by default
            ``"spectral"``, the nearest weights, or ``"kaiming"``.
        mode: of random starts, ``"fan_in"``, ``"fan_out"`` or ``"fan_avg"``.
        nonlinearity: of random starts, a name that `torch.nn.init.calculate_gain` knows; ``"relu"`` by default.
        generator: of random numbers.
        unfolding: of convolutions, ``"output"`` (default), ``"input"`` or ``"separable"``, as one value or in the ways
            of ``rank``.
        slope: of the leaky ReLU after a layer, for the methods that fit its function; 0 is ReLU, 1 no nonlinearity. As
            one value or in the ways of ``rank``: ``{"fc": 1.0}`` for a last layer. By default what ``example_input``
            shows, where neither ReLU nor leaky ReLU follows 1; without it ReLU.
        correct_bias: fit biases, too, to the function: see `retract.nets.init.lowrank_factors_with_bias`. Layers
            without one get one. Not of layers that feed a batch normalization (``example_input``), which removes it.
        cost: what a ``budget`` counts: ``"parameters"`` (default), or ``"multiplications"`` in a forward pass of
            ``example_input``, of which an int is a number.
        example_input: one tensor, or the tuple of positional arguments of a forward pass, which is run once in
            evaluation mode. It shows the sizes that ``cost="multiplications"`` needs, the rectifier after each layer,
            and which layers feed a batch normalization: these are fitted, and compared with others, with filters of the
            norm by which it multiplies them, since it removes their own.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: an option that the kind does not take, or that is not allowed for some layer; a name or
            pattern that fits none; or no layer left to convert. The model is unchanged then.

    Warns:
        UserWarning: canonical layers with more terms than can be told apart.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    per_layer = _given(
        rank=rank, budget=budget, error=error, energy=energy, modes=modes, unfolding=unfolding, slope=slope
    )
    options = _given(spectrum=spectrum, form=form, execution=execution, init=init, correct_bias=correct_bias)
    options |= _given(mode=mode, nonlinearity=nonlinearity, generator=generator, cost=cost, example_input=example_input)
    size = _check_options(kind, [*per_layer, *options])
    if "spectrum" in options:
        options["spectrum"] = as_spectrum(options["spectrum"])
    layers = Selection(model)
    choices: dict[str, dict[str, Any]] = {name: layers.choose(name, value) for name, value in per_layer.items()}
    reasons = obstacles(model, KINDS[kind].obstacle) | dict.fromkeys(layers.skipped(skip), "skip names it")
    reasons |= dict.fromkeys(layers.modules.keys() - choices[size].keys(), f"{size} has none for it")
    chosen = {name: module for name, module in layers.modules.items() if name not in reasons}
    own = {name: {option: of[name] for option, of in choices.items() if name in of} for name in chosen}
    unchanged: dict[str, str] = {}
    if (plan := KINDS[kind].plan) is not None:
        shared = {name: options.pop(name) for name in KINDS[kind].planned if name in options}
        own, unchanged = plan(model, chosen, own, budget=budget, **shared)
    converted, notes = _converted(kind, size, {name: chosen[name] for name in own}, own, options)
    notes |= unchanged
    if not converted:
        reasons |= notes
        listed = "".join(f"\n  {name or 'the layer itself'}: {reasons[name]}" for name in layers.modules)
        raise ValueError(f"model has no layer to factorize{listed or ': no linear layer, embedding or convolution'}")
    for name, module in chosen.items():
        if name in converted:
            exchange(module, converted[name])
        set_note(module, notes.get(name))
    _warn_of_ambiguity(converted)
    return model


def decompress(model: Model) -> Model:
    """Give every factored layer of a model a plain weight and its own class again, in place.

    The model keeps its function and loses the constraint. A weight needs a gradient if one of its factors did. The
    parameters are new ones, in the order they had before `factorize`: make the optimizer after this. A model
    without factored layers is returned as it is.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        if is_tensor_layer(module):
            make_tensor_dense(module)
        elif is_low_rank_layer(module):
            make_low_rank_dense(module)
        elif parametrize.is_parametrized(module):
            stored: Any = module.parametrizations
            for name in [name for name, chain in stored.items() if isinstance(chain[0], _PARAMETRIZATIONS)]:
                make_parametrized_dense(module, name)
    return model


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _check_options(kind: str, given: Sequence[str]) -> str:
    """The name of the option that says how large layers become, once all that are given have been checked."""
    allowed = KINDS[kind].options
    for name in given:
        if name not in allowed:
            raise ValueError(f"kind {kind!r} takes no {name}: it takes {', '.join(allowed)}")
    sizes = [name for name in _SIZES if name in allowed]
    found = [name for name in sizes if name in given]
    if len(found) != 1:
        one = "rank" if sizes == ["rank"] else f"exactly one of {', '.join(sizes)}"
        raise ValueError(f"{one} must be given for kind {kind!r}, got {' and '.join(found) or 'none'}")
    return found[0]


def _converted(
    kind: str,
    size: str,
    layers: Mapping[str, nn.Module],
    own: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What layers are to become, and why some stay dense: none of them changes.

    Args:
        kind: of weight.
        size: the name of the option that says how large they become.
        layers: by name.
        own: by the same names, options of each layer.
        options: of all.
    """
    converted: dict[str, nn.Module] = {}
    notes: dict[str, str] = {}
    for name, module in layers.items():
        try:
            with naming(name):
                converted[name] = KINDS[kind].convert(module, **own[name], **options).train(module.training)
        except StaysDense as reason:
            notes[name] = f"{kind} with {size}={own[name][size]}: {reason}"
    return converted, notes


def _warn_of_ambiguity(layers: Mapping[str, nn.Module]) -> None:
    """Tell of canonical layers with more terms than can be told apart."""
    found = {name: canonical_weight(layer) for name, layer in layers.items()}
    shown = [f"{name or 'the layer'} ({one[0].rank})" for name, one in found.items() if one and one[0].ambiguous]
    if shown:
        warnings.warn(
            f"rank: more terms than can be told apart in {', '.join(shown)}: they have more degrees of freedom than "
            "the weight has elements",
            stacklevel=3,
        )
