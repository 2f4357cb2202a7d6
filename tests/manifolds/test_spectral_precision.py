"""SVDSpectral at wide spectra, any scale and low precision, and after many steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds.spectral import SVDSpectral
from tests.manifolds.spectral_points import close, dense, randn, random_like, retractions, rng, spectra


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(12, 9, 4), (6, 20, 6), (9, 9, 5)]),
    smallest=st.integers(-14, 0).map(lambda e: 10.0**e),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    seed=st.integers(0, 2**31),
)
def test_wide_spectra_of_any_scale(shape, smallest, scale, seed):
    """Errors are those of rounding dW and W, not amplified by 1/s, though entries of dU and dV are."""
    m, n, r = shape
    manifold = SVDSpectral(r)
    left, _, right = manifold.random(m, n, dtype=torch.float64, generator=rng(seed))
    s = scale * torch.logspace(0, math.log10(smallest), r, dtype=torch.float64)
    x, ambient = (left, s, right), scale * randn(m, n, seed=seed)
    exact = ambient @ right @ right.mT + left @ left.mT @ (ambient - ambient @ right @ right.mT)
    u = manifold.tangent(x, ambient)
    egrad = ambient @ right * s, (left.mT @ ambient @ right).diagonal(), ambient.mT @ left * s
    for vector in (u, manifold.egrad2rgrad(x, egrad), manifold.proju(x, u)):
        close(dense(manifold, x, vector) / scale, exact / scale, atol=1e-13)
    y = manifold.retr(x, u)
    moved = manifold.embed(x) + exact
    left, s, right = torch.linalg.svd(moved, full_matrices=False)
    close(manifold.embed(y) / scale, (left[:, :r] * s[:r] @ right[:r]) / scale, atol=1e-11)
    assert manifold.check_point_on_manifold(y, explain=True, atol=1e-13) == (True, None)
    v = manifold.transp(x, y, u)
    close(dense(manifold, y, v) / scale, dense(manifold, y, manifold.tangent(y, exact)) / scale, atol=1e-12)


def test_squares_of_singular_values_need_not_be_numbers_of_their_type():
    manifold = SVDSpectral(3)
    left, _, right = manifold.random(6, 5, generator=rng())
    s, ambient = torch.tensor([3e-24, 2e-25, 1e-26]), randn(6, 5).float()
    x = left, s, right
    egrad = ambient @ right * s, (left.mT @ ambient @ right).diagonal(), ambient.mT @ left * s
    for a, b in zip(manifold.egrad2rgrad(x, egrad), manifold.tangent(x, ambient), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    wide = tuple(t.double() for t in x)
    for a, b in zip(manifold.tangent(x, ambient), manifold.tangent(wide, ambient.double()), strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_qr_retraction_adds_a_large_second_order_term_where_values_are_small():
    matrices = []
    for retraction in ("svd", "qr"):
        manifold = SVDSpectral(2, retraction=retraction)
        left, _, right = manifold.random(6, 5, dtype=torch.float64, generator=rng())
        x = left, torch.tensor([1.0, 1e-4], dtype=torch.float64), right
        u = manifold.tangent(x, 0.1 * randn(6, 5))
        matrices.append(manifold.embed(manifold.retr(x, u)) - manifold.embed(x) - dense(manifold, x, u))
    assert matrices[0].norm() < 0.2
    assert matrices[1].norm() > 20


@spectra
@retractions
@pytest.mark.parametrize("shape", [(40, 30, 8), (24, 60, 24), (33, 20, 1)])
def test_float32_is_float64_rounded(spectrum, retraction, shape):
    m, n, r = shape
    manifold = SVDSpectral(r, spectrum, retraction=retraction)
    x = manifold.random(m, n, generator=rng())
    x = manifold.projx(tuple(t.double() for t in x))
    u, v = (manifold.proju(x, random_like(x, seed, 0.1)) for seed in (1, 2))
    single = [tuple(t.float() for t in factors) for factors in (x, u, v)]
    y, carried = manifold.retr_transp(x, u, v)
    y32, carried32 = manifold.retr_transp(*single)
    assert y32[0].dtype == torch.float32
    assert (manifold.embed(y32) - manifold.embed(y)).norm() <= 2e-6 * manifold.embed(y).norm()
    wide = [tuple(t.double() for t in factors) for factors in (y32, carried32)]
    error = (dense(manifold, *wide) - dense(manifold, y, carried)).norm()
    assert error <= 5e-6 * manifold.norm(y, carried)
    assert manifold.check_point_on_manifold(y32, explain=True, atol=3e-6) == (True, None)


@spectra
@retractions
def test_neither_frames_nor_spectrum_drift(spectrum, retraction):
    manifold = SVDSpectral(6, spectrum, retraction=retraction)
    x, generator = manifold.random(40, 24, generator=rng()), rng(1)
    for _ in range(300):
        u = manifold.tangent(x, 0.02 * torch.randn(40, 24, generator=generator))
        x = manifold.retr(x, u)
    assert manifold.check_point_on_manifold(x, explain=True, atol=2e-6, rtol=1e-7) == (True, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@spectra
def test_half_precision_is_float32_rounded(spectrum, dtype):
    manifold = SVDSpectral(3, spectrum)
    x = manifold.random(8, 7, dtype=dtype, generator=rng())
    assert manifold.check_point_on_manifold(x, explain=True) == (True, None)
    u, v = random_like(x, 1, 0.1), random_like(x, 2)
    wide = [tuple(t.float() for t in factors) for factors in (x, u, v)]
    for half, full in (
        (manifold.proju(x, u), manifold.proju(*wide[:2])),
        (manifold.egrad2rgrad(x, u), manifold.egrad2rgrad(*wide[:2])),
        (manifold.retr(x, u), manifold.retr(*wide[:2])),
        (manifold.projx(x), manifold.projx(wide[0])),
        (manifold.transp(x, x, v), manifold.transp(wide[0], wide[0], wide[2])),
        (manifold.project(manifold.embed(x)), manifold.project(manifold.embed(x).float())),
    ):
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(half, full, strict=True))
