"""What a user adds to a network: which of its weights live on which manifold, and networks that know."""

from importlib.metadata import version

from . import cnn
from ._canonical import CANONICAL_NORM
from .invariance import Invariance, find_scale_invariant, register_scale_invariant, scale_invariant_groups

__all__ = [
    "CANONICAL_NORM",
    "Invariance",
    "cnn",
    "find_scale_invariant",
    "register_scale_invariant",
    "scale_invariant_groups",
]

__version__ = version("retract")
