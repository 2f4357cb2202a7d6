"""Classes of samples: shares corrected for the classifier's mistakes, modes, divergence, score."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F

from retract.benchmarks.samples.classes import (
    assignment_rates,
    class_divergence,
    classifier_score,
    estimated_shares,
    mode_coverage,
)


def logits_of(assigned, classes):
    """Logits of a classifier that assigns these classes."""
    return F.one_hot(torch.as_tensor(assigned), classes).double()


def test_rates_are_the_confusion_matrix_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels, assigned = torch.randint(6, (2, 200), generator=generator)
    expected = confusion_matrix(labels, assigned, normalize="true").T
    np.testing.assert_allclose(assignment_rates(logits_of(assigned, 6), labels), expected, atol=1e-15)


def test_rates_of_a_class_without_images():
    rates = assignment_rates(logits_of([0, 1, 0], 3), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(rates, torch.tensor([[2 / 3, 0, 0], [1 / 3, 1, 0], [0, 0, 1]]).double())


@given(classes=st.integers(2, 8), wrong=st.integers(0, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_shares_are_those_before_the_mistakes(classes, wrong, seed):
    """Assignments that are exactly the mistakes of some shares lead back to these, also where a class is missing."""
    counts = np.random.default_rng(seed).integers(0, 5, classes)
    counts[0] += 1
    # Of a hundred images of class j so many are taken for class j + 1.
    assigned = [[j] * (100 - wrong) + [(j + 1) % classes] * wrong for j in range(classes)]
    labels = torch.arange(classes).repeat_interleave(100)
    rates = assignment_rates(logits_of(np.concatenate(assigned), classes), labels)
    samples = np.concatenate([assigned[j] * counts[j] for j in range(classes)]).astype(int)
    np.testing.assert_allclose(estimated_shares(logits_of(samples, classes), rates), counts / counts.sum(), atol=1e-9)


def test_a_lost_class_is_seen_through_the_mistakes():
    """A third of all dogs are taken for cats: dogs alone are one class, not two."""
    rates = torch.tensor([[0.9, 1 / 3], [0.1, 2 / 3]]).double()
    dogs = logits_of([0] * 40 + [1] * 80, 2)
    np.testing.assert_allclose(estimated_shares(dogs, rates), [0, 1], atol=1e-7)
    uncorrected = estimated_shares(dogs, torch.eye(2).double())
    np.testing.assert_allclose(uncorrected, [1 / 3, 2 / 3])


def test_shares_that_no_mistakes_explain_stay_shares():
    rates = torch.tensor([[0.6, 0.4], [0.4, 0.6]]).double()
    found = estimated_shares(logits_of([0] * 10, 2), rates)
    np.testing.assert_allclose(found, [1, 0], atol=1e-12)


def test_divergence_is_that_of_scipy():
    generator = np.random.default_rng(0)
    for _ in range(20):
        p, q = generator.dirichlet(np.full(6, 0.3), size=2)
        found = class_divergence(torch.from_numpy(p), torch.from_numpy(q))
        assert found == pytest.approx(jensenshannon(p, q) ** 2, abs=1e-12)


def test_divergence_is_from_zero_to_log_two():
    one, other = torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0, 0, 1.0, 0]).double()
    assert class_divergence(one, one) == 0
    assert class_divergence(one, other) == pytest.approx(math.log(2))


def test_mode_coverage_by_hand():
    data_shares = torch.tensor([0.5, 0.4, 0.1, 0.0])
    assert mode_coverage(torch.tensor([0.5, 0.4, 0.1, 0.0]), data_shares) == 1
    assert mode_coverage(torch.tensor([0.88, 0.09, 0.03, 0.0]), data_shares) == 1
    assert mode_coverage(torch.tensor([0.1, 0.8, 0.1, 0.0]), data_shares) == 1  # a fifth of its share is enough
    assert mode_coverage(torch.tensor([0.88, 0.11, 0.01, 0.0]), data_shares) == pytest.approx(2 / 3)
    assert mode_coverage(torch.tensor([0.97, 0.03, 0.0, 0.0]), data_shares) == pytest.approx(1 / 3)
    assert mode_coverage(torch.tensor([0.0, 0.0, 0.0, 1.0]), data_shares) == 0


def test_classifier_score_by_hand_and_by_scipy():
    sure = torch.eye(7).repeat(3, 1) * 1000
    assert classifier_score(sure) == pytest.approx(7)
    assert classifier_score(sure[:1].expand(9, -1)) == pytest.approx(1)
    assert classifier_score(torch.zeros(9, 7)) == pytest.approx(1)
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    given = logits.softmax(1).numpy()
    expected = np.exp(np.mean([entropy(row, given.mean(0)) for row in given]))
    assert classifier_score(logits) == pytest.approx(expected, rel=1e-12)
