"""Manifolds: geometry only. Points are tensors or tuples of tensors; verbs carry geoopt's names."""

from importlib.metadata import version

from . import diagnostics
from .oblique import Oblique
from .psi import PSI
from .spectral import SVDSpectral
from .spectrum import Bounded, Free, Identity, Lipschitz
from .stiefel import Stiefel
from .tensor_train import STTP

__all__ = [
    "PSI",
    "STTP",
    "Bounded",
    "Free",
    "Identity",
    "Lipschitz",
    "Oblique",
    "SVDSpectral",
    "Stiefel",
    "diagnostics",
]
__version__ = version("retract")
