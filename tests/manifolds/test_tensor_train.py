"""STTP against its dense tangent space and SVDSpectral: projections, dimensions, gauge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds import diagnostics
from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.tensor_train import STTP, capped_ranks
from tests.manifolds.tensor_trains import SIZES, SPECTRA, ambient, draw, element, matrix, modes, tangent_space


def velocity(manifold, x, u):
    return torch.func.jvp(manifold.embed, (x,), (tuple(u),))[1]


# ------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("shape", "ranks", "spectrum"),
    [(*size, "free") for size in SIZES] + [(*size, name) for size in SIZES[1::3] for name in SPECTRA[1:]],
)
def test_is_a_manifold(shape, ranks, spectrum):
    manifold = STTP(shape, ranks, spectrum)
    rotations = element(manifold, torch.Generator().manual_seed(1))
    report = diagnostics.check_manifold(manifold, point=draw(manifold), element=rotations)
    # a zero-dimensional manifold has no unit tangent vector to check a metric with
    expected_failures = {"metric"} if manifold.dimension() == 0 else set()
    assert {r.check for r in report.reports if not r.ok} <= expected_failures, str(report)


@settings(max_examples=8, deadline=None)
@given(
    out_modes=modes, in_modes=modes, cap=st.integers(1, 5), spectrum=st.sampled_from(SPECTRA), seed=st.integers(0, 999)
)
def test_projections_are_those_of_the_dense_tangent_space(out_modes, in_modes, cap, spectrum, seed):
    manifold = STTP((out_modes, in_modes), cap, spectrum)
    x = draw(manifold, seed)
    basis = tangent_space(manifold, x)
    assert basis.shape[1] == manifold.dimension() == manifold.dimension([t.shape for t in x])

    def nearest(z):
        return (basis @ (basis.mT @ z.flatten())).view(z.shape)

    u, z = ambient(manifold, seed + 1), matrix(manifold, seed + 2)
    torch.testing.assert_close(velocity(manifold, x, manifold.proju(x, u)), nearest(velocity(manifold, x, u)))
    torch.testing.assert_close(velocity(manifold, x, manifold.tangent(x, z)), nearest(z))
    torch.testing.assert_close(manifold.tangent(x, (z, torch.eye(z.shape[1]).to(z))), manifold.tangent(x, z))
    gradient = torch.func.grad(lambda p: (manifold.embed(p) * z).sin().sum())(x)
    dense = torch.func.grad(lambda w: (w * z).sin().sum())(manifold.embed(x))
    torch.testing.assert_close(velocity(manifold, x, manifold.egrad2rgrad(x, gradient)), nearest(dense))
    other = draw(manifold, seed + 3)
    v = manifold.proju(other, ambient(manifold, seed + 4))
    moved = manifold.transp(other, x, v)
    torch.testing.assert_close(velocity(manifold, x, moved), nearest(velocity(manifold, other, v)))
    for tangent in (manifold.proju(x, u), manifold.tangent(x, z), manifold.egrad2rgrad(x, gradient), moved):
        assert manifold.check_vector_on_tangent(x, tangent, atol=1e-9, explain=True) == (True, None)
    torch.testing.assert_close(
        manifold.inner(x, u, moved), (velocity(manifold, x, u) * velocity(manifold, x, moved)).sum()
    )


@pytest.mark.parametrize(
    ("shape", "rank", "free", "identity"),
    [
        (((2, 2, 2), (9, 2, 2)), 3, 57, 51),
        (((2, 2, 2), (3, 3, 2, 2)), 3, 57, 51),
        (((2, 2, 2), (9, 2, 2)), 8, 200, 164),
        (((2, 2, 2, 2), (2, 2, 2)), 4, 64, 54),
    ],
)
def test_dimensions_of_the_paper(shape, rank, free, identity):
    """The formula, and the rank of the Jacobian at a random point."""
    for spectrum, expected in (("free", free), ("identity", identity), ("lipschitz", free - 1), ("bounded", free)):
        manifold = STTP(shape, rank, spectrum)
        assert manifold.dimension() == expected
        assert tangent_space(manifold, draw(manifold)).shape[1] == expected
        bonds = (1, *manifold.ranks, 1)
        cores = zip(bonds, (*shape[0], *reversed(shape[1])), bonds[1:], strict=False)
        assert free == sum(a * n * b for a, n, b in cores) - sum(r * r for r in manifold.ranks)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_full_bonds_leave_a_plain_svd(spectrum):
    """12 x 6 of rank 4 with the largest outer ranks is `SVDSpectral`: the same dimension, and the same verbs."""
    manifold, plain = STTP(((2, 2, 3), (2, 3)), (2, 4, 4, 2), spectrum), SVDSpectral(4, spectrum)
    full = STTP(((2, 2, 3), (3, 2)), capped_ranks((2, 2, 3), (3, 2), 4), spectrum)
    assert manifold.ranks == (2, 4, 4, 2)
    assert manifold.dimension() == full.dimension() == plain.dimension((12, 6))
    assert manifold.dimension() == {"free": 56, "identity": 46, "lipschitz": 55, "bounded": 56}[spectrum]
    x, z = draw(manifold), matrix(manifold, 1)
    u, v = manifold.tangent(x, 0.1 * z), manifold.tangent(x, matrix(manifold, 2))
    y, moved = manifold.retr_transp(x, u, v)
    there = manifold.frames(x)
    torch.testing.assert_close(manifold.embed(x), plain.embed(there))
    step, vector = plain.tangent(there, 0.1 * z), plain.tangent(there, matrix(manifold, 2))
    target, carried = plain.retr_transp(there, step, vector)
    torch.testing.assert_close(manifold.embed(y), plain.embed(target), atol=1e-13, rtol=0)
    torch.testing.assert_close(velocity(manifold, y, moved), velocity(plain, target, carried))


def test_gradients_keep_their_digits_at_ill_conditioned_points():
    """Condition 1e4 in float32: of the Gram matrices beyond the bonds it is 1e8, and their factors lose a digit."""
    manifold = STTP(((2, 2, 3, 3), (3, 3, 2, 2)), 4)
    x = draw(manifold, 3)
    x = (*x[:4], torch.logspace(0, -4, 4, dtype=torch.float64), *x[5:])
    z = matrix(manifold, 1)
    exact = manifold.tangent(x, z)
    single = manifold.tangent(tuple(t.float() for t in x), z.float())
    norm = manifold.norm(x, exact)
    error = manifold.norm(x, tuple(a.double() - b for a, b in zip(single, exact, strict=True)))
    assert error <= 8e-6 * norm


def test_bonds_of_lower_rank_have_gradients_where_they_have_rank():
    """At zero singular values nothing blows up: the missing directions have no velocity."""
    manifold = STTP(((2, 3, 2), (2, 3, 2)), 3)
    x = draw(manifold)
    x = (*x[:3], torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), *x[4:])
    z = matrix(manifold, 1)
    u = manifold.tangent(x, z)
    assert all(bool((t.abs() < 1e3).all()) for t in u)
    basis = tangent_space(manifold, x)
    inside = velocity(manifold, x, u).flatten()
    torch.testing.assert_close(basis @ (basis.mT @ inside), inside)
    y, moved = manifold.retr_transp(x, u, u)
    assert manifold.check_point_on_manifold(y, atol=1e-12, explain=True) == (True, None)
    assert manifold.check_vector_on_tangent(y, moved, atol=1e-9, explain=True) == (True, None)


# ---------------------------------------------------------------------------------------------------------- gauge


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("shape", "ranks"), SIZES)
def test_gauge_and_canonical_form(shape, ranks, spectrum):
    manifold = STTP(shape, ranks, spectrum)
    x = draw(manifold)
    z = manifold.act(x, element(manifold, torch.Generator().manual_seed(5)))
    torch.testing.assert_close(manifold.embed(z), manifold.embed(x), atol=1e-13, rtol=0)
    form = manifold.canonical(x)
    torch.testing.assert_close(manifold.embed(form), manifold.embed(x), atol=1e-13, rtol=0)
    torch.testing.assert_close(manifold.canonical(z), form, atol=1e-9, rtol=0)
    torch.testing.assert_close(manifold.canonical(form), form, atol=1e-9, rtol=0)
    assert manifold.check_point_on_manifold(form, atol=1e-12, explain=True) == (True, None)
    middle = len(shape[0])
    for core in (*form[: middle - 1], *form[middle + 1 : -1]):
        block = core[: core.shape[1]]
        assert torch.equal(block, block.triu())
        assert bool((block.diagonal() >= 0).all())
        if len(core) == len(block):
            torch.testing.assert_close(core, torch.eye(len(core)).to(core), atol=1e-12, rtol=0)
    last = form[middle - 1]
    if spectrum == "identity":
        block = last[: last.shape[1]]
        torch.testing.assert_close(block, block.triu(), atol=1e-12, rtol=0)
        assert bool((block.diagonal() >= 0).all())
    else:
        assert bool((form[middle].diff() <= 0).all())
        assert bool((last.gather(0, last.abs().argmax(0, keepdim=True)) > 0).all())
