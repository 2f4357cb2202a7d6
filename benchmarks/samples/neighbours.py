"""How well samples lie among the data, and data among the samples, by nearest neighbours in feature space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NeighbourMetrics", "neighbour_metrics"]

BLOCK = 1000  # rows of a distance matrix in memory at a time


@dataclass(frozen=True)
class NeighbourMetrics:
    """Fidelity and diversity of samples. The ball of a vector reaches to its k-th nearest neighbour of its own set.

    ``precision``: the share of samples inside the ball of some data vector. ``recall``: the share of data inside the
    ball of some sample. ``density``: how many data balls a sample lies in, over k: 1 on average for samples like the
    data, not bounded by 1. ``coverage``: the share of data balls with a sample inside; for as many samples as data, all
    alike, about 1 - 2^-k.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_metrics(data: Tensor, samples: Tensor, *, neighbours: int = 5) -> NeighbourMetrics:
    """Precision, recall, density and coverage of samples.

    All four depend on the sizes of the sets: compare figures of equal sizes only.

    Args:
        data: features (N, d).
        samples: features (M, d).
        neighbours: k; fewer than N and M.

    Raises:
        ValueError: shapes do not fit, features are not finite, or k is out of range.

    Source: precision and recall: Kynkäänniemi et al., NeurIPS 2019, eqs. (1) and (2); density and coverage: Naeem et
    al., ICML 2020, eqs. (3) and (5).
    """
    for name, features in (("data", data), ("samples", samples)):
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError(f"{name} must be finite, of shape (N, d), got shape {tuple(features.shape)}")
    if data.shape[1] != samples.shape[1]:
        raise ValueError(f"data and samples must have one dimension, got {data.shape[1]} and {samples.shape[1]}")
    most = min(len(data), len(samples)) - 1
    if not 1 <= neighbours <= most:
        raise ValueError(f"neighbours must be 1 to {most} (fewer than either set), got {neighbours}")

    # float64: distances are differences of squares, which would cost float32 half its digits
    data, samples = data.detach().double(), samples.detach().double()
    data_radii, sample_radii = (_radii(features, neighbours) for features in (data, samples))
    balls = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)  # data balls that each sample is in
    covered, recalled = [], []
    for block, radii in zip(data.split(BLOCK), data_radii.split(BLOCK), strict=True):
        distances = torch.cdist(block, samples)
        inside = distances <= radii[:, None]
        balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances <= sample_radii).any(1))
    return NeighbourMetrics(
        precision=_share(balls > 0),
        recall=_share(torch.cat(recalled)),
        density=balls.double().mean().item() / neighbours,
        coverage=_share(torch.cat(covered)),
    )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each vector (N, d) to its k-th nearest neighbour, itself not counted: (N,)."""
    count = neighbours + 1
    nearest = [torch.cdist(block, features).topk(count, largest=False).values[:, -1] for block in features.split(BLOCK)]
    return torch.cat(nearest)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
