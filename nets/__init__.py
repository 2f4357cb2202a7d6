"""What a user adds to a network: which of its weights live on which manifold, and networks that know."""

from importlib.metadata import version

from . import cnn, gan, layers, parametrizations, spectral
from ._canonical import CANONICAL_NORM
from .compress import decompress, factorize
from .invariance import Invariance, find_scale_invariant, register_scale_invariant, scale_invariant_groups
from .parametrizations import spectral_groups
from .summary import summary

__all__ = [
    "CANONICAL_NORM",
    "Invariance",
    "cnn",
    "decompress",
    "factorize",
    "find_scale_invariant",
    "gan",
    "layers",
    "parametrizations",
    "register_scale_invariant",
    "scale_invariant_groups",
    "spectral",
    "spectral_groups",
    "summary",
]

__version__ = version("retract")
