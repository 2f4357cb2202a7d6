import copy

import geoopt
import numpy as np
import pymanopt.manifolds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds import Stiefel, diagnostics, frames

RETRACTIONS = ("qr", "polar", "cayley")
SHAPES = [(6, 3), (3, 6), (4, 4), (1, 5), (5, 1), (3, 2, 3), (4, 2, 2, 2), (9, 1, 2, 2), (2, 1, 2, 2, 2)]
small = st.integers(1, 5)
shapes = st.one_of(st.tuples(small, small), st.tuples(small, small, small), st.tuples(small, small, st.just(2), small))


def as_columns(x, batched=False):
    matrix = x if batched else x.reshape(x.shape[0], -1)
    return matrix if matrix.shape[-2] > matrix.shape[-1] else matrix.mT


def error(x, batched=False):
    frame = as_columns(x.detach().as_subclass(torch.Tensor).double(), batched)
    return float((frame.mT @ frame - torch.eye(frame.shape[-1], dtype=frame.dtype)).abs().max())


def point_and_tangents(manifold, shape, seed=0, dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(seed)
    x = manifold.random(*shape, dtype=dtype, generator=generator).as_subclass(torch.Tensor)
    draws = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]
    return x, *(manifold.proju(x, draw) for draw in draws)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, retraction=st.sampled_from(RETRACTIONS), seed=st.integers(0, 2**31))
def test_is_a_manifold(shape, retraction, seed):
    report = diagnostics.check_manifold(Stiefel(retraction), shape, order=2 if retraction == "polar" else 1, seed=seed)
    # a zero-dimensional manifold (1 x 1) has no unit tangent vector to check a metric with
    expected_failures = {"metric"} if Stiefel().dimension(shape) == 0 else set()
    assert {r.check for r in report.reports if not r.ok} <= expected_failures, str(report)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.lists(st.integers(1, 2), min_size=0, max_size=2),
    matrix=st.tuples(st.integers(1, 3), st.integers(2, 4)),
    retraction=st.sampled_from(RETRACTIONS),
)
def test_batched_is_a_manifold(batch, matrix, retraction):
    assert (report := diagnostics.check_manifold(Stiefel(retraction, batched=True), (*batch, *matrix))), str(report)


@pytest.mark.parametrize("retraction", ["qr", "cayley"])
def test_first_order_retractions_are_not_second_order(retraction):
    assert not diagnostics.check_retraction(Stiefel(retraction), Stiefel().random(6, 3, dtype=torch.float64), order=2)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(72, 16), (16, 72), (32, 32), (24, 8, 3, 3), (48, 2, 3, 3)]),
    retraction=st.sampled_from(RETRACTIONS),
    length=st.floats(-4, 5).map(lambda e: 10**e),
    rank=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 2**31),
)
def test_float32_steps_of_any_length_stay_orthonormal(shape, retraction, length, rank, seed):
    manifold = Stiefel(retraction)
    length = min(length, 100.0) if retraction == "cayley" else length
    generator = torch.Generator().manual_seed(seed)
    x = manifold.random(*shape, generator=generator).as_subclass(torch.Tensor)
    for _ in range(5):
        left, right = (
            torch.randn(shape[0], rank, generator=generator),
            torch.randn(rank, x[0].numel(), generator=generator),
        )
        u = manifold.proju(x, (left @ right).reshape(shape))
        x = manifold.retr(x, u * (length / torch.linalg.vector_norm(u)))
        assert error(x) <= 2e-6


def test_float32_geodesics_are_as_good_as_their_input():
    manifold = Stiefel()
    x, u = point_and_tangents(manifold, (40, 12), dtype=torch.float32, count=1)
    step = 30 * u / torch.linalg.vector_norm(u)
    torch.testing.assert_close(
        manifold.expmap(x, step), manifold.expmap(x.double(), step.double()).float(), rtol=0, atol=2e-7
    )
    assert error(manifold.expmap(x, step)) <= 1e-6


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_drift_does_not_accumulate(retraction):
    manifold = Stiefel(retraction)
    x, _ = point_and_tangents(manifold, (96, 24), dtype=torch.float32, count=1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        u = manifold.proju(x, torch.randn(x.shape, generator=generator))
        x = manifold.retr(x, 0.01 * u)
    assert error(x) <= 2e-6


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6])
def test_q_factors_agree_and_are_orthonormal(condition, rows):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(60, 12, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    y64 = (left * torch.logspace(0, -float(np.log10(condition)), 12, dtype=torch.float64)) @ right
    reference = frames.householder_q(y64, False)
    y = y64.mT.contiguous() if rows else y64
    for factor in (frames.cholesky_q, frames.householder_q, frames.q_factor):
        q = factor(y, rows)
        torch.testing.assert_close(q.mT if rows else q, reference, atol=1e-14 * condition, rtol=0)
        q32 = factor(y.float(), rows)
        assert error(q32) <= 2e-6
        assert q32.is_contiguous()
    assert bool((torch.linalg.solve(reference.mT @ reference, reference.mT @ y64).diagonal() > 0).all())


def test_near_identity_takes_no_householder(monkeypatch):
    """The speed of a step rests on this: an ordinary one never calls the slow factorization."""
    manifold = Stiefel()
    x, u, _ = point_and_tangents(manifold, (12, 30), dtype=torch.float32)
    expected = manifold.retr(x, 0.01 * u)
    monkeypatch.setattr(torch.linalg, "qr", None)
    assert torch.equal(manifold.retr(x, 0.01 * u), expected)
    with pytest.raises(TypeError):
        manifold.retr(x, 10 * u)


@pytest.mark.parametrize("shape", [(7, 4), (6, 5), (6, 1)])
def test_agrees_with_pymanopt(shape):
    manifold = Stiefel("qr")
    x, u, v = point_and_tangents(manifold, shape)
    ambient = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    arrays = [t.numpy() for t in (x, u, v, ambient)]
    theirs = pymanopt.manifolds.Stiefel(*shape, retraction="qr")
    polar = pymanopt.manifolds.Stiefel(*shape, retraction="polar")
    point, step, vector, normal = arrays
    assert theirs.dim == manifold.dimension(shape)
    for ours, expected in (
        (manifold.proju(x, ambient), theirs.projection(point, normal)),
        (manifold.egrad2rgrad(x, ambient), theirs.euclidean_to_riemannian_gradient(point, normal)),
        (manifold.retr(x, u), theirs.retraction(point, step)),
        (Stiefel("polar").retr(x, u), polar.retraction(point, step)),
        (manifold.expmap(x, u), theirs.exp(point, step)),
        (manifold.inner(x, u, v), theirs.inner_product(point, step, vector)),
        (
            manifold.transp(x, manifold.retr(x, u), v),
            theirs.transport(point, theirs.retraction(point, step), vector),
        ),
    ):
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


def test_agrees_with_geoopt_on_tall_matrices():
    ours, theirs = Stiefel(), geoopt.Stiefel(canonical=False)
    x, u, v = point_and_tangents(ours, (3, 7, 4)[1:])
    torch.testing.assert_close(ours.proju(x, x + v), theirs.proju(x, x + v))
    torch.testing.assert_close(ours.retr(x, u), theirs.retr(x, u))
    torch.testing.assert_close(ours.expmap(x, u), theirs.expmap(x, u))
    torch.testing.assert_close(ours.projx(x + v), theirs.projx(x + v))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4)])
def test_cayley_is_the_rotation_of_its_definition(shape):
    manifold = Stiefel("cayley")
    x, u = point_and_tangents(manifold, shape, count=1)
    frame, step = as_columns(x), as_columns(u)
    eye = torch.eye(frame.shape[0], dtype=frame.dtype)
    half = (eye - frame @ frame.mT / 2) @ step @ frame.mT
    skew = half - half.mT
    torch.testing.assert_close(skew @ frame, step)
    expected = torch.linalg.solve(eye - skew / 2, (eye + skew / 2) @ frame)
    torch.testing.assert_close(as_columns(manifold.retr(x, u)), expected)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, retraction=st.sampled_from(RETRACTIONS), seed=st.integers(0, 2**31))
def test_a_weight_is_the_matrix_out_by_fan_in(shape, retraction, seed):
    """A verb on a convolution weight is that on the flattened matrix, on its transpose the transposed."""
    manifold = Stiefel(retraction)
    x, u, v = point_and_tangents(manifold, shape, seed)
    flat = [t.reshape(shape[0], -1) for t in (x, u, v)]
    other = [t.mT for t in flat]
    for verb, arguments in (("retr", 2), ("expmap", 2), ("proju", 2), ("projx", 1), ("retr_transp", 3)):
        results = [getattr(manifold, verb)(*ts[:arguments]) for ts in ((x, u, v), flat, other)]
        for given_, matrix, transposed in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert given_.shape == shape
            assert given_.is_contiguous()
            torch.testing.assert_close(given_.reshape(shape[0], -1), matrix, atol=1e-13, rtol=0)
            if flat[0].shape[0] != flat[0].shape[1]:  # a square matrix reads its rows either way
                torch.testing.assert_close(transposed.mT, matrix, atol=1e-13, rtol=0)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("matrix", [(5, 3), (3, 5)])
def test_batched_is_each_matrix_alone(retraction, matrix):
    together, alone = Stiefel(retraction, batched=True), Stiefel(retraction)
    x, u, v = point_and_tangents(together, (2, 3, *matrix))
    y, w = together.retr_transp(x, u, v)
    for i in np.ndindex(2, 3):
        torch.testing.assert_close(y[i], alone.retr(x[i], u[i]))
        torch.testing.assert_close(w[i], alone.transp(x[i], y[i], v[i]))
        torch.testing.assert_close(together.expmap(x, u)[i], alone.expmap(x[i], u[i]))
        torch.testing.assert_close(together.projx(x + v)[i], alone.projx(x[i] + v[i]))
        torch.testing.assert_close(together.inner(x, u, v)[i], alone.inner(x[i], u[i], v[i]))
    assert together.inner(x, u, keepdim=True).shape == (2, 3, 1, 1)
    assert alone.inner(x[0, 0], u[0, 0], keepdim=True).shape == (1, 1)
    assert together.dimension(x.shape) == 6 * alone.dimension(matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_half_precision_is_float32_rounded(dtype, retraction):
    manifold = Stiefel(retraction)
    x, u, v = point_and_tangents(manifold, (6, 2, 3), dtype=dtype)
    wide = [t.float() for t in (x, u, v)]
    for half, full in zip(manifold.retr_transp(x, u, v), manifold.retr_transp(*wide), strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), full, rtol=torch.finfo(dtype).eps, atol=2e-3)
    assert torch.equal(manifold.proju(x, u), manifold.proju(*wide[:2]).to(dtype))
    assert torch.equal(manifold.expmap(x, u), manifold.expmap(*wide[:2]).to(dtype))
    for name in ("random", "origin"):
        point = getattr(manifold, name)(8, 20, dtype=dtype)
        assert point.dtype == dtype
        assert manifold.check_point_on_manifold(point, explain=True) == (True, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_projx_is_the_nearest_point(shape):
    manifold = Stiefel()
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(shape, dtype=torch.float64, generator=generator)
    nearest = manifold.projx(y)
    assert error(nearest) < 1e-14
    for seed in range(20):
        other = manifold.random(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.linalg.vector_norm(y - nearest) <= torch.linalg.vector_norm(y - other) + 1e-12
    assert error(manifold.projx(torch.zeros(shape))) < 2e-6


def test_one_projection_does_for_momentum_and_gradient():
    manifold = Stiefel()
    assert manifold.projects_linearly
    x, u, v = point_and_tangents(manifold, (4, 9))
    gradient = torch.randn(4, 9, dtype=torch.float64)
    y, carried = manifold.retr_transp(x, u, v)
    torch.testing.assert_close(0.9 * carried + manifold.egrad2rgrad(y, gradient), manifold.proju(y, 0.9 * v + gradient))


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("shape", [(4, 2, 3), (5, 3)])
def test_verbs_are_differentiable(retraction, shape):
    manifold = Stiefel(retraction)
    x, u = point_and_tangents(manifold, shape, count=1)
    u = (0.05 * u).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: manifold.retr(x, manifold.proju(x, v)), u)
    assert torch.autograd.gradcheck(lambda v: manifold.expmap(x, manifold.proju(x, v)), u)


def test_random_is_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = (
        Stiefel(batched=True).random(20000, 3, 2, dtype=torch.float64, generator=generator).as_subclass(torch.Tensor)
    )
    assert draws.mean(0).abs().max() < 0.02
    torch.testing.assert_close(
        draws.square().mean(0), torch.full((3, 2), 1 / 3, dtype=torch.float64), atol=0.01, rtol=0
    )
    # entries of a Haar matrix have no preferred sign; those of a Q factor with the signs of LAPACK do
    assert abs((draws[:, 0, 0] > 0).double().mean() - 0.5) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_origin_is_the_identity(shape):
    origin = Stiefel().origin(*shape)
    frame = as_columns(origin.as_subclass(torch.Tensor))
    assert torch.equal(frame, torch.eye(*frame.shape))
    assert isinstance(origin, geoopt.ManifoldTensor)


@pytest.mark.parametrize("manifold", [Stiefel(), Stiefel("polar"), Stiefel("cayley", batched=True)])
def test_arguments_rebuild_it(manifold):
    assert str(Stiefel(**manifold.arguments)) == str(manifold)
    assert copy.deepcopy(manifold).arguments == manifold.arguments


def test_str_shows_what_is_not_default():
    assert str(Stiefel()) == "Stiefel()"
    assert str(Stiefel("polar", batched=True)) == "Stiefel(retraction='polar', batched=True)"


@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
@pytest.mark.parametrize("shape", [(6, 2, 2, 2), (12, 1, 2, 2)])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_geoopt_optimizers_descend_and_stay(optimizer, shape, retraction):
    torch.manual_seed(0)
    manifold = Stiefel(retraction)
    weight = geoopt.ManifoldParameter(manifold.random(*shape), manifold=manifold)
    target = manifold.random(*shape).as_subclass(torch.Tensor)
    options = {"momentum": 0.9} if optimizer is geoopt.optim.RiemannianSGD else {}
    steps = optimizer([weight], lr=0.05, **options)
    losses = []
    for _ in range(50):
        steps.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        steps.step()
    assert losses[-1] < 0.7 * losses[0]
    assert error(weight) <= 2e-6
    buffer = next(v for k, v in steps.state[weight].items() if k in ("momentum_buffer", "exp_avg"))
    assert manifold.check_vector_on_tangent(weight, buffer, explain=True) == (True, None)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_nan_never_passes_for_a_point(retraction):
    manifold = Stiefel(retraction)
    x, u = point_and_tangents(manifold, (3, 5), dtype=torch.float32, count=1)
    u[0, 0] = torch.nan
    try:
        y = manifold.retr(x, u)
    except torch.linalg.LinAlgError:
        y = torch.full_like(x, torch.nan)
    assert not manifold.check_point_on_manifold(y)
    assert not manifold.check_vector_on_tangent(x, u)
    with pytest.raises(ValueError, match="NaN or infinite"):
        manifold.projx(u)


def test_checks_say_what_is_wrong():
    manifold = Stiefel()
    x, u = point_and_tangents(manifold, (3, 5), count=1)
    assert manifold.check_point_on_manifold(x)
    assert manifold.check_vector_on_tangent(x, 1e6 * u)
    ok, reason = manifold.check_point_on_manifold(2 * x, explain=True)
    assert not ok
    assert "reaches 3" in reason
    ok, reason = manifold.check_vector_on_tangent(x, u + 1e-3 * x, explain=True)
    assert not ok
    assert "UᵀX" in reason


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 0, 2)])
def test_shapes_that_are_no_matrix(shape):
    with pytest.raises(ValueError, match=r"two or more dimensions, got shape"):
        Stiefel().proju(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"two or more dimensions, got shape"):
        Stiefel().dimension(shape)
    with pytest.raises(ValueError, match=r"two or more dimensions, got shape"):
        geoopt.ManifoldParameter(torch.zeros(shape), manifold=Stiefel())


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_dtypes_that_are_not_real_floats(dtype):
    x = torch.ones(3, 3).to(dtype)
    with pytest.raises(TypeError, match=f"got dtype {dtype}"):
        Stiefel().projx(x)


def test_bad_arguments():
    with pytest.raises(ValueError, match="qr, polar, cayley, got 'svd'"):
        Stiefel("svd")
    with pytest.raises(TypeError, match="batched must be a bool, got 2"):
        Stiefel(batched=2)
    with pytest.raises(ValueError, match=r"shape \(3, 4\), the weight has \(3, 5\)"):
        Stiefel().retr(torch.eye(3, 5), torch.zeros(3, 4))


@pytest.mark.parametrize("verb", ["logmap", "dist"])
def test_what_is_not_offered_names_what_is(verb):
    with pytest.raises(NotImplementedError, match="offers expmap"):
        getattr(Stiefel(), verb)(torch.eye(3), torch.eye(3))
