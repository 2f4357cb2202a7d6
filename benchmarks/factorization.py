"""Which layers of a network a run replaces by factored ones, of some kind of weight, as its options say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from retract.nets.compress import factorize
from retract.nets.layers.tensor_formats import FORMATS
from retract.nets.summary import summary

__all__ = ["FORMS", "KINDS", "OPTIONS", "SIZES", "SPECTRA", "SPECTRAL", "Factorization", "cost", "fill_in"]

SPECTRAL = ("svdp", "sttp")
KINDS = (*SPECTRAL, "canonical", "lowrank", *FORMATS)
SPECTRA = ("identity", "free", "lipschitz", "bounded")
SIZES = ("rank", "budget", "error", "energy")  # how large the layers are; a run says one
OPTIONS = (*SIZES, "spectrum", "form", "skip")  # those that mean something only with --factorize
FORMS = {**dict.fromkeys(SPECTRAL, ("householder", "stiefel")), "canonical": ("euclidean", "oblique")}  # default first


def fill_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the defaults of a factorization filled in, if there is to be one.

    Raises:
        ValueError: an unknown name, none or several of the options that say how large the layers are, an option that
            means nothing for this kind of layers, or one that needs ``factorize`` without it.
    """
    chosen = {**dict.fromkeys(SIZES), **options}
    kind = chosen["factorize"]
    if kind is None:
        if given := [f"--{name}" for name in OPTIONS if chosen[name] is not None]:
            raise ValueError(f"{' and '.join(given)} given without --factorize {' or '.join(SPECTRAL)} or a format")
        return chosen
    _require("factorize", kind, KINDS)
    if kind in SPECTRAL:
        chosen["spectrum"] = chosen["spectrum"] or "free"
        _require("spectrum", chosen["spectrum"], SPECTRA)
    if kind in FORMS:
        chosen["form"] = chosen["form"] or FORMS[kind][0]
        _require("form", chosen["form"], FORMS[kind])
    unused = [f"--{name}" for name in _meaningless(kind) if chosen[name] is not None]
    if unused:
        raise ValueError(f"{' and '.join(unused)} means nothing for --factorize {kind}")
    _require_size(chosen)
    return chosen


def _require(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"--{option} must be one of {', '.join(allowed)}, got {value!r}")


def _meaningless(kind: str) -> tuple[str, ...]:
    """The options that layers of this kind do not have."""
    sizes = tuple(size for size in SIZES if size not in _sizes(kind))
    if kind in SPECTRAL:
        return sizes
    return (*sizes, "spectrum") if kind in FORMS else (*sizes, "spectrum", "form")


def _sizes(kind: str) -> tuple[str, ...]:
    """The options that say how large layers of this kind are."""
    if kind in SPECTRAL:
        return ("rank",)
    return ("rank", "budget", "energy") if kind == "lowrank" else ("rank", "budget", "error")


def _require_size(chosen: Mapping[str, Any]) -> None:
    given = [f"--{name}" for name in SIZES if chosen[name] is not None]
    if chosen["factorize"] in SPECTRAL and not given:
        raise ValueError(f"--factorize {chosen['factorize']} needs --rank, the highest rank of a layer")
    if len(given) != 1:
        found = " and ".join(given) or "none"
        *first, last = (f"--{name}" for name in _sizes(chosen["factorize"]))
        raise ValueError(f"--factorize {chosen['factorize']} needs one of {', '.join(first)} and {last}, got {found}")


@dataclass(frozen=True)
class Factorization:
    """What `retract.nets.factorize` is asked to do.

    ``rank`` is the highest of a layer: smaller layers take what they can. ``budget`` is the fraction of its parameters
    that a layer keeps, or all low-rank layers together, ``error`` the relative one to which its weight is decomposed,
    ``energy`` the fraction of the squared singular values that it keeps; one of the four is given. ``skip`` are
    patterns of names of layers that stay dense.
    """

    kind: str
    rank: int | None
    spectrum: str | None = None
    form: str | None = None
    skip: tuple[str, ...] = ()
    budget: float | None = None
    error: float | None = None
    energy: float | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Factorization | None:
        """What options that `fill_in` has filled in ask for; None if they ask for none."""
        if options.get("factorize") is None:  # runs before there were factored layers do not say so
            return None
        skip = tuple(pattern.strip() for pattern in (options["skip"] or "").split(",") if pattern.strip())
        sizes = (options.get(name) for name in ("budget", "error", "energy"))  # younger than the other options
        return cls(options["factorize"], options["rank"], options["spectrum"], options["form"], skip, *sizes)

    def apply(self, model: nn.Module) -> None:
        """Replace the weights of ``model`` in place.

        Frames of spectral layers are those of the present weights. So are singular values where they are free; the
        others are spread over what is allowed, since those of random weights would mostly be cut to the same bound.
        Low-rank layers start near the function that the layers with their present weights have before a ReLU. Others
        start afresh at the gain that lets a deep network train, unless they are decomposed to an error.

        Raises:
            ValueError: a pattern to skip that fits no layer, no layer left to factorize, or a size that is not allowed.
        """
        options = {name: value for name, value in vars(self).items() if value is not None}
        if self.kind in SPECTRAL:
            options["init"] = "fit" if self.spectrum in (None, "free") else "spread"
        elif self.kind == "lowrank":
            options["init"] = "relu"
        else:
            options["init"] = "kaiming" if self.error is None else "fit"
        factorize(model, **options)

    def __str__(self) -> str:
        if self.kind in SPECTRAL:
            return f"{self.kind} of rank {self.rank}, {self.spectrum} spectrum, {self.form} form"
        sizes = {name: getattr(self, name) for name in SIZES}
        size = ", ".join(f"{name} {value:g}" for name, value in sizes.items() if value is not None)
        return f"{self.kind} of {size}" + (f", {self.form} form" if self.form else "")


def cost(model: nn.Module) -> str:
    """What a network's factored layers cost, in a line: how many, degrees of freedom, and Z."""
    found = summary(model)
    layers = [layer for layer in found.layers if layer.kind != "dense"]
    freedom, elements = (sum(getattr(x, count) for x in layers) for count in ("degrees_of_freedom", "elements"))
    return (
        f"{len(layers)} of {len(found.layers)} layers, {freedom:,} degrees of freedom for {elements:,} elements, "
        f"Z = {found.compression:.1f} % of the network"
    )
