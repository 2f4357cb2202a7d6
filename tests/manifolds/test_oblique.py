import copy

import geoopt
import numpy as np
import pymanopt.manifolds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds import Oblique, diagnostics

shapes = st.lists(st.integers(2, 4), min_size=2, max_size=4).map(tuple)


def plain(x):
    return x.detach().as_subclass(torch.Tensor)


def error(x, dim):
    norms = torch.linalg.vector_norm(plain(x).double().movedim(dim, 0).flatten(1), dim=1)
    return float((norms - 1).abs().max())


def point_and_tangents(manifold, shape, seed=0, dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(seed)
    x = plain(manifold.random(*shape, dtype=dtype, generator=generator))
    draws = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]
    return x, *(manifold.proju(x, draw) for draw in draws)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, dim=st.integers(-2, 1), seed=st.integers(0, 2**31))
def test_is_a_manifold(shape, dim, seed):
    """Second-order retraction, isometric transport, exact exp, log and dist, on any dimension."""
    report = diagnostics.check_manifold(Oblique(dim), shape, order=2, isometric=True, seed=seed)
    assert report, str(report)
    assert report["logarithm"].figures.keys() == {"log of exp", "dist"}


@settings(max_examples=30, deadline=None)
@given(
    shape=shapes,
    dim=st.integers(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    length=st.floats(-3, 3).map(lambda e: 10**e),
    verb=st.sampled_from(["retr", "expmap"]),
)
def test_moves_end_on_the_manifold(shape, dim, dtype, length, verb):
    manifold = Oblique(dim)
    x, u = point_and_tangents(manifold, shape, dtype=dtype, count=1)
    y = getattr(manifold, verb)(x, length * u)
    assert y.dtype == dtype
    assert error(y, dim) <= 2 * torch.finfo(dtype).eps
    assert manifold.check_point_on_manifold(y, explain=True) == (True, None)


@pytest.mark.parametrize("verb", ["retr", "expmap"])
def test_drift_does_not_accumulate(verb):
    manifold = Oblique()
    x, u = point_and_tangents(manifold, (4, 9), dtype=torch.float32, count=1)
    for _ in range(2000):
        x, u = getattr(manifold, verb)(x, 0.1 * u), manifold.proju(x, u.roll(1, 1))
    assert error(x, 0) <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("verb", ["projx", "proju", "egrad2rgrad", "retr", "expmap", "logmap"])
@pytest.mark.parametrize("dim", [0, 1])
def test_agrees_with_geoopt_where_that_applies(verb, dim):
    """geoopt's Sphere over the last dimension of the flattened slices."""
    ours, theirs = Oblique(dim), geoopt.SphereExact()
    x, u, v = point_and_tangents(ours, (3, 4, 2))
    y = ours.expmap(x, 0.3 * v)
    arguments = {"projx": (x + v,), "logmap": (x, y)}.get(verb, (x, u))
    rows = [t.movedim(dim, 0).flatten(1) for t in arguments]
    result = getattr(ours, verb)(*arguments).movedim(dim, 0).flatten(1)
    torch.testing.assert_close(result, getattr(theirs if verb != "retr" else geoopt.Sphere(), verb)(*rows))


def test_agrees_with_pymanopt():
    ours, theirs = Oblique(1), pymanopt.manifolds.Oblique(4, 3)
    x, u, v = point_and_tangents(ours, (4, 3))
    y = ours.expmap(x, 0.3 * v)
    point, step, vector, other = (t.numpy() for t in (x, u, v, y))
    assert ours.dimension((4, 3)) == theirs.dim
    for result, expected in (
        (ours.proju(x, u + x), theirs.projection(point, step + point)),
        (ours.retr(x, u), theirs.retraction(point, step)),
        (ours.expmap(x, u), theirs.exp(point, step)),
        (ours.logmap(x, y), theirs.log(point, other)),
        (ours.dist(x, y), theirs.dist(point, other)),
        (ours.inner(x, u, v), theirs.inner_product(point, step, vector)),
    ):
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_transport_is_parallel():
    """Along a great circle the velocity stays velocity and what is orthogonal to the plane stays as it is."""
    x, y = torch.eye(2, 3, dtype=torch.float64).roll(1, 1), torch.zeros(2, 3, dtype=torch.float64)
    x = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    u = torch.tensor([[0, 0.7, 0], [0, 0, 0.4]], dtype=torch.float64)
    aside = torch.tensor([[0, 0, 1.0], [1.0, 0, 0]], dtype=torch.float64)
    y = Oblique().expmap(x, u)
    h = 1e-6
    velocity = (Oblique().expmap(x, (1 + h) * u) - Oblique().expmap(x, (1 - h) * u)) / (2 * h)
    torch.testing.assert_close(Oblique().transp(x, y, u), velocity, atol=1e-9, rtol=0)
    torch.testing.assert_close(Oblique().transp(x, y, aside), aside)


def test_component_inner_is_by_slice():
    manifold = Oblique(1)
    x, u, v = point_and_tangents(manifold, (3, 4, 2))
    by_slice = (u * v).sum((0, 2), keepdim=True).expand_as(u)
    torch.testing.assert_close(manifold.component_inner(x, u, v), by_slice)
    torch.testing.assert_close(manifold.inner(x, u, v), (u * v).sum())


@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
@pytest.mark.parametrize("dim", [0, 1])
def test_geoopt_optimizers_descend_and_stay(optimizer, dim):
    torch.manual_seed(0)
    manifold = Oblique(dim)
    weight = geoopt.ManifoldParameter(manifold.random(6, 4, 3, 3), manifold=manifold)
    target = plain(manifold.random(6, 4, 3, 3))
    options = {"momentum": 0.9} if optimizer is geoopt.optim.RiemannianSGD else {}
    steps = optimizer([weight], lr=0.05, **options)
    losses = []
    for _ in range(50):
        steps.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        steps.step()
    assert losses[-1] < 0.5 * losses[0]
    assert error(weight, dim) <= 1e-6
    buffer = next(v for k, v in steps.state[weight].items() if k in ("momentum_buffer", "exp_avg"))
    assert manifold.check_vector_on_tangent(weight, buffer, explain=True) == (True, None)


def test_arguments_rebuild_it():
    manifold = Oblique(1)
    assert str(Oblique(**manifold.arguments)) == str(manifold) == "Oblique(dim=1)"
    assert copy.deepcopy(manifold).arguments == {"dim": 1}


def test_origin_is_on_the_manifold():
    origin = Oblique().origin(3, 4)
    assert isinstance(origin, geoopt.ManifoldTensor)
    assert torch.equal(plain(origin), torch.full((3, 4), 0.5))


def test_checks_say_what_is_wrong():
    manifold = Oblique()
    x, u = point_and_tangents(manifold, (3, 5), count=1)
    assert manifold.check_vector_on_tangent(x, u)
    assert not manifold.check_vector_on_tangent(x, u + 0.01 * x)
    ok, reason = manifold.check_point_on_manifold(3 * x, explain=True)
    assert not ok
    assert "2 from 1" in reason
    assert not manifold.check_point_on_manifold(torch.full((2, 3), torch.nan))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.full((2, 3), torch.nan), torch.full((2, 3), torch.inf)])
def test_slices_without_direction_have_no_projection(bad):
    with pytest.raises(ValueError, match="zero or not finite"):
        Oblique().projx(bad)


@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((5, 1), 0), ((3, 4), 2), ((0, 3), 0), ((3, 0), 0)])
def test_shapes_without_slices_of_two_entries(shape, dim):
    with pytest.raises(ValueError, match=r"Oblique\(dim=\d\) needs"):
        Oblique(dim).random(*shape)
    with pytest.raises(ValueError, match=r"Oblique\(dim=\d\) needs"):
        Oblique(dim).dimension(shape)
    with pytest.raises(ValueError, match=r"Oblique\(dim=\d\) needs"):
        geoopt.ManifoldParameter(torch.ones(shape), manifold=Oblique(dim))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_dtypes_that_are_not_real_floats(dtype):
    with pytest.raises(TypeError, match=f"got dtype {dtype}"):
        Oblique().projx(torch.ones(3, 3).to(dtype))


def test_bad_dim():
    with pytest.raises(ValueError, match=r"dim must be an integer, got 1\.5"):
        Oblique(1.5)
