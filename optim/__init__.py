"""Optimizers that move weights along their manifolds, which they know through its verbs alone."""

from importlib.metadata import version

from .clip import clip_grad_norm_
from .frobenius_decay import FrobeniusDecay
from .psi import PSISGD
from .psi_adam import PSIAdam
from .psi_angular import PSIAngular
from .psi_descent import PSIGD
from .riemannian import RiemannianSGD
from .riemannian_descent import RiemannianGD

__all__ = [
    "PSIGD",
    "PSISGD",
    "FrobeniusDecay",
    "PSIAdam",
    "PSIAngular",
    "RiemannianGD",
    "RiemannianSGD",
    "clip_grad_norm_",
]
__version__ = version("retract")
