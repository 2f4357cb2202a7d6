"""Distances between a set of samples and a set of data, both as feature vectors (N, d)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["KERNEL_SUBSETS", "feature_moments", "frechet_distance", "frechet_distance_of", "kernel_distance"]

KERNEL_SUBSETS = 100
ROUNDING = 1e-5  # of the largest entry: what a covariance in float32 may lack in symmetry and in zeros


def feature_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (N, d), in float64.

    Raises:
        ValueError: not a matrix of finite numbers with at least 2 rows.
    """
    features = _checked("features", features, at_least=2)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The Fréchet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), a squared 2-Wasserstein.

    With any factors C1 = A A' and C2 = B B' the trace of the root is the nuclear norm of A' B. The root of a product
    is never formed, so that singular covariances (fewer samples than dimensions) cost no digits.

    Args:
        mean1: (d,).
        cov1: (d, d), symmetric and positive semidefinite.
        mean2: (d,).
        cov2: (d, d), symmetric and positive semidefinite.

    Raises:
        ValueError: shapes do not fit, or a covariance is none.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", Journal of Multivariate
    Analysis 1982, eq. (4); as a metric of samples: Heusel et al., NeurIPS 2017 (FID).
    """
    mean1, mean2 = (mean.detach().double().cpu() for mean in (mean1, mean2))
    if mean1.ndim != 1 or mean1.shape != mean2.shape:
        raise ValueError(f"means must be two vectors of one length, got {tuple(mean1.shape)} and {tuple(mean2.shape)}")
    if not (mean1.isfinite().all() and mean2.isfinite().all()):
        raise ValueError("means must be finite, got NaN or infinity")
    factor1, factor2 = _factor("cov1", cov1, len(mean1)), _factor("cov2", cov2, len(mean1))
    shift = (mean1 - mean2).square().sum()
    # |A|_F^2 = tr C1: from the factor, so that equal covariances cancel to the last digit but a few.
    spread = factor1.square().sum() + factor2.square().sum() - 2 * torch.linalg.svdvals(factor1.T @ factor2).sum()
    return max(0.0, float(shift + spread))


def frechet_distance_of(features1: Tensor, features2: Tensor) -> float:
    """`frechet_distance` of the moments of two sets of features (N, d) and (M, d)."""
    return frechet_distance(*feature_moments(features1), *feature_moments(features2))


def kernel_distance(
    features1: Tensor,
    features2: Tensor,
    *,
    subset_size: int = 1000,
    subsets: int = KERNEL_SUBSETS,
    seed: int = 0,
) -> tuple[float, float]:
    """The squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, and its standard error.

    The mean of unbiased estimates on random subsets; it can be negative. The standard error comes from the subsets as
    well (subsampling without replacement): their standard deviation times sqrt(m / (n - m)), for subsets of m of n.

    Args:
        features1: (N, d).
        features2: (M, d).
        subset_size: vectors of either set a subset; at least 2 and fewer than N and M.
        subsets: at least 2.
        seed: of the choice of subsets.

    Raises:
        ValueError: shapes do not fit, features are not finite, or sizes are out of range.

    Source: Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018, eq. (4) and section 4 (KID). The
    standard error: Politis and Romano, Annals of Statistics 1994.
    """
    features1, features2 = _checked("features1", features1), _checked("features2", features2)
    if features1.shape[1] != features2.shape[1]:
        raise ValueError(f"features must have one dimension, got {features1.shape[1]} and {features2.shape[1]}")
    smaller = min(len(features1), len(features2))
    if not 2 <= subset_size < smaller:
        raise ValueError(f"subset_size must be 2 to {smaller - 1} (fewer than either set), got {subset_size}")
    if subsets < 2:
        raise ValueError(f"subsets must be at least 2, got {subsets}")
    generator = torch.Generator().manual_seed(seed)
    estimates = torch.tensor(
        [
            _squared_discrepancy(*(_draw(features, subset_size, generator) for features in (features1, features2)))
            for _ in range(subsets)
        ],
        dtype=torch.float64,
    )
    error = estimates.std().item() * math.sqrt(subset_size / (smaller - subset_size))
    return estimates.mean().item(), error


def _draw(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]


def _squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate from as many x as y, both (m, d)."""
    m = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow_(3)

    within = sum(values.sum() - values.diagonal().sum() for values in (kernel(x, x), kernel(y, y)))
    estimate: float = (within / (m * (m - 1)) - 2 * kernel(x, y).mean()).item()
    return estimate


def _factor(name: str, covariance: Tensor, size: int) -> Tensor:
    """A with covariance = A A'."""
    covariance = covariance.detach().double().cpu()
    if covariance.shape != (size, size):
        raise ValueError(f"{name} must have shape ({size}, {size}), got {tuple(covariance.shape)}")
    asymmetry = (covariance - covariance.T).abs().max()
    if not (covariance.isfinite().all() and asymmetry <= ROUNDING * covariance.abs().max()):
        raise ValueError(f"{name} must be a symmetric matrix of finite numbers")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -ROUNDING * values.abs().max():
        raise ValueError(f"{name} must be positive semidefinite, its least eigenvalue is {values[0].item():.3g}")
    # A zero comes out as rounding, 1e-16 of the largest, whose root of 1e-8 would be seen.
    rounding = size * torch.finfo(values.dtype).eps * values[-1]
    factor: Tensor = vectors * values.where(values > rounding, 0).sqrt()
    return factor


def _checked(name: str, features: Tensor, at_least: int = 1) -> Tensor:
    if features.ndim != 2 or len(features) < at_least:
        raise ValueError(f"{name} must have shape (N, d) with N at least {at_least}, got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return features.detach().double()
