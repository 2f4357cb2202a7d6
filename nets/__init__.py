"""What a user adds to a network: which of its weights live on which manifold, and networks that know."""

from importlib.metadata import version

from . import cnn, compress, gan, init, layers, parametrizations, spectral
from ._canonical import CANONICAL_NORM
from .compress import decompress, factorize
from .fixed_rank import fixed_rank_layer
from .frobenius_decay import factor_pairs, frobenius_groups, frobenius_penalty
from .init.calibration import calibrate
from .invariance import Invariance, find_scale_invariant, register_scale_invariant, scale_invariant_groups
from .parametrizations import canonical_weight_norm, manifold_groups
from .summary import summary

__all__ = [
    "CANONICAL_NORM",
    "Invariance",
    "calibrate",
    "canonical_weight_norm",
    "cnn",
    "compress",
    "decompress",
    "factor_pairs",
    "factorize",
    "find_scale_invariant",
    "fixed_rank_layer",
    "frobenius_groups",
    "frobenius_penalty",
    "gan",
    "init",
    "layers",
    "manifold_groups",
    "parametrizations",
    "register_scale_invariant",
    "scale_invariant_groups",
    "spectral",
    "summary",
]

__version__ = version("retract")
