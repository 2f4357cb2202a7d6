"""Precision, recall, density and coverage: by hand, by scikit-learn, and by their expectation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from retract.benchmarks.samples import neighbours as sample_neighbours
from retract.benchmarks.samples.neighbours import NeighbourMetrics, neighbour_metrics


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def by_definition(data, samples, k):
    """Scikit-learn's distances and neighbours, and the definitions as they stand in the papers."""

    def radii(vectors):
        return NearestNeighbors(n_neighbors=k).fit(vectors).kneighbors()[0][:, -1]  # without a vector itself

    distances = pairwise_distances(data, samples)
    in_data_ball = distances <= radii(data)[:, None]
    return NeighbourMetrics(
        precision=in_data_ball.any(0).mean(),
        recall=(distances <= radii(samples)[None, :]).any(1).mean(),
        density=in_data_ball.sum() / (k * len(samples)),
        coverage=in_data_ball.any(1).mean(),
    )


def close(found, expected):
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


def test_by_hand_on_a_line():
    """Data 0, 1, 3 with k = 1 reach 1, 1, 2: intervals [-1, 1], [0, 2], [1, 5].

    Samples 0.5, 1.5, 10, 30 reach 1, 1, 8.5, 20: [-0.5, 1.5], [0.5, 2.5], [1.5, 18.5], [10, 50].
    """
    found = neighbour_metrics(column(0, 1, 3), column(0.5, 1.5, 10, 30), neighbours=1)
    # 0.5 lies in two balls of data, 1.5 in two, 10 and 30 in none.
    close(found, NeighbourMetrics(precision=2 / 4, recall=3 / 3, density=4 / 4, coverage=3 / 3))
    found = neighbour_metrics(column(0, 1, 3), column(100, 101), neighbours=1)
    close(found, NeighbourMetrics(0, 0, 0, 0))


@given(
    n=st.integers(8, 40),
    m=st.integers(8, 40),
    d=st.integers(1, 30),
    k=st.integers(1, 7),
    block=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_against_scikit_learn(n, m, d, k, block, seed):
    data, samples = normal(n, d, seed=seed), normal(m, d, seed=seed + 1) * 1.2 + 0.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_neighbours, "BLOCK", block)
        close(neighbour_metrics(data, samples, neighbours=k), by_definition(data.numpy(), samples.numpy(), k))


def test_samples_like_the_data():
    """Coverage and recall have an expectation of their own [Naeem et al., section 3.3], density that of 1."""
    n, k, repeats = 300, 5, 8
    found = [neighbour_metrics(normal(n, 8, seed=2 * i), normal(n, 8, seed=2 * i + 1)) for i in range(repeats)]
    coverage = 1 - math.prod((n - j) / (2 * n - j) for j in range(1, k + 1))
    assert sum(each.coverage for each in found) / repeats == pytest.approx(coverage, abs=0.01)
    assert sum(each.density for each in found) / repeats == pytest.approx(1, abs=0.05)


def test_exchanging_the_sets_exchanges_precision_and_recall():
    data, samples = normal(50, 3), normal(60, 3, seed=1) * 0.5
    found, exchanged = neighbour_metrics(data, samples), neighbour_metrics(samples, data)
    assert (found.precision, found.recall) == (exchanged.recall, exchanged.precision)
    assert found.precision > found.recall


def test_the_data_themselves():
    """Each sample is in its own ball and in those of which it is a neighbour: k + 1 balls on average."""
    data = normal(40, 5)
    close(neighbour_metrics(data, data, neighbours=4), NeighbourMetrics(1, 1, 5 / 4, 1))


def test_one_image_over_and_over():
    """A generator collapsed to one good image: all precision, no recall."""
    data = normal(60, 4)
    found = neighbour_metrics(data, data[7].repeat(60, 1))
    assert found.precision == 1
    assert found.recall <= 1 / 60  # the image itself, if rounding lets it lie in a ball of radius 0
    assert found.coverage < 0.4


def test_far_from_the_origin_distances_keep_their_digits():
    data, samples = normal(40, 30), normal(40, 30, seed=1)
    near, far = (neighbour_metrics((data + shift).float(), (samples + shift).float()) for shift in (0, 1000))
    assert near == far


@pytest.mark.parametrize(
    ("data", "samples", "k", "message"),
    [
        (torch.zeros(9), torch.zeros(9, 2), 1, "data must be finite, of shape"),
        (torch.zeros(9, 2), torch.full((9, 2), math.nan), 1, "samples must be finite"),
        (torch.zeros(9, 2), torch.zeros(9, 3), 1, "one dimension, got 2 and 3"),
        (torch.zeros(9, 2), torch.zeros(5, 2), 5, "neighbours must be 1 to 4"),
        (torch.zeros(9, 2), torch.zeros(9, 2), 0, "neighbours must be 1 to 8"),
        (torch.zeros(0, 2), torch.zeros(0, 2), 1, "neighbours must be 1 to -1"),
    ],
)
def test_wrong_arguments(data, samples, k, message):
    with pytest.raises(ValueError, match=message):
        neighbour_metrics(data, samples, neighbours=k)
