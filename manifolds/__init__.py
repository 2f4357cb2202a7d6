"""Manifolds: geometry only. Points are tensors or tuples of tensors; verbs carry geoopt's names."""

from importlib.metadata import version

from . import diagnostics
from .oblique import Oblique
from .psi import PSI
from .stiefel import Stiefel

__all__ = ["PSI", "Oblique", "Stiefel", "diagnostics"]
__version__ = version("retract")
