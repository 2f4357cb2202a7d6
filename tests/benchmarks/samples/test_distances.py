"""Fréchet and kernel distances: closed forms, other libraries, and what sampling does to them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel

from retract.benchmarks.samples.distances import (
    feature_moments,
    frechet_distance,
    frechet_distance_of,
    kernel_distance,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(d, rank=None, seed=0):
    factor = normal(d, rank or 2 * d, seed=seed)
    return factor @ factor.T


def orthogonal(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


# ---------------------------------------------------------------------------------------------------- moments


def test_moments_are_those_of_numpy():
    features = normal(50, 6) * 3 + 100
    mean, cov = feature_moments(features.float())
    np.testing.assert_allclose(mean, features.float().double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(cov, np.cov(features.float().double().numpy(), rowvar=False), rtol=1e-12, atol=1e-12)
    assert mean.dtype == cov.dtype == torch.float64


# ------------------------------------------------------------------------------------------- Fréchet distance


@pytest.mark.parametrize(("m1", "s1", "m2", "s2"), [(0, 1, 0, 1), (0, 1, 3, 1), (1, 2, -1, 5), (0, 0, 2, 3)])
def test_two_gaussians_on_a_line(m1, s1, m2, s2):
    """Dowson and Landau: (m1 - m2)^2 + (s1 - s2)^2."""
    values = [torch.tensor(value, dtype=torch.float64) for value in ([m1], [[s1**2]], [m2], [[s2**2]])]
    assert frechet_distance(*values) == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-13)


@given(d=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_covariances_that_commute(d, seed):
    """|m1 - m2|^2 + the squared differences of standard deviations along the common axes."""
    axes = orthogonal(d, seed)
    s1, s2 = normal(2, d, seed=seed + 1).abs()
    m1, m2 = normal(2, d, seed=seed + 2)
    cov1, cov2 = (axes @ torch.diag(s**2) @ axes.T for s in (s1, s2))
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)


@given(d=st.integers(1, 10), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_against_the_root_of_scipy(d, seed):
    cov1, cov2 = covariance(d, seed=seed), covariance(d, seed=seed + 1)
    m1, m2 = normal(2, d, seed=seed + 2)
    root = sqrtm((cov1 @ cov2).numpy()).real
    expected = (m1 - m2).square().sum().item() + np.trace(cov1.numpy() + cov2.numpy() - 2 * root)
    assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert frechet_distance(m2, cov2, m1, cov1) == pytest.approx(expected, rel=1e-8, abs=1e-8)


@given(d=st.integers(3, 12), rank=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_singular_covariances_keep_their_digits(d, rank, seed):
    """On orthogonal subspaces the root vanishes; of a covariance and its multiple it is a multiple."""
    axes = orthogonal(2 * d, seed)
    spread1, spread2 = (torch.zeros(2 * d, dtype=torch.float64) for _ in range(2))
    spread1[:rank], spread2[-rank:] = 4, 9
    cov1, cov2 = (axes @ torch.diag(spread) @ axes.T for spread in (spread1, spread2))
    zero = torch.zeros(2 * d, dtype=torch.float64)
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(13 * rank, rel=1e-12)
    assert frechet_distance(zero, cov1, zero, cov1) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, cov1, zero, 2.25 * cov1) == pytest.approx(rank, abs=1e-11)


def test_equal_gaussians_are_at_distance_zero_and_never_below():
    for d in (1, 5, 60):
        cov, mean = covariance(d), normal(d)
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-10 * torch.trace(cov).item()


def test_invariance_under_motions_and_scaling():
    cov1, cov2, (m1, m2) = covariance(6), covariance(6, seed=1), normal(2, 6)
    distance = frechet_distance(m1, cov1, m2, cov2)
    turn, shift = orthogonal(6, 3), normal(6, seed=4)
    turned = [(turn @ m + shift, turn @ cov @ turn.T) for m, cov in ((m1, cov1), (m2, cov2))]
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(3 * m1, 9 * cov1, 3 * m2, 9 * cov2) == pytest.approx(9 * distance, rel=1e-10)


def test_of_features_it_converges_to_that_of_their_distributions():
    x, y = normal(200_000, 3), normal(200_000, 3, seed=1) * torch.tensor([1.0, 2.0, 3.0]) + 1
    assert frechet_distance_of(x, y) == pytest.approx(3 + 1 + 4, rel=0.02)


def test_fewer_samples_than_dimensions():
    x, y = normal(5, 40), normal(7, 40, seed=1)
    expected = frechet_distance(*feature_moments(x), *feature_moments(y))
    assert frechet_distance_of(x, y) == expected > 0
    assert frechet_distance_of(x, x) == pytest.approx(0, abs=1e-10)


def test_half_precision_features_are_computed_with_in_double():
    x, y = normal(60, 4).half(), normal(60, 4, seed=1).half()
    assert frechet_distance_of(x, y) == frechet_distance_of(x.double(), y.double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)), r"one length, got \(2,\) and \(3,\)"),
        ((torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2)), r"cov1 must have shape \(2, 2\)"),
        ((torch.zeros(2), torch.eye(2), torch.zeros(2), -torch.eye(2)), "cov2 must be positive semidefinite"),
        ((torch.zeros(2), torch.tensor([[1.0, 1], [0, 1]]), torch.zeros(2), torch.eye(2)), "cov1 must be a symmetric"),
        ((torch.zeros(2), torch.full((2, 2), math.nan), torch.zeros(2), torch.eye(2)), "cov1 must be a symmetric"),
        ((torch.full((2,), math.nan), torch.eye(2), torch.zeros(2), torch.eye(2)), "means must be finite"),
    ],
)
def test_wrong_gaussians(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 3), "N at least 2"),
        (torch.zeros(0, 3), "N at least 2"),
        (torch.zeros(4), "shape"),
        (torch.tensor([[1.0], [math.inf]]), "finite"),
    ],
)
def test_wrong_features(features, message):
    with pytest.raises(ValueError, match=message):
        feature_moments(features)


# -------------------------------------------------------------------------------------------- kernel distance


def unbiased(x, y):
    """The estimate by scikit-learn's kernel, sums written out."""
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    return (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()


def test_mean_over_all_subsets_is_the_estimate_from_the_whole():
    """Each pair is in as many subsets as any other, so their mean is the estimate from all pairs."""
    x, y = normal(8, 3), normal(8, 3, seed=1) + 0.5
    mean, _ = kernel_distance(x, y, subset_size=7, subsets=2000)
    assert mean == pytest.approx(unbiased(x, y), rel=0.03)


def test_on_copies_of_two_points_in_closed_form():
    """All x equal a and all y equal b: k(a, a) + k(b, b) - 2 k(a, b), whatever the subsets."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])

    def kernel(u, v):
        return (u @ v / 2 + 1) ** 3

    expected = (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).item()
    mean, error = kernel_distance(a.repeat(9, 1), b.repeat(12, 1), subset_size=4)
    assert mean == pytest.approx(expected, rel=1e-12)
    assert error == pytest.approx(0, abs=1e-9)


def test_standard_error_is_the_spread_over_new_samples():
    pairs = [(normal(200, 4, seed=2 * i), normal(200, 4, seed=2 * i + 1) * 1.3) for i in range(60)]
    values, errors = zip(*(kernel_distance(x, y, subset_size=50, subsets=25) for x, y in pairs), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.35)


def test_unbiased_for_equal_distributions():
    pairs = [(normal(60, 3, seed=2 * i), normal(60, 3, seed=2 * i + 1)) for i in range(60)]
    values = [kernel_distance(x, y, subset_size=30, subsets=20)[0] for x, y in pairs]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60)
    assert min(values) < 0 < max(values)


def test_seed_decides_the_subsets_and_nothing_else_is_drawn():
    x, y = normal(50, 3), normal(50, 3, seed=1)
    before = torch.get_rng_state()
    first, again, other = (kernel_distance(x, y, subset_size=10, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(9, 2), torch.zeros(9, 3), {"subset_size": 4}, "one dimension, got 2 and 3"),
        (torch.zeros(9, 2), torch.zeros(5, 2), {"subset_size": 5}, "2 to 4"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"subset_size": 1}, "2 to 8"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"subset_size": 4, "subsets": 1}, "subsets must be at least 2"),
        (torch.zeros(9, 2), torch.full((9, 2), math.nan), {"subset_size": 4}, "features2 must be finite"),
    ],
)
def test_wrong_kernel_arguments(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, y, **options)
