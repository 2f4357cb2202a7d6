"""Statistics of data: what they are, and that the cache gives those of the right data, split and classifier."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from retract.benchmarks.data import load
from retract.benchmarks.samples import statistics as sample_statistics
from retract.benchmarks.samples.classes import assignment_rates
from retract.benchmarks.samples.classifier import FeatureClassifier
from retract.benchmarks.samples.statistics import data_statistics
from retract.nets.cnn import digitsnet


@pytest.fixture(scope="module")
def data():
    return load("digits").subset(200)


@pytest.fixture(scope="module")
def classifier(data):
    torch.manual_seed(0)
    return FeatureClassifier("digitsnet", digitsnet().eval().requires_grad_(False), data.normalizer(), "a", 0.1)


@pytest.fixture
def computations(monkeypatch, own_cache):
    """How many images each computation so far has seen."""
    sizes = []
    compute = sample_statistics._compute

    def counted(data, classifier, split):
        sizes.append(len(sample_statistics.split_of(data, split)[0]))
        return compute(data, classifier, split)

    monkeypatch.setattr(sample_statistics, "_compute", counted)
    return sizes


@pytest.mark.parametrize("split", ["train", "test"])
def test_statistics_are_those_of_the_features(data, classifier, own_cache, split):
    images = data.train_images if split == "train" else data.test_images
    labels = data.train_labels if split == "train" else data.test_labels
    features, _ = classifier.features_and_logits(images)
    found = data_statistics(data, classifier, split)
    torch.testing.assert_close(found.mean, features.double().mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(features.double().T))
    assert {tuple(row) for row in found.features.tolist()} == {tuple(row) for row in features.tolist()}
    assert not torch.equal(found.features, features)  # in random order: data sets are sorted by class at times
    torch.testing.assert_close(found.class_shares, F.one_hot(labels, 10).double().mean(0))
    _, test_logits = classifier.features_and_logits(data.test_images)
    assert torch.equal(found.assignment_rates, assignment_rates(test_logits, data.test_labels))


def test_at_most_so_many_features_are_kept(data, classifier, own_cache, monkeypatch):
    every = data_statistics(data, classifier)
    monkeypatch.setattr(sample_statistics, "REFERENCE", 30)
    monkeypatch.setattr(sample_statistics, "VERSION", "another")
    few = data_statistics(data, classifier)
    assert torch.equal(few.features, every.features[:30])
    assert torch.equal(few.mean, every.mean)


def test_computed_once_for_each_of_data_split_classifier_and_version(data, classifier, computations, monkeypatch):
    first, again = data_statistics(data, classifier), data_statistics(data, classifier)
    assert computations == [200]
    assert torch.equal(first.covariance, again.covariance) and torch.equal(first.features, again.features)
    data_statistics(data, classifier, "test")
    data_statistics(data, replace(classifier, hash="b"))
    data_statistics(replace(data, train_images=data.train_images.flip(3)), classifier)
    monkeypatch.setattr(sample_statistics, "VERSION", "another")
    data_statistics(data, classifier)
    assert computations == [200, 450, 200, 200, 200]


def test_damaged_statistics_are_computed_again(data, classifier, computations, own_cache):
    mean = data_statistics(data, classifier).mean
    (path,) = (own_cache / "statistics").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.equal(data_statistics(data, classifier).mean, mean)
    assert len(computations) == 2


def test_unknown_split(data, classifier):
    with pytest.raises(ValueError, match="split must be one of train, test, got 'validation'"):
        data_statistics(data, classifier, "validation")
