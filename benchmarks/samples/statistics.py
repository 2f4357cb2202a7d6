"""What samples are compared with: the statistics of a data set in the features of its classifier, cached."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..content_cache import content_hash, data_hash, load_or_compute
from ..data import Dataset
from .classes import assignment_rates
from .classifier import FeatureClassifier
from .distances import feature_moments

__all__ = ["DataStatistics", "data_statistics", "split_of"]

VERSION = "1"  # of what is cached
REFERENCE = 10_000  # feature vectors kept for distances between single images


@dataclass(frozen=True)
class DataStatistics:
    """Of one split of a data set, by one classifier.

    ``mean`` (d,) and ``covariance`` (d, d), float64, of all its images; ``features`` (min(N, 10,000), d) of images
    drawn at random, in random order; ``class_shares`` (classes,), float64, of its labels; ``assignment_rates``: how the
    classifier mistakes the classes of the test images (`.classes.assignment_rates`).
    """

    mean: Tensor
    covariance: Tensor
    features: Tensor
    class_shares: Tensor
    assignment_rates: Tensor


def data_statistics(data: Dataset, classifier: FeatureClassifier, split: str = "train") -> DataStatistics:
    """The statistics of the "train" or "test" split, from the cache when these data were seen by this classifier.

    Raises:
        ValueError: an unknown split, or one with fewer than 2 images.
    """
    split_of(data, split)  # an unknown one is an error before it is looked for in the cache
    kept = repr([field.name for field in fields(DataStatistics)])
    key = content_hash("statistics", VERSION, kept, split, classifier.hash, data_hash(data))
    saved = load_or_compute("statistics", key, lambda: _compute(data, classifier, split))
    return DataStatistics(**saved)


def split_of(data: Dataset, split: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, C, H, W), and labels (N,) of the "train" or the "test" split.

    Raises:
        ValueError: an unknown split.
    """
    splits = {"train": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}")
    return splits[split]


def _compute(data: Dataset, classifier: FeatureClassifier, split: str) -> dict[str, Tensor]:
    images, labels = split_of(data, split)
    features, _ = classifier.features_and_logits(images)
    _, test_logits = classifier.features_and_logits(data.test_images)
    mean, covariance = feature_moments(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return {
        "mean": mean,
        "covariance": covariance,
        "features": features[order[:REFERENCE]],
        "class_shares": torch.bincount(labels, minlength=len(data.classes)).double() / len(labels),
        "assignment_rates": assignment_rates(test_logits, data.test_labels),
    }
