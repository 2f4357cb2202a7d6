"""SVDSpectral: dense closed forms, pymanopt, gauge, extreme spectra, optimizers on it."""

import copy
import io
import math

import numpy as np
import pymanopt.manifolds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

from retract.manifolds import diagnostics, low_rank
from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Bounded, Free, Identity, Lipschitz
from retract.optim import RiemannianGD, RiemannianSGD

# Bounded is wide enough for the unit steps of the diagnostics to stay inside.
SPECTRA = [Identity(), Free(), Lipschitz(1.5), Bounded(0.05, 30.0)]
spectra = pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
retractions = pytest.mark.parametrize("retraction", ["svd", "qr"])
SHAPES = [(6, 5, 3), (5, 9, 5), (9, 5, 2), (4, 4, 4), (7, 4, 1), (1, 5, 1), (1, 1, 1)]
shapes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)).map(lambda t: (*t[:2], min(t)))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def random_like(x, seed=0, scale=1.0):
    generator = rng(seed)
    return tuple(scale * torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype) for t in x)


def scaled(a, u):
    return tuple(a * t for t in u)


def dense(manifold, x, u):
    """dW, by forward differentiation of `embed`."""
    return torch.func.jvp(manifold.embed, (x,), (u,))[1]


def signed_permutation(r, seed=0):
    signs = torch.randint(0, 2, (r,), generator=rng(seed)).double() * 2 - 1
    return (torch.eye(r, dtype=torch.float64) * signs).roll(1, 0)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------- it is a manifold


@spectra
@retractions
@settings(max_examples=3, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_is_a_manifold(spectrum, retraction, shape, seed):
    m, n, r = shape
    manifold = SVDSpectral(r, spectrum, retraction=retraction)
    report = diagnostics.check_manifold(
        manifold, (m, n), order=2 if retraction == "svd" else 1, element=signed_permutation(r, seed), seed=seed
    )
    # a zero-dimensional manifold has no unit tangent vector to check a metric with
    expected_failures = {"metric"} if manifold.dimension((m, n)) == 0 else set()
    assert {report.check for report in report.reports if not report.ok} <= expected_failures, str(report)


@spectra
def test_singular_values_come_in_any_order(spectrum):
    manifold = SVDSpectral(3, spectrum)
    x = manifold.act(manifold.random(6, 5, dtype=torch.float64, generator=rng()), signed_permutation(3))
    assert x[1].diff().max() > 0 or spectrum == Identity()
    assert (report := diagnostics.check_manifold(manifold, point=x, order=2, element=signed_permutation(3))), str(
        report
    )


def test_the_first_order_retraction_is_not_second_order():
    manifold = SVDSpectral(3, retraction="qr")
    assert not diagnostics.check_retraction(manifold, manifold.random(6, 5, dtype=torch.float64), order=2)


@pytest.mark.parametrize("shape", SHAPES)
@spectra
def test_projection_is_that_onto_the_velocities_of_orthonormal_frames(shape, spectrum):
    """The tangent space by its definition: images of U Ω_1, constrained ds and V Ω_2, skew Ω of full size."""
    m, n, r = shape
    manifold, ambient = SVDSpectral(r, spectrum), randn(m, n, seed=1)
    x = manifold.random(m, n, dtype=torch.float64, generator=rng())

    def images(dim):
        for i, j in torch.combinations(torch.arange(dim)).tolist():
            skew = torch.zeros(dim, dim, dtype=torch.float64)
            skew[i, j], skew[j, i] = 1.0, -1.0
            yield skew

    none = tuple(torch.zeros_like(t) for t in x)
    basis = [dense(manifold, x, (skew @ x[0], *none[1:])) for skew in images(m)]
    basis += [dense(manifold, x, (*none[:2], skew @ x[2])) for skew in images(n)]
    basis += [
        dense(manifold, x, (none[0], spectrum.constrain(x[1], e), none[2])) for e in torch.eye(r, dtype=torch.float64)
    ]
    vectors = torch.stack(basis).flatten(1)
    left, values, _ = torch.linalg.svd(vectors.mT)
    rank = int((values > 1e-10).sum())
    assert rank == manifold.dimension((m, n)) == manifold.dimension([t.shape for t in x])
    expected = (left[:, :rank] @ (left[:, :rank].mT @ ambient.flatten())).view(m, n)
    close(dense(manifold, x, manifold.tangent(x, ambient)), expected)
    pair = randn(m, 2, seed=2), randn(n, 2, seed=3)
    for ours, theirs in zip(manifold.tangent(x, pair), manifold.tangent(x, pair[0] @ pair[1].mT), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@spectra
def test_gradient_and_projection_from_factors_are_those_of_dense_matrices(shape, spectrum):
    m, n, r = shape
    manifold, weights = SVDSpectral(r, spectrum), randn(m, n, seed=1)
    x = manifold.random(m, n, dtype=torch.float64, generator=rng())

    def cost(*factors):
        return torch.sin(weights * manifold.embed(factors)).sum()

    g = weights * torch.cos(weights * manifold.embed(x))
    for ours, expected in zip(manifold.egrad2rgrad(x, jacobian(cost, x)), manifold.tangent(x, g), strict=True):
        close(ours, expected)
    velocity = random_like(x, seed=2)
    projected = manifold.tangent(x, dense(manifold, x, velocity))
    for ours, expected in zip(manifold.proju(x, velocity), projected, strict=True):
        close(ours, expected)
    y, other = manifold.retr(x, projected), random_like(x, seed=3)
    carried = manifold.tangent(y, dense(manifold, x, other))
    for ours, expected in zip(manifold.transp(x, y, other), carried, strict=True):
        close(ours, expected)
    product = (dense(manifold, x, velocity) * dense(manifold, x, other)).sum()
    torch.testing.assert_close(manifold.inner(x, velocity, other), product, rtol=1e-13, atol=1e-13)
    close(manifold.norm(x, other), dense(manifold, x, other).norm())


@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 9, 5), (8, 8, 1)])
def test_agrees_with_pymanopt(shape):
    m, n, r = shape
    manifold, theirs = SVDSpectral(r), pymanopt.manifolds.FixedRankEmbedded(m, n, r)
    x = manifold.random(m, n, dtype=torch.float64, generator=rng())
    point = (x[0].numpy(), x[1].numpy(), x[2].mT.numpy())

    def matrix(vector, at):
        u, mid, v = vector
        return at[0] @ mid @ at[2] + u @ at[2] + at[0] @ v.T

    def same(ours, vector, at=point):
        np.testing.assert_allclose(ours.numpy(), matrix(vector, at), rtol=0, atol=1e-10)

    ambient, w = randn(m, n, seed=1), manifold.embed(x)
    gu, gs, gv = jacobian(lambda *factors: (ambient * manifold.embed(factors).sin()).sum(), x)
    gradient = theirs.euclidean_to_riemannian_gradient(point, (gu.numpy(), gs.numpy(), gv.mT.numpy()))
    same(dense(manifold, x, manifold.egrad2rgrad(x, (gu, gs, gv))), gradient)
    same(dense(manifold, x, manifold.tangent(x, ambient)), theirs.projection(point, ambient.numpy()))
    u, v = manifold.tangent(x, ambient), manifold.tangent(x, w.sin())
    a, b = theirs.projection(point, ambient.numpy()), theirs.projection(point, w.sin().numpy())
    assert abs(manifold.inner(x, u, v) - theirs.inner_product(point, a, b)) <= 1e-10
    y, landed = manifold.retr(x, u), theirs.retraction(point, a)
    np.testing.assert_allclose(manifold.embed(y).numpy(), landed[0] * landed[1] @ landed[2], rtol=0, atol=1e-10)
    same(dense(manifold, y, manifold.transp(x, y, v)), theirs.transport(point, landed, b), landed)
    assert manifold.dimension((m, n)) == theirs.dim


# ------------------------------------------------------------------------------------------------------ normal form


@spectra
def test_normal_form_is_what_the_docstring_says(spectrum):
    manifold = SVDSpectral(4, spectrum)
    x = manifold.random(7, 6, dtype=torch.float64, generator=rng())
    du, ds, dv = manifold.proju(x, random_like(x))
    (left, s, right), dw = x, dense(manifold, x, (du, ds, dv))
    middle = left.mT @ dw @ right
    for a, factor in ((left.mT @ du, middle), (right.mT @ dv, middle.mT)):
        expected = factor * s / (s.unsqueeze(-1) ** 2 + s**2)
        close(a, expected - torch.diag(expected.diagonal()))
    close(ds, middle.diagonal())
    close(du - left @ (left.mT @ du), (dw @ right - left @ middle) / s)
    close(dv - right @ (right.mT @ dv), (dw.mT @ left - right @ middle.mT) / s)


@spectra
def test_velocities_of_one_matrix_velocity_have_one_normal_form_of_least_norm(spectrum):
    manifold = SVDSpectral(3, spectrum)
    left, s, right = x = manifold.random(6, 5, dtype=torch.float64, generator=rng())
    u = manifold.proju(x, random_like(x))
    a = randn(3, 3, seed=1)
    a -= torch.diag(a.diagonal())
    vertical = left @ a, torch.zeros(3, dtype=torch.float64), -right @ (a * s / s.unsqueeze(-1)).mT
    assert dense(manifold, x, vertical).norm() <= 1e-14
    other = tuple(p + q for p, q in zip(u, vertical, strict=True))
    for ours, expected in zip(manifold.proju(x, other), u, strict=True):
        close(ours, expected)
    assert manifold.check_vector_on_tangent(x, u, atol=1e-12)
    assert not manifold.check_vector_on_tangent(x, other)
    # the two are orthogonal as tuples, so no shorter one exists
    close(sum((p * q).sum() for p, q in zip(u, vertical, strict=True)), torch.tensor(0.0, dtype=torch.float64))


@spectra
def test_nothing_happens_where_singular_values_coincide(spectrum):
    manifold = SVDSpectral(3, spectrum)
    left, _, right = manifold.random(6, 5, dtype=torch.float64, generator=rng())
    equal = spectrum.project(torch.ones(3, dtype=torch.float64))
    apart = spectrum.project(equal * (1 - 1e-9 * torch.arange(3)))
    ambient = randn(6, 5, seed=1)
    for a, b in zip(*(manifold.tangent((left, s, right), ambient) for s in (equal, apart)), strict=True):
        close(a, b, atol=1e-7)
        assert a.abs().max() < 100


# ------------------------------------------------------------------------------------------------------- retraction


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


# ----------------------------------------------------------------------------------------- scales, precision, drift


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


# ------------------------------------------------------------------------------------------------------------ gauge


@spectra
def test_factors_of_every_verb_follow_signed_permutations(spectrum):
    manifold, q = SVDSpectral(4, spectrum), signed_permutation(4, seed=3)
    x = manifold.random(7, 6, dtype=torch.float64, generator=rng())
    z, g = manifold.act(x, q), random_like(x, 1)
    close(manifold.embed(z), manifold.embed(x))
    for verb in ("proju", "egrad2rgrad"):
        here, there = getattr(manifold, verb)(x, g), getattr(manifold, verb)(z, manifold.act(g, q))
        for a, b in zip(manifold.act(here, q), there, strict=True):
            close(a, b)


@retractions
@pytest.mark.parametrize("seed", range(3))
def test_identity_is_equivariant_under_every_rotation(retraction, seed):
    manifold = SVDSpectral(4, "identity", retraction=retraction)
    q = torch.linalg.qr(randn(4, 4, seed=seed)).Q
    x = manifold.random(7, 6, dtype=torch.float64, generator=rng(seed))
    report = diagnostics.check_gauge(manifold, x, q, seed=seed)
    assert report, str(report)
    assert report.figures.keys() >= {"embed", "embed's differential", "proju", "egrad2rgrad", "retr", "transp", "inner"}
    y = manifold.retr(x, manifold.proju(x, random_like(x)))
    z = manifold.retr(manifold.act(x, q), manifold.act(manifold.proju(x, random_like(x)), q))
    for a, b in zip(manifold.act(y, q), z, strict=True):  # the factors too: they follow the old ones
        close(a, b)


@pytest.mark.parametrize("spectrum", [Free(), Bounded(0.1, 3.0)], ids=str)
def test_rotations_within_coinciding_values_change_no_matrix(spectrum):
    manifold = SVDSpectral(4, spectrum)
    left, _, right = manifold.random(7, 6, dtype=torch.float64, generator=rng())
    x = left, torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64), right
    q = torch.block_diag(-torch.ones(1, 1, dtype=torch.float64), torch.linalg.qr(randn(3, 3)).Q)
    z, ambient = manifold.act(x, q), randn(7, 6)
    close(manifold.embed(z), manifold.embed(x))
    u, v = manifold.tangent(x, ambient), manifold.tangent(z, ambient)
    close(dense(manifold, z, v), dense(manifold, x, u))
    close(manifold.embed(manifold.retr(z, v)), manifold.embed(manifold.retr(x, u)))


# ----------------------------------------------------------------------------------------------------------- points


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


# ------------------------------------------------------------------------------------------------ checks and errors


@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
@retractions
def test_arguments_rebuild_it(spectrum, retraction):
    manifold = SVDSpectral(3, spectrum, retraction=retraction)
    rebuilt = SVDSpectral(**manifold.arguments)
    assert (str(rebuilt), rebuilt.spectrum, rebuilt.retraction) == (str(manifold), spectrum, retraction)
    assert copy.deepcopy(manifold).arguments == manifold.arguments
    assert str(SVDSpectral(3)) == "SVDSpectral(3, Free())"


def test_checks_say_what_is_wrong():
    manifold = SVDSpectral(3, "lipschitz")
    u, s, v = x = manifold.random(6, 5, dtype=torch.float64, generator=rng())
    nan = torch.full_like(u, torch.nan)
    for wrong, reason in (
        ((2 * u, s, v), "UᵀU - I reaches 3"),
        ((u, s, v + 1), "VᵀV - I reaches"),
        ((u, 2 * s, v), "s is 1 from Lipschitz"),
        ((u, s * torch.tensor([1, 1, -1]), v), "s is 0.5 from Lipschitz"),
        ((nan, s, v), "UᵀU - I reaches nan"),
        ((u, s * torch.nan, v), "NaN or infinite"),
        ((u, s[:2], v), r"shapes (m, 3), (3,), (n, 3), got ((6, 3), (2,), (5, 3))"),
        ((u[:, :2], s, v), "got ((6, 2), (3,), (5, 3))"),
        ((u[:2], s, v), "rank 3 exceeds min(m, n) of a matrix of shape (2, 5)"),
        ((u, s), "tuple of three tensors (U, s, V), got ((6, 3), (3,))"),
        (u, "got one tensor of shape (6, 3)"),
        (tuple(t.long() for t in x), "got dtype torch.int64"),
    ):
        ok, why = manifold.check_point_on_manifold(wrong, explain=True)
        assert not ok and reason in why, why
        assert manifold.check_point_on_manifold(wrong) is False
    tangent = manifold.proju(x, random_like(x))
    assert manifold.check_vector_on_tangent(x, scaled(1e6, tangent))
    for wrong, reason in (
        ((tangent[0] + 1e-3 * u, *tangent[1:]), "dU is"),
        ((tangent[0], tangent[1] + 1e-3, tangent[2]), "ds is 0.001 off the normal form"),
        ((*tangent[:2], tangent[2] + 1e-3 * v), "off the normal form"),
        ((tangent[0] * torch.nan, *tangent[1:]), "dU is nan"),
        ((tangent[0], tangent[1][:2], tangent[2]), "they must agree"),
    ):
        ok, why = manifold.check_vector_on_tangent(x, wrong, explain=True)
        assert not ok and reason in why, why


def test_bad_arguments():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        SVDSpectral(0)
    for rank in (2.0, True, "2"):
        with pytest.raises(TypeError, match="rank must be an int, got"):
            SVDSpectral(rank)
    with pytest.raises(ValueError, match="retraction must be 'svd' or 'qr', got 'polar'"):
        SVDSpectral(2, retraction="polar")
    with pytest.raises(ValueError, match="spectrum must be one of identity, free, lipschitz, bounded"):
        SVDSpectral(2, "unit")
    manifold = SVDSpectral(4)
    for call in (
        lambda: manifold.random(3, 9),
        lambda: manifold.origin(9, 3),
        lambda: manifold.dimension((3, 9)),
        lambda: manifold.project(torch.zeros(9, 3)),
    ):
        with pytest.raises(ValueError, match=r"rank 4 exceeds min\(m, n\) of a matrix of shape"):
            call()
    with pytest.raises(ValueError, match=r"two or more dimensions, got shape \(5,\)"):
        manifold.project(torch.zeros(5))
    x = manifold.random(6, 5)
    for ambient in (torch.zeros(5, 6), (torch.zeros(6, 2), torch.zeros(6, 2))):
        with pytest.raises(ValueError, match=r"ambient must have shape \(6, 5\), got \((5, 6|6, 6)\)"):
            manifold.tangent(x, ambient)
    with pytest.raises(ValueError, match=r"vector has shapes .* they must agree"):
        manifold.retr(x, manifold.random(7, 5))


@retractions
def test_nan_never_passes(retraction):
    manifold = SVDSpectral(3, retraction=retraction)
    for x in (manifold.random(6, 5), manifold.random(6, 5, dtype=torch.float64)):
        nan = tuple(t * torch.nan for t in x)
        with pytest.raises(ValueError, match="NaN or infinite entries have no projection"):
            manifold.projx(nan)
        with pytest.raises(ValueError, match="NaN or infinite entries has no projection"):
            manifold.project(manifold.embed(nan))
        for step in (nan, (x[0] * torch.nan, 0 * x[1], 0 * x[2])):
            with pytest.raises(torch.linalg.LinAlgError):
                manifold.retr(x, step)


@pytest.mark.parametrize("verb", ["dist", "expmap", "logmap"])
def test_what_is_not_offered_names_what_is(verb):
    x = SVDSpectral(2).origin(3, 3)
    with pytest.raises(NotImplementedError, match="it offers"):
        getattr(SVDSpectral(2), verb)(x, x)


# ------------------------------------------------------------------------------------------------------- optimizers


def approximate(condition, optimizer, steps, retraction="svd", spectrum="free", **options):
    """Fit a rank-4 target, every entry with its own weight in [1/4, 1]; relative errors, and the optimizer."""
    generator, manifold = rng(1), SVDSpectral(4, spectrum, retraction=retraction)
    left, _, right = manifold.random(30, 20, dtype=torch.float64, generator=generator)
    target = left * torch.logspace(0, -math.log10(condition), 4, dtype=torch.float64) @ right.mT
    weights = 0.25 + 0.75 * torch.rand(30, 20, dtype=torch.float64, generator=generator)
    x = [torch.nn.Parameter(t) for t in manifold.random(30, 20, dtype=torch.float64, generator=generator)]
    steps_taken = optimizer([{"params": x, "manifold": manifold}], **options)
    errors = []
    for _ in range(steps):
        steps_taken.zero_grad()
        difference = manifold.embed(x) - target
        (weights * difference.square()).sum().div(2).backward()
        errors.append(float(difference.detach().norm() / target.norm()))
        steps_taken.step()
    return errors, steps_taken, x


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (RiemannianGD, {"lr": 1.0}),
        (RiemannianGD, {"lr": 0.5, "retraction": "qr"}),
        (RiemannianSGD, {"lr": 1.0, "momentum": 0.3}),
        (RiemannianSGD, {"lr": 0.5, "momentum": 0.5, "nesterov": True}),
    ],
)
def test_optimizers_converge_at_a_rate_that_does_not_depend_on_the_condition(optimizer, options):
    steps = []
    for condition in (10.0, 1e3):
        errors, _, _ = approximate(condition, optimizer, 120, **options)
        steps.append(next(i for i, e in enumerate(errors) if e < 1e-8))
    assert steps[1] <= 1.2 * steps[0] + 3, steps


def test_gradient_descent_on_two_factors_stalls_where_this_converges():
    generator = rng(1)
    manifold = SVDSpectral(4)
    left, _, right = manifold.random(30, 20, dtype=torch.float64, generator=generator)
    target = left * torch.logspace(0, -3, 4, dtype=torch.float64) @ right.mT
    a, b = (torch.nn.Parameter(0.3 * t) for t in manifold.random(30, 20, dtype=torch.float64)[::2])
    plain = torch.optim.SGD([a, b], lr=0.5)
    for _ in range(120):
        plain.zero_grad()
        loss = (a @ b.mT - target).square().sum() / 2
        loss.backward()
        plain.step()
    assert (a @ b.mT - target).norm() > 1e-4 * target.norm()


@spectra
@retractions
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizers_stay_on_the_manifold_in_float32(spectrum, retraction, momentum):
    generator, manifold = rng(), SVDSpectral(5, spectrum, retraction=retraction)
    x = [torch.nn.Parameter(t) for t in manifold.random(20, 12, generator=generator)]
    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.05, momentum=momentum)
    targets = torch.randn(50, 20, 12, generator=generator)
    for target in targets:
        optimizer.zero_grad()
        (manifold.embed(x) - target).square().sum().backward()
        optimizer.step()
    point = tuple(p.detach() for p in x)
    assert manifold.check_point_on_manifold(point, explain=True, atol=2e-6, rtol=1e-6) == (True, None)
    if momentum:
        buffers = tuple(optimizer.state[p]["momentum_buffer"] for p in x)
        assert manifold.check_vector_on_tangent(point, buffers, explain=True, atol=1e-5, rtol=1e-5) == (True, None)


def test_optimizer_state_survives_a_round_trip():
    options = {"lr": 0.3, "momentum": 0.5}
    errors, _, _ = approximate(10.0, RiemannianSGD, 20, spectrum=Lipschitz(1.0), **options)
    _, optimizer, x = approximate(10.0, RiemannianSGD, 10, spectrum=Lipschitz(1.0), **options)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "x": [p.detach() for p in x]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    group = saved["optimizer"]["param_groups"][0]["manifold"]
    assert group == {"name": "SVDSpectral", "arguments": SVDSpectral(4, Lipschitz(1.0)).arguments}
    fresh = [torch.nn.Parameter(t) for t in saved["x"]]
    resumed = RiemannianSGD([{"params": fresh, "manifold": SVDSpectral(4, Lipschitz(1.0))}], **options)
    resumed.load_state_dict(saved["optimizer"])
    for here, there in zip(fresh, x, strict=True):
        assert torch.equal(resumed.state[here]["momentum_buffer"], optimizer.state[there]["momentum_buffer"])
    other = RiemannianSGD([{"params": fresh, "manifold": SVDSpectral(4)}], **options)
    with pytest.raises(ValueError, match="was saved on manifold"):
        other.load_state_dict(saved["optimizer"])
    assert errors[10] < errors[0]


def test_optimizers_refuse_weights_off_the_manifold():
    u, s, v = SVDSpectral(3).random(6, 5)
    with pytest.raises(ValueError, match=r"is not a point of SVDSpectral\(3, Free\(\)\): UᵀU - I reaches"):
        RiemannianSGD([{"params": [torch.nn.Parameter(t) for t in (2 * u, s, v)], "manifold": SVDSpectral(3)}])
    with pytest.raises(ValueError, match="factors of shapes"):
        RiemannianGD([{"params": [torch.nn.Parameter(t) for t in (s, u, v)], "manifold": SVDSpectral(3)}])
