"""Which layers of a network a run replaces by factored ones of controlled spectrum, as its options say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from retract.nets.compress import factorize
from retract.nets.summary import summary

__all__ = ["FORMS", "KINDS", "OPTIONS", "SPECTRA", "Factorization", "cost", "fill_in"]

KINDS = ("svdp", "sttp")
FORMS = ("householder", "stiefel")
SPECTRA = ("identity", "free", "lipschitz", "bounded")
OPTIONS = ("rank", "spectrum", "form", "skip")  # those that mean something only with --factorize
DEFAULTS = {"spectrum": "free", "form": "householder"}


def fill_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the defaults of a factorization filled in, if there is to be one.

    Raises:
        ValueError: an unknown name, ``rank`` missing, or an option that needs ``factorize`` without it.
    """
    chosen = dict(options)
    if chosen["factorize"] is None:
        if given := [f"--{name}" for name in OPTIONS if chosen[name] is not None]:
            raise ValueError(f"{' and '.join(given)} given without --factorize {' or '.join(KINDS)}")
        return chosen
    for name, default in DEFAULTS.items():
        chosen[name] = default if chosen[name] is None else chosen[name]
    for name, allowed in (("factorize", KINDS), ("spectrum", SPECTRA), ("form", FORMS)):
        if chosen[name] not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {chosen[name]!r}")
    if chosen["rank"] is None:
        raise ValueError(f"--factorize {chosen['factorize']} needs --rank, the highest rank of a layer")
    return chosen


@dataclass(frozen=True)
class Factorization:
    """What `retract.nets.factorize` is asked to do.

    ``rank`` is the highest of a layer: smaller layers take what they can. ``skip`` are patterns of names of layers
    that stay dense.
    """

    kind: str
    rank: int
    spectrum: str = "free"
    form: str = "householder"
    skip: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Factorization | None:
        """What options that `fill_in` has filled in ask for; None if they ask for none."""
        if options.get("factorize") is None:  # runs before there were factored layers do not say so
            return None
        skip = tuple(pattern.strip() for pattern in (options["skip"] or "").split(",") if pattern.strip())
        return cls(options["factorize"], options["rank"], options["spectrum"], options["form"], skip)

    def apply(self, model: nn.Module) -> None:
        """Replace the weights of ``model`` in place.

        Frames are those of the present weights. So are singular values where they are free; the others are spread
        over what is allowed, since those of random weights would mostly be cut to the same bound.

        Raises:
            ValueError: a pattern to skip that fits no layer, or no layer left to factorize.
        """
        options: dict[str, Any] = {**vars(self), "init": "fit" if self.spectrum == "free" else "spread"}
        factorize(model, **options)

    def __str__(self) -> str:
        return f"{self.kind} of rank {self.rank}, {self.spectrum} spectrum, {self.form} form"


def cost(model: nn.Module) -> str:
    """What a network's factored layers cost, in a line: how many, degrees of freedom, and Z."""
    found = summary(model)
    layers = [layer for layer in found.layers if layer.kind != "dense"]
    freedom, elements = (sum(getattr(x, count) for x in layers) for count in ("degrees_of_freedom", "elements"))
    return (
        f"{len(layers)} of {len(found.layers)} layers, {freedom:,} degrees of freedom for {elements:,} elements, "
        f"Z = {found.compression:.1f} % of the network"
    )
