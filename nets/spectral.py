"""Spectra of layers: operator norms of convolutions, and penalties on singular values."""

from ._conv_norm import conv_norm, conv_norm_bound
from ._spectral_penalties import d_optimal, divergence, spectral_penalty

__all__ = ["conv_norm", "conv_norm_bound", "d_optimal", "divergence", "spectral_penalty"]
