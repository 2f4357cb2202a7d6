"""Retractions of SVDSpectral: the nearest allowed matrix, short steps, points of lower rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds import low_rank
from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Bounded, Free, Identity
from tests.manifolds.spectral_points import (
    SHAPES,
    close,
    dense,
    randn,
    random_like,
    retractions,
    rng,
    scaled,
    shapes,
    spectra,
)


@spectra
@settings(max_examples=25, deadline=None)
@given(shape=shapes, length=st.floats(-6, 3).map(lambda e: 10**e), seed=st.integers(0, 2**31))
def test_svd_retraction_is_the_nearest_allowed_matrix(spectrum, shape, length, seed):
    m, n, r = shape
    manifold = SVDSpectral(r, spectrum)
    x = manifold.random(m, n, dtype=torch.float64, generator=rng(seed))
    u = scaled(length, manifold.proju(x, random_like(x, seed + 1)))
    y = manifold.retr(x, u)
    moved = manifold.embed(x) + dense(manifold, x, u)
    nearest = manifold.embed(manifold.project(moved))
    allowed = 1e-12 * (1 + length)
    # several matrices may be nearest, to rounding, where values r and r + 1 coincide or all vanish
    assert abs((manifold.embed(y) - moved).norm() - (nearest - moved).norm()) <= allowed
    assert manifold.check_point_on_manifold(y, explain=True, atol=1e-12) == (True, None)


@spectra
@retractions
@pytest.mark.parametrize("shape", SHAPES)
def test_short_steps_move_factors_little_and_keep_signs(spectrum, retraction, shape):
    m, n, r = shape
    manifold = SVDSpectral(r, spectrum, retraction=retraction)
    x = manifold.random(m, n, dtype=torch.float64, generator=rng())
    u = manifold.proju(x, random_like(x))
    stayed = manifold.retr(x, scaled(0.0, u))
    for a, b in zip(stayed, x, strict=True):
        close(a, b, atol=1e-13)
    y = manifold.retr(x, scaled(1e-6, u))
    assert max(float((a - b).abs().max()) for a, b in zip(x, y, strict=True)) <= 1e-4
    # a unit step turns columns, but never so that one faces the other way
    y = manifold.retr(x, u)
    assert bool(((x[0] * y[0]).sum(0) >= 0).all())
    assert bool((y[1].diff() <= 0).all())


@pytest.mark.parametrize("frames", ["svd", "qr"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rank_deficient_matrices_are_retracted_to(rank, frames):
    """W + dW of rank below r: the missing frame vectors are orthonormal ones all the same."""
    for spectrum in (Free(), Bounded(0.1, 5.0), Identity()):
        manifold = SVDSpectral(3, spectrum, retraction=frames)
        x = manifold.random(6, 5, dtype=torch.float64, generator=rng())
        drop = torch.arange(3) >= rank
        y = manifold.retr(x, (torch.zeros_like(x[0]), -x[1] * drop, torch.zeros_like(x[2])))
        assert manifold.check_point_on_manifold(y, explain=True, atol=1e-13) == (True, None)
        expected = spectrum.project(torch.where(drop, 0.0, x[1]))
        close(y[1].sort().values, expected.sort().values)


@retractions
def test_a_point_of_lower_rank_has_finite_verbs_and_gets_its_rank_back(retraction):
    manifold = SVDSpectral(3, retraction=retraction)
    left, s, right = manifold.random(6, 5, dtype=torch.float64, generator=rng())
    x = left, s * torch.tensor([1.0, 0.0, 0.0]), right
    vectors = [
        manifold.tangent(x, randn(6, 5)),
        manifold.proju(x, random_like(x)),
        manifold.egrad2rgrad(x, random_like(x)),
    ]
    for u in vectors:
        assert all(bool(torch.isfinite(t).all()) for t in u)
        assert manifold.check_vector_on_tangent(x, u, atol=1e-12)
        assert not u[0][:, 1:].any() and not u[2][:, 1:].any()
        y, carried = manifold.retr_transp(x, u, u)
        assert manifold.check_point_on_manifold(y, atol=1e-12)
        assert all(bool(torch.isfinite(t).all()) for t in carried)
    assert y[1].min() > 1e-3


def test_fast_retraction_needs_no_frame_of_the_update(monkeypatch):
    """The speed of a step rests on this: an ordinary one takes no QR decomposition but for triangular factors."""
    manifold = SVDSpectral(4)
    x = manifold.random(20, 30, generator=rng())
    u = scaled(0.1, manifold.proju(x, random_like(x)))
    expected = manifold.retr(x, u)
    monkeypatch.setattr(low_rank, "_svd_of_update_by_qr", None)
    assert all(torch.equal(a, b) for a, b in zip(manifold.retr(x, u), expected, strict=True))
    q, p = (torch.linalg.qr(randn(4, 4, seed=seed).float()).Q for seed in (1, 2))
    nearly_singular = x[0] @ (q * torch.tensor([1.0, 0.5, 0.1, 1e-8]) @ p) @ x[2].mT
    step = manifold.tangent(x, nearly_singular - manifold.embed(x) + 1e-8 * torch.randn(20, 30, generator=rng()))
    with pytest.raises(TypeError):
        manifold.retr(x, step)
    monkeypatch.undo()
    assert manifold.check_point_on_manifold(manifold.retr(x, step), explain=True, atol=2e-6) == (True, None)


@pytest.mark.parametrize("algorithm", [low_rank.svd_of_update, low_rank._svd_of_update_by_qr])
@pytest.mark.parametrize("sides", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1e-9, 1.0), (1.0, 1e-9)])
@pytest.mark.parametrize("smallest", [1.0, 1e-9, 0.0])
@pytest.mark.parametrize("shape", [(9, 8, 3), (5, 9, 3), (3, 4, 3)])
def test_svd_of_update_is_that_of_the_dense_matrix(algorithm, sides, smallest, shape):
    m, n, r = shape
    left, right = (torch.linalg.qr(randn(d, r, seed=d)).Q for d in (m, n))
    q, p = (torch.linalg.qr(randn(r, r, seed=seed)).Q for seed in (1, 2))
    middle = q * torch.tensor([2.0, 1.0, smallest], dtype=torch.float64) @ p
    x, y = sides[0] * randn(m, r, seed=3), sides[1] * randn(n, r, seed=4)
    x, y = x - left @ (left.mT @ x), y - right @ (right.mT @ y)
    u, s, v = algorithm(left, middle, right, x, y)
    a, sigma, bt = torch.linalg.svd(left @ middle @ right.mT + x @ right.mT + left @ y.mT, full_matrices=False)
    close(s, sigma[:r], atol=1e-13)
    close(u * s @ v.mT, a[:, :r] * sigma[:r] @ bt[:r], atol=1e-12)
    for frame in (u, v):
        close(frame.mT @ frame, torch.eye(r, dtype=torch.float64), atol=1e-13)
