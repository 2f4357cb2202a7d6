"""Points of SVDSpectral: projections to it, random ones, how many dimensions they have."""

import pytest
import torch

from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Identity
from tests.manifolds.spectral_points import SHAPES, SPECTRA, close, randn, rng, spectra


@spectra
@pytest.mark.parametrize("shape", SHAPES)
def test_projections_to_the_manifold_are_nearest(spectrum, shape):
    m, n, r = shape
    manifold, target = SVDSpectral(r, spectrum), 2 * randn(m, n, seed=1)
    point = manifold.project(target)
    assert manifold.check_point_on_manifold(point, explain=True, atol=1e-13) == (True, None)
    _, values, _ = torch.linalg.svd(target)
    kept = spectrum.project(values[:r])
    expected = ((values[:r] - kept).square().sum() + values[r:].square().sum()).sqrt()
    close((manifold.embed(point) - target).norm(), expected)
    for seed in range(10):
        u, s, v = manifold.random(m, n, dtype=torch.float64, generator=rng(seed))
        other = u, spectrum.project(2 * s), v
        assert (manifold.embed(other) - target).norm() >= expected
    factors = randn(m, r, seed=2), randn(r, seed=3), randn(n, r, seed=4)
    close(manifold.embed(manifold.projx(factors)), manifold.embed(manifold.project(manifold.embed(factors))))
    assert manifold.check_point_on_manifold(manifold.projx(factors), atol=1e-13)


def test_projections_take_matrices_of_lower_rank_and_kernels():
    for spectrum in SPECTRA:
        manifold = SVDSpectral(3, spectrum)
        zero = torch.zeros(6, 5, dtype=torch.float64)
        point = manifold.project(zero)
        assert manifold.check_point_on_manifold(point, explain=True, atol=1e-13) == (True, None)
        point = manifold.projx((zero[:, :3], torch.ones(3, dtype=torch.float64), zero[:5, :3]))
        assert manifold.check_point_on_manifold(point, explain=True, atol=1e-13) == (True, None)
        kernel = randn(6, 2, 3, 3)
        for a, b in zip(manifold.project(kernel), manifold.project(kernel.flatten(1)), strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()


@spectra
def test_points_of_the_manifold_are_left_alone(spectrum):
    manifold = SVDSpectral(3, spectrum)
    for x in (manifold.random(6, 5, dtype=torch.float64), manifold.origin(6, 5, dtype=torch.float64)):
        assert manifold.check_point_on_manifold(x, explain=True, atol=1e-14) == (True, None)
        for a, b in zip(manifold.projx(x), x, strict=True):
            close(a, b)
        u, s, v = x
        for a, b in zip(manifold.projx((u, -s, v)), (-u if spectrum != Identity() else u, s, v), strict=True):
            if spectrum != Identity():  # where -U is as good as U turned by any rotation, close to U
                close(a.abs(), b.abs())
        close(manifold.embed(manifold.projx((u, -s, v))), -manifold.embed(x))
        close(manifold.embed(manifold.project(manifold.embed(x))), manifold.embed(x))


def test_random_frames_are_uniform():
    generator = rng()
    draws = [SVDSpectral(2).random(3, 4, dtype=torch.float64, generator=generator) for _ in range(4000)]
    for factor, dim in ((0, 3), (2, 4)):
        entries = torch.stack([x[factor] for x in draws])
        assert entries.mean(0).abs().max() < 0.04
        close(entries.square().mean(0), torch.full_like(entries[0], 1 / dim), atol=0.03)
    assert torch.equal(
        SVDSpectral(2).random(3, 4, generator=rng(1))[0], SVDSpectral(2).random(3, 4, generator=rng(1))[0]
    )


@pytest.mark.parametrize(
    ("m", "n", "r", "free", "identity"),
    [(8, 36, 3, 123, 117), (8, 36, 8, 288, 252), (16, 8, 4, 80, 70), (12, 6, 4, 56, 46)],
)
def test_dimensions(m, n, r, free, identity):
    for spectrum, expected in (("free", free), ("identity", identity), ("lipschitz", free - 1), ("bounded", free)):
        assert SVDSpectral(r, spectrum).dimension((m, n)) == expected
        assert SVDSpectral(r, spectrum).dimension(((m, r), (r,), (n, r))) == expected
