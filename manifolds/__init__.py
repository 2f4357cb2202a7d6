"""Manifolds: geometry only. Points are tensors or tuples of tensors; verbs carry geoopt's names."""

from importlib.metadata import version

from . import canonical, diagnostics
from .grassmann import Grassmann
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
    "Grassmann",
    "Identity",
    "Lipschitz",
    "Oblique",
    "SVDSpectral",
    "Stiefel",
    "canonical",
    "diagnostics",
]
__version__ = version("retract")
