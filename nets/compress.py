"""Whole models at once: dense layers into spectral ones (`factorize`), and spectral ones into dense (`decompress`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from retract.manifolds.spectrum import SpectrumLike, as_spectrum
from retract.manifolds.tensor_train import capped_ranks

from ._layers import matrix_layers, obstacles
from .layers.factored import FACTORED
from .parametrizations._base import Form
from .parametrizations._layout import Modes
from .parametrizations._registration import Execution, Init, layout_of
from .parametrizations.models import spectral_weights
from .parametrizations.spectral import sttp, svdp

__all__ = ["decompress", "factorize"]

Model = TypeVar("Model", bound=nn.Module)
Rank = int | Sequence[int]
Choice = TypeVar("Choice")
PerLayer = Mapping[str, Choice] | Callable[[str, nn.Module], Choice | None]
Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]

_DENSE = {factored: dense for dense, factored in FACTORED.items()}


def factorize(
    model: Model,
    kind: Literal["svdp", "sttp"],
    rank: Rank | PerLayer[Rank],
    spectrum: SpectrumLike = "free",
    *,
    skip: Skip = (),
    modes: Modes | PerLayer[Modes] | None = None,
    form: Form = "householder",
    execution: Execution = "auto",
    init: Init = "fit",
) -> Model:
    """Give every linear layer, convolution and embedding of a model a weight of chosen rank and spectrum, in place.

    A layer stays as it is if it has groups, or if its weight is parametrized already, is shared with another layer or
    is no plain parameter; `retract.nets.summary` lists such layers with the reason. A layer that a model holds under
    several names is converted once. The parameters are new ones: make the optimizer after this.

    Args:
        model: a network, or a single layer.
        kind: ``"svdp"`` or ``"sttp"``, as the functions of those names in `retract.nets.parametrizations`.
        rank: an int, cut for each layer to the largest that its matrix allows (for ``"sttp"``, for each bond to the
            largest that its tensor allows); for ``"sttp"`` also a tuple of the ranks of all bonds. Or a mapping from
            names or patterns (`fnmatch`) to such ranks, where the first that fits a layer holds; or a function of
            name and module. A layer without a rank, or with ``None``, stays dense.
        spectrum: which singular values are allowed, by name or object (`retract.manifolds.spectrum`).
        skip: layers to leave as they are: names or patterns, of layers or of modules that contain them, or a
            predicate of name and module.
        modes: for ``"sttp"``, the factors (of out, of fan_in) of each layer's matrix dimensions, as one value or in
            the ways of ``rank``; layers without are split into primes.
        form: ``"householder"`` or ``"stiefel"``.
        execution: ``"auto"``, ``"factored"`` or ``"weight"``.
        init: ``"fit"`` to approximate the present weights, or ``"spread"``.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: an argument that is not allowed for some layer; a name or pattern that fits none; or no
            layer left to convert. The model is unchanged then.
    """
    if kind not in ("svdp", "sttp"):
        raise ValueError(f"kind must be 'svdp' or 'sttp', got {kind!r}")
    if kind == "svdp" and modes is not None:
        raise ValueError("modes must be None for kind 'svdp', whose frames are not tensor trains")
    options: dict[str, Any] = {"spectrum": as_spectrum(spectrum), "form": form, "execution": execution, "init": init}
    layers = _Layers(model)
    ranks: dict[str, Rank] = layers.choose("rank", rank)
    splits: dict[str, Modes] = layers.choose("modes", modes)
    reasons = obstacles(model) | dict.fromkeys(layers.skipped(skip), "skip names it")
    reasons |= dict.fromkeys(layers.modules.keys() - ranks.keys(), "rank has none for it")
    chosen = {name: module for name, module in layers.modules.items() if name not in reasons}
    if not chosen:
        listed = "".join(f"\n  {name or 'the layer itself'}: {reasons[name]}" for name in layers.modules)
        raise ValueError(f"model has no layer to factorize{listed or ': no linear layer, embedding or convolution'}")
    converted = [
        _converted(name, module, kind, ranks[name], splits.get(name), **options) for name, module in chosen.items()
    ]
    for module, twin in zip(chosen.values(), converted, strict=True):
        vars(module).update(vars(twin))
        module.__class__ = type(twin)
    return model


def decompress(model: Model) -> Model:
    """Give every spectral layer of a model a plain weight and its own class again, in place.

    The model keeps its function and loses the constraint. A weight needs a gradient if one of its factors did. The
    parameters are new ones, in the order they had before `factorize`: make the optimizer after this. A model
    without spectral layers is returned as it is.

    Returns:
        The model.
    """
    for full_name, _, originals in list(spectral_weights(model)):
        prefix, _, name = full_name.rpartition(".")
        _make_dense(model.get_submodule(prefix), name, any(original.requires_grad for original in originals))
    return model


def _converted(name: str, module: nn.Module, kind: str, rank: Any, modes: Modes | None, **options: Any) -> nn.Module:
    """What a layer is to become, as another module: none changes before the conversion of all has succeeded."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for registry in ("_parameters", "_buffers", "_modules"):
        vars(twin)[registry] = vars(module)[registry].copy()
    layout = layout_of(module, "weight")
    is_cap = isinstance(rank, int)
    try:
        if kind == "svdp":
            svdp(twin, min(rank, *layout.matrix_shape) if is_cap else rank, **options)
        else:
            modes = layout.prime_modes() if modes is None else layout.check_modes(modes)
            sttp(twin, capped_ranks(*modes, rank) if is_cap else rank, modes=modes, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}" if name else str(error)) from error
    return twin.train(module.training)


def _make_dense(module: nn.Module, name: str, trainable: bool) -> None:
    """Put the product of the factors in their place, before the module's other parameters, as it was at first."""
    with torch.no_grad():
        value = getattr(module, name).clone(memory_format=torch.contiguous_format)
    # Its own class, made anew: deep copies share the one that `parametrize` made, and removal edits the class.
    made = type(module)
    (base,) = made.__bases__
    dense = _DENSE.get(base, base)
    module.__class__ = type(f"Parametrized{dense.__name__}", (dense,), dict(vars(made)))
    parametrize.remove_parametrizations(module, name)
    delattr(module, name)  # a buffer, if nothing needs a gradient
    module._parameters = {name: nn.Parameter(value, trainable), **module._parameters}


class _Layers:
    """The layers of a model, and the two ways to speak of some of them: by patterns, or by a function."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = matrix_layers(model)
        names: dict[nn.Module, list[str]] = {module: [] for module in self.modules.values()}
        for name, module in model.named_modules(remove_duplicate=False):
            if module in names:
                names[module].append(name)
        self._names = {name: names[module] for name, module in self.modules.items()}

    def choose(self, argument: str, value: Choice | PerLayer[Choice] | None) -> dict[str, Choice]:
        """What an argument says for each layer; layers for which it is None are left out."""
        chosen: dict[str, Choice | None] = {}
        if isinstance(value, Mapping):
            for pattern, one in value.items():
                for name in self.fitting(argument, pattern):
                    chosen.setdefault(name, one)
        elif callable(value):
            chosen = {name: value(name, module) for name, module in self.modules.items()}
        else:
            chosen = dict.fromkeys(self.modules, value)
        return {name: one for name, one in chosen.items() if one is not None}

    def skipped(self, skip: Skip) -> list[str]:
        """Names of the layers that the argument says to leave."""
        if callable(skip):
            return [name for name, module in self.modules.items() if skip(name, module)]
        patterns = (skip,) if isinstance(skip, str) else skip
        return [name for pattern in patterns for name in self.fitting("skip", pattern)]

    def fitting(self, argument: str, pattern: str) -> list[str]:
        """Names of the layers of which one name, or that of a module around them, fits the pattern."""
        found = [name for name, names in self._names.items() if any(_fits(one, pattern) for one in names)]
        if not found:
            shown = ", ".join(list(self.modules)[:8]) + (", ..." if len(self.modules) > 8 else "")
            raise ValueError(f"{argument}: {pattern!r} fits no layer of the model, which has {shown or 'none'}")
        return found


def _fits(name: str, pattern: str) -> bool:
    ancestors = accumulate(name.split("."), "{}.{}".format)
    return any(fnmatchcase(ancestor, pattern) for ancestor in ancestors)
