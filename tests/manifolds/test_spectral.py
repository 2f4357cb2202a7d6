"""SVDSpectral against dense closed forms and pymanopt: its tangent vectors, their normal form, its gauge."""

import numpy as np
import pymanopt.manifolds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

from retract.manifolds import diagnostics
from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Bounded, Free, Identity, Lipschitz
from tests.manifolds.spectral_points import SHAPES, close, dense, randn, random_like, retractions, rng, shapes, spectra


def signed_permutation(r, seed=0):
    signs = torch.randint(0, 2, (r,), generator=rng(seed)).double() * 2 - 1
    return (torch.eye(r, dtype=torch.float64) * signs).roll(1, 0)


# ------------------------------------------------------------------------------------------------- it is a manifold


# Wide enough for a unit step to reach no bound: there, which of two equal largest values stays depends on their order.
@pytest.mark.parametrize("spectrum", [Identity(), Free(), Lipschitz(30.0), Bounded(0.05, 30.0)], ids=str)
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
