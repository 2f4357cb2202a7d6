"""How good generated images are, by the features and the classes of a classifier trained on the same data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from .classes import class_divergence, classifier_score, estimated_shares, mode_coverage
from .classifier import FeatureClassifier, feature_classifier
from .distances import feature_moments, frechet_distance, kernel_distance
from .neighbours import neighbour_metrics
from .statistics import data_statistics

__all__ = ["SampleMetrics", "evaluate_samples", "to_bytes"]

SUBSET = 1000  # of kernel distances, as KID's
FEWEST = 10


@dataclass(frozen=True)
class SampleMetrics:
    """Metrics of generated images, and what they were measured with.

    Distances are in the features of the classifier: figures of different classifiers do not compare, nor do figures of
    different numbers of samples (the Fréchet distance of finite sets is biased upwards; the four by neighbours depend
    on the sizes).

    Args:
        samples: how many there were.
        references: how many images, of samples and of data alike, the four metrics by nearest neighbours saw.
        neighbours: the k of these.
        split: of the data.
        frechet_distance: to all images of the split; less is better (`.distances.frechet_distance`).
        kernel_distance: the unbiased squared discrepancy; less is better (`.distances.kernel_distance`).
        kernel_distance_error: its standard error.
        precision: more is better, as with the next three (`.neighbours.NeighbourMetrics`).
        recall: see there.
        density: see there.
        coverage: see there.
        mode_coverage: the share of classes that the samples have not lost (`.classes.mode_coverage`).
        class_divergence: of the samples' classes from the data's, in nats; less is better
            (`.classes.class_divergence`).
        classifier_score: 1 to the number of classes; more is better (`.classes.classifier_score`).
        classifier: name of the network.
        classifier_hash: SHA-256 of its weights.
        classifier_accuracy: on the test images.
    """

    samples: int
    references: int
    neighbours: int
    split: str
    frechet_distance: float
    kernel_distance: float
    kernel_distance_error: float
    precision: float
    recall: float
    density: float
    coverage: float
    mode_coverage: float
    class_divergence: float
    classifier_score: float
    classifier: str
    classifier_hash: str
    classifier_accuracy: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate_samples(
    samples: Tensor,
    data: Dataset,
    *,
    classifier: FeatureClassifier | None = None,
    split: str = "train",
    neighbours: int = 5,
    seed: int = 0,
) -> SampleMetrics:
    """Compare samples with the images of a data set.

    The same samples give the same figures; torch's random numbers are neither used nor touched.

    Args:
        samples: images (N, C, H, W) of the data's shape, at least 10: floats in [-1, 1], which are rounded to 256
            levels as the data are, or uint8.
        data: the data set.
        classifier: of `feature_classifier`; None trains it, or takes it from the cache.
        split: "train" or "test": which images to compare with.
        neighbours: k of precision, recall, density and coverage.
        seed: of random subsets.

    Raises:
        ValueError: samples are too few, of another shape or dtype, or not in [-1, 1]; or another argument is wrong.
    """
    images = to_bytes(samples)
    if len(images) < FEWEST or images.shape[1:] != data.image_shape:
        wanted = f"(N, {', '.join(map(str, data.image_shape))}) with N at least {FEWEST}"
        raise ValueError(f"samples must have shape {wanted}, got {tuple(samples.shape)}")
    if classifier is None:
        classifier = feature_classifier(data, device=samples.device)
    statistics = data_statistics(data, classifier, split)
    features, logits = classifier.features_and_logits(images)

    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    references = min(len(features), len(statistics.features))
    near = neighbour_metrics(statistics.features[:references], features[order[:references]], neighbours=neighbours)
    discrepancy, error = kernel_distance(
        statistics.features, features, subset_size=min(SUBSET, references // 2), seed=seed
    )
    shares = estimated_shares(logits, statistics.assignment_rates)
    return SampleMetrics(
        samples=len(features),
        references=references,
        neighbours=neighbours,
        split=split,
        frechet_distance=frechet_distance(*feature_moments(features), statistics.mean, statistics.covariance),
        kernel_distance=discrepancy,
        kernel_distance_error=error,
        **asdict(near),
        mode_coverage=mode_coverage(shares, statistics.class_shares),
        class_divergence=class_divergence(shares, statistics.class_shares),
        classifier_score=classifier_score(logits),
        classifier=classifier.name,
        classifier_hash=classifier.hash,
        classifier_accuracy=classifier.accuracy,
    )


def to_bytes(samples: Tensor) -> Tensor:
    """Images as uint8: -1 becomes 0, 1 becomes 255; uint8 stays as it is.

    Raises:
        ValueError: floats outside [-1, 1] or NaN, or another dtype.
    """
    if samples.dtype == torch.uint8:
        return samples
    if not samples.is_floating_point():
        raise ValueError(f"samples must be uint8 or floats in [-1, 1], got {samples.dtype}")
    if not (samples.abs() <= 1).all():
        raise ValueError("samples must be in [-1, 1], got values outside or NaN")
    return samples.detach().float().add(1).mul(127.5).round().to(torch.uint8)
