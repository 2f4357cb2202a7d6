"""Weights of chosen rank and spectrum, and weights of rank-one terms, as parametrizations of torch's layers."""

from .canonical import Canonical, canonical_weight_norm, put_terms
from .models import canonical_weights, manifold_groups, shared_frames, spectral_weights
from .spectral import STTP, SVDP, sttp, svdp
from .spectral_regularization import SpectralRegularization, spectral_regularization

__all__ = [
    "STTP",
    "SVDP",
    "Canonical",
    "SpectralRegularization",
    "canonical_weight_norm",
    "canonical_weights",
    "manifold_groups",
    "put_terms",
    "shared_frames",
    "spectral_regularization",
    "spectral_weights",
    "sttp",
    "svdp",
]
