"""Grassmann: diagnostics, pymanopt, bases of a subspace, principal angles, optimizers on it."""

import copy
import io

import geoopt
import numpy as np
import pymanopt.manifolds
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from retract.manifolds import Stiefel, diagnostics
from retract.manifolds.grassmann import Grassmann
from retract.optim import RiemannianGD, RiemannianSGD

RETRACTIONS = ("polar", "qr")
small = st.integers(1, 5)
shapes = st.one_of(st.tuples(small, small), st.tuples(small, small, small), st.tuples(small, small, st.just(2), small))


def normal(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def turn_of(shape, seed=7):
    """An orthogonal matrix that changes the basis of a subspace, of a batch if there is one."""
    *batch, p = (*shape[:-2], min(shape[-2:]))
    return Stiefel(batched=True).random(
        *batch, p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def matrix_shape(shape):
    return shape[0], int(np.prod(shape[1:]))


def point_and_tangents(manifold, shape, seed=0, dtype=torch.float64):
    x = manifold.projx(normal(*shape, seed=seed, dtype=dtype))
    return x, *(manifold.proju(x, normal(*shape, seed=seed + i, dtype=dtype)) for i in (1, 2))


def columns(x):
    return x if x.shape[-2] > x.shape[-1] else x.mT


@settings(max_examples=8, deadline=None)
@given(shape=shapes, retraction=st.sampled_from(RETRACTIONS), seed=st.integers(0, 2**31))
def test_is_a_manifold_with_a_second_order_retraction(shape, retraction, seed):
    assume(Grassmann().dimension(shape) > 0)  # otherwise tangent vectors are rounding errors
    element = turn_of(matrix_shape(shape), seed).as_subclass(Tensor)
    report = diagnostics.check_manifold(Grassmann(retraction), shape, order=2, element=element, seed=seed)
    assert report, str(report)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (4, 2, 2)])
def test_all_of_a_space_is_one_point(shape):
    manifold = Grassmann()
    x, y = (manifold.projx(normal(*shape, seed=seed)) for seed in (0, 1))
    assert manifold.dimension(shape) == 0
    assert float(manifold.dist(x, y)) < 1e-14
    for vector in (manifold.proju(x, normal(*shape, seed=2)), manifold.logmap(x, y)):
        assert float(vector.abs().max()) < 1e-14


@settings(max_examples=6, deadline=None)
@given(
    batch=st.lists(st.integers(1, 2), min_size=0, max_size=2),
    matrix=st.sampled_from([(1, 3), (4, 2), (2, 4), (3, 1)]),
    retraction=st.sampled_from(RETRACTIONS),
)
def test_batched_is_a_manifold(batch, matrix, retraction):
    element = turn_of((*batch, *matrix)).as_subclass(Tensor)
    manifold = Grassmann(retraction, batched=True)
    report = diagnostics.check_manifold(manifold, (*batch, *matrix), order=2, element=element)
    assert report, str(report)


@pytest.mark.parametrize("shape", [(7, 4), (6, 5), (6, 1)])
def test_agrees_with_pymanopt(shape):
    manifold, theirs = Grassmann(), pymanopt.manifolds.Grassmann(*shape)
    x, u, v = point_and_tangents(manifold, shape)
    y, ambient = manifold.projx(normal(*shape, seed=9)), normal(*shape, seed=10)
    point, other, step, vector = (t.numpy() for t in (x, y, u, v))
    assert theirs.dim == manifold.dimension(shape)
    for ours, expected in (
        (manifold.proju(x, ambient), theirs.projection(point, ambient.numpy())),
        (manifold.egrad2rgrad(x, ambient), theirs.euclidean_to_riemannian_gradient(point, ambient.numpy())),
        (manifold.retr(x, u), theirs.retraction(point, step)),
        (manifold.inner(x, u, v), theirs.inner_product(point, step, vector)),
        (manifold.dist(x, y), theirs.dist(point, other)),
        (manifold.logmap(x, y), theirs.log(point, other)),
        (manifold.embed(manifold.expmap(x, u)), manifold.embed(torch.from_numpy(theirs.exp(point, step)))),
        (manifold.retr_transp(x, u, v)[1], theirs.transport(point, theirs.retraction(point, step), vector)),
    ):
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, retraction=st.sampled_from(RETRACTIONS), seed=st.integers(0, 2**20))
def test_a_weight_is_the_matrix_out_by_fan_in(shape, retraction, seed):
    """A verb on a convolution weight is that on the flattened matrix, on its transpose the transposed."""
    manifold = Grassmann(retraction)
    x, u, v = point_and_tangents(manifold, shape, seed)
    y = manifold.projx(normal(*shape, seed=seed + 3))
    flat = [t.reshape(shape[0], -1) for t in (x, u, v, y)]
    other = [t.mT for t in flat]
    square = flat[0].shape[0] == flat[0].shape[1]
    for verb, arguments in (
        ("retr", (0, 1)), ("expmap", (0, 1)), ("proju", (0, 3)), ("logmap", (0, 3)), ("transp", (0, 3, 2)),
        ("retr_transp", (0, 1, 2)), ("angles", (0, 3)), ("dist", (0, 3)),
    ):  # fmt: skip
        results = [getattr(manifold, verb)(*(ts[i] for i in arguments)) for ts in ((x, u, v, y), flat, other)]
        for given_, matrix, transposed in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            if verb in ("angles", "dist"):
                torch.testing.assert_close(given_, matrix, atol=1e-12, rtol=0)
                torch.testing.assert_close(transposed, matrix, atol=1e-7, rtol=0)
                continue
            assert given_.shape == shape
            torch.testing.assert_close(given_.reshape(shape[0], -1), matrix, atol=1e-12, rtol=0)
            if not square:  # a square matrix reads its rows either way
                torch.testing.assert_close(transposed.mT, matrix, atol=1e-9, rtol=0)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("matrix", [(5, 3), (3, 5)])
def test_batched_is_each_matrix_alone(retraction, matrix):
    together, alone = Grassmann(retraction, batched=True), Grassmann(retraction)
    x, u, v = point_and_tangents(together, (2, 3, *matrix))
    z = together.projx(normal(2, 3, *matrix, seed=5))
    y, w = together.retr_transp(x, u, v)
    turn = turn_of((2, 3, *matrix)).as_subclass(Tensor)
    for i in np.ndindex(2, 3):
        torch.testing.assert_close(y[i], alone.retr(x[i], u[i]))
        torch.testing.assert_close(w[i], alone.transp(x[i], y[i], v[i]))
        torch.testing.assert_close(together.transp(x, z, v)[i], alone.transp(x[i], z[i], v[i]))
        torch.testing.assert_close(together.logmap(x, z)[i], alone.logmap(x[i], z[i]))
        torch.testing.assert_close(together.angles(x, z)[i], alone.angles(x[i], z[i]))
        torch.testing.assert_close(together.dist(x, z)[i], alone.dist(x[i], z[i]))
        torch.testing.assert_close(together.act(x, turn)[i], alone.act(x[i], turn[i]))
        torch.testing.assert_close(together.embed(x)[i], alone.embed(x[i]))
    assert together.dist(x, z, keepdim=True).shape == (2, 3, 1, 1)
    assert alone.dist(x[0, 0], z[0, 0], keepdim=True).shape == (1, 1)
    assert together.dimension(x.shape) == 6 * alone.dimension(matrix)


# -------------------------------------------------------------------------------------- bases of a subspace


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 3, 2)])
def test_bases_of_both_ends_may_be_changed_apart(shape):
    manifold = Grassmann()
    x, u, v = point_and_tangents(manifold, shape)
    y = manifold.projx(normal(*shape, seed=4))
    here, there = (turn_of(matrix_shape(shape), seed).as_subclass(Tensor) for seed in (1, 2))
    xq, yp, vq = manifold.act(x, here), manifold.act(y, there), manifold.act(v, here)
    torch.testing.assert_close(manifold.embed(xq), manifold.embed(x))
    torch.testing.assert_close(manifold.dist(xq, yp), manifold.dist(x, y))
    torch.testing.assert_close(manifold.logmap(xq, yp), manifold.act(manifold.logmap(x, y), here))
    torch.testing.assert_close(manifold.transp(xq, yp, vq), manifold.act(manifold.transp(x, y, v), there))
    moved, carried = manifold.retr_transp(xq, manifold.act(u, here), vq)
    torch.testing.assert_close(moved, manifold.act(manifold.retr(x, u), here))
    torch.testing.assert_close(carried, manifold.act(manifold.retr_transp(x, u, v)[1], here))


@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_both_retractions_reach_one_subspace_and_carry_one_vector(shape):
    x, u, v = point_and_tangents(Grassmann(), shape)
    (y, carried), (z, other) = (Grassmann(retraction).retr_transp(x, u, v) for retraction in RETRACTIONS)
    turn = columns(y).mT @ columns(z)
    torch.testing.assert_close(Grassmann().act(y, turn), z)
    torch.testing.assert_close(Grassmann().act(carried, turn), other)
    torch.testing.assert_close(Grassmann("qr").transp(x, z, v), other)


def test_one_projection_does_for_momentum_and_gradient():
    manifold = Grassmann()
    assert manifold.projects_linearly
    assert not Grassmann("qr").projects_linearly
    x, u, v = point_and_tangents(manifold, (4, 9))
    gradient = normal(4, 9, seed=8)
    y, carried = manifold.retr_transp(x, u, v)
    torch.testing.assert_close(carried, manifold.transp(x, y, v))
    torch.testing.assert_close(0.9 * carried + manifold.egrad2rgrad(y, gradient), manifold.proju(y, 0.9 * v + gradient))


def test_the_embedding_is_an_isometry_onto_projectors():
    manifold = Grassmann()
    x, u, v = point_and_tangents(manifold, (6, 2))
    derivatives = [torch.func.jvp(manifold.embed, (x,), (w,))[1] for w in (u, v)]
    torch.testing.assert_close((derivatives[0] * derivatives[1]).sum(), manifold.inner(x, u, v))
    projector = 2**0.5 * manifold.embed(x)
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(manifold.embed(x.mT), manifold.embed(x))


# --------------------------------------------------------------------------------- geodesics, angles, logarithm


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(7, 3), (2, 6), (5, 4), (3, 1), (4, 4)]),
    exponents=st.lists(st.floats(-9, 0.19), min_size=4, max_size=4),
    seed=st.integers(0, 2**20),
)
def test_principal_angles_are_exact_from_tiny_to_right(shape, exponents, seed):
    """Subspaces made with the given angles: known without loss of digits, however small."""
    manifold, n, p = Grassmann(), max(shape), min(shape)
    count = min(p, n - p)
    angles = torch.tensor([10**e for e in exponents][:count], dtype=torch.float64)
    frame = torch.linalg.qr(normal(n, n, seed=seed))[0]
    start, away = frame[:, :p], frame[:, p : p + count]
    end = start.clone()
    end[:, :count] = start[:, :count] * angles.cos() + away * angles.sin()
    x, y = (t if shape[0] > shape[1] else t.mT.contiguous() for t in (start, end @ turn_of((n, p)).as_subclass(Tensor)))
    expected = torch.cat((torch.zeros(p - count, dtype=torch.float64), angles)).sort().values
    torch.testing.assert_close(manifold.angles(x, y), expected, atol=2e-15 * n, rtol=1e-12)
    torch.testing.assert_close(manifold.dist(x, y), torch.linalg.vector_norm(angles), atol=2e-15 * n, rtol=1e-12)
    log = manifold.logmap(x, y)
    torch.testing.assert_close(manifold.norm(x, log), torch.linalg.vector_norm(angles), atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(manifold.embed(manifold.expmap(x, log)), manifold.embed(y), atol=1e-12, rtol=0)
    scipys = torch.from_numpy(np.sort(scipy.linalg.subspace_angles(columns(x).numpy(), columns(y).numpy())))
    if shape[0] != shape[1]:
        torch.testing.assert_close(manifold.angles(x, y), scipys, atol=1e-7, rtol=0)  # scipy's are cut off at 1e-8


def test_orthogonal_subspaces_are_pi_halves_apart():
    manifold, eye = Grassmann(), torch.eye(6, dtype=torch.float64)
    x, y = eye[:, :2], eye[:, 2:4]
    torch.testing.assert_close(manifold.angles(x, y), torch.full((2,), torch.pi / 2, dtype=torch.float64))
    log = manifold.logmap(x, y)
    torch.testing.assert_close(manifold.embed(manifold.expmap(x, log)), manifold.embed(y))
    nearly = y + 1e-7 * x
    length = torch.tensor(2**0.5 * (torch.pi / 2 - 1e-7), dtype=torch.float64)
    torch.testing.assert_close(manifold.norm(x, manifold.logmap(x, nearly)), length, atol=1e-13, rtol=0)
    assert torch.isfinite(manifold.transp(x, y, normal(6, 2))).all()
    assert torch.equal(manifold.logmap(x, x), torch.zeros_like(x))


def test_geodesics_are_those_of_the_textbook():
    """Edelman, Arias, Smith, theorem 2.3: x V cos(S) Vᵀ + U sin(S) Vᵀ with the velocity U S Vᵀ."""
    manifold = Grassmann()
    x, u, _ = point_and_tangents(manifold, (7, 3))
    left, values, right = torch.linalg.svd(2 * u, full_matrices=False)
    expected = (x @ right.mT * values.cos() + left * values.sin()) @ right
    torch.testing.assert_close(manifold.expmap(x, 2 * u), expected)


def test_verbs_are_differentiable():
    manifold = Grassmann()
    x, y = (manifold.projx(normal(6, 2, seed=seed)) for seed in (0, 1))
    u = normal(6, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: manifold.angles(x, manifold.retr(y, manifold.proju(y, v))), u)
    assert torch.autograd.gradcheck(lambda v: manifold.retr(x, manifold.proju(x, v)), u)
    assert torch.autograd.gradcheck(lambda v: manifold.expmap(x, manifold.proju(x, v)), u)


# --------------------------------------------------------------------------------------- optimizers, state, misuse


def leading_subspace_problem(manifold, shape=(9, 3)):
    """Minus the trace of a quadratic form, whose optimum is the leading eigenvectors'."""
    values = torch.tensor([5.0, 4, 3, 1, 1, 0.5, 0.2, 0.1, 0], dtype=torch.float64)
    vectors = torch.linalg.qr(normal(9, 9))[0]
    form = vectors * values @ vectors.mT
    weight = nn.Parameter(manifold.projx(normal(*shape, seed=1)))

    def loss():
        frame = columns(weight.flatten(1))
        return values[:3].sum() - (frame * (form @ frame)).sum()

    return weight, loss, vectors[:, :3]


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("shape", [(9, 3), (3, 9), (3, 3, 3)])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "nesterov", "armijo"])
def test_optimizers_find_the_leading_eigenvectors(retraction, shape, kind):
    manifold = Grassmann(retraction)
    weight, loss, expected = leading_subspace_problem(manifold, shape)
    group = {"params": [weight], "manifold": manifold}
    if kind == "armijo":
        optimizer = RiemannianGD([group], line_search="armijo")
    else:
        momentum = {} if kind == "sgd" else {"momentum": 0.8, "nesterov": kind == "nesterov"}
        optimizer = RiemannianSGD([group], lr=0.1 if kind == "sgd" else 0.03, **momentum)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(60 if kind == "armijo" else 200):
        optimizer.step(closure)
    assert manifold.check_point_on_manifold(weight.detach(), atol=1e-12, rtol=0)
    reached = columns(weight.detach().flatten(1)).contiguous()
    assert float(Grassmann().dist(reached, expected.contiguous())) < 1e-5


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_momentum_is_that_of_explicit_transport(retraction):
    """Either retraction takes the same subspaces: what the basis is does not show."""
    paths = []
    for name in ("polar", retraction):
        manifold = Grassmann(name)
        weight, loss, _ = leading_subspace_problem(manifold)
        optimizer = RiemannianSGD([{"params": [weight], "manifold": manifold}], lr=0.1, momentum=0.9)
        for _ in range(8):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        paths.append(manifold.embed(weight.detach()))
    torch.testing.assert_close(*paths, atol=1e-12, rtol=0)


def test_state_dicts_hold_its_name_and_arguments():
    weight, loss, _ = leading_subspace_problem(Grassmann("qr"))
    weights = [weight, copy.deepcopy(weight)]
    optimizers = [RiemannianSGD([{"params": [w], "manifold": Grassmann("qr")}], lr=0.1, momentum=0.9) for w in weights]
    loss().backward()
    optimizers[0].step()
    saved = io.BytesIO()
    torch.save(optimizers[0].state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert state["param_groups"][0]["manifold"] == {
        "name": "Grassmann",
        "arguments": {"retraction": "qr", "batched": False},
    }
    optimizers[1].load_state_dict(state)
    for other in (Grassmann(), Stiefel()):
        stranger = RiemannianSGD([{"params": [copy.deepcopy(weight)], "manifold": other}], lr=0.1)
        with pytest.raises(ValueError, match="was saved on manifold"):
            stranger.load_state_dict(state)


@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
def test_geoopt_optimizers_descend_and_stay(optimizer):
    manifold = Grassmann()
    weight, _, expected = leading_subspace_problem(manifold)
    weight = geoopt.ManifoldParameter(weight.detach().clone(), manifold=manifold)
    steps = optimizer([weight], lr=0.05)
    before = float(manifold.dist(weight.detach(), expected.contiguous()))
    for _ in range(60):
        steps.zero_grad()
        manifold.dist(weight, expected.contiguous()).square().backward()
        steps.step()
    assert float(manifold.dist(weight.detach(), expected.contiguous())) < 0.2 * before
    assert manifold.check_point_on_manifold(weight, explain=True) == (True, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded(dtype):
    manifold = Grassmann()
    x, u, v = point_and_tangents(manifold, (6, 3, 3), dtype=dtype)
    wide = [t.float() for t in (x, u, v)]
    assert manifold.check_point_on_manifold(x)
    assert manifold.check_vector_on_tangent(x, u)
    for verb, arguments in (("retr_transp", 3), ("transp", 3), ("logmap", 2), ("proju", 2), ("expmap", 2)):
        results = [getattr(manifold, verb)(*ts[:arguments]) for ts in ((x, u, v), wide)]
        for half, full in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert half.dtype == dtype
            assert torch.equal(half, full.to(dtype))


def test_random_and_origin_are_points_that_know_their_manifold():
    for point in (Grassmann().random(4, 2, 3), Grassmann().origin(4, 2, 3)):
        assert isinstance(point, geoopt.ManifoldTensor)
        assert isinstance(point.manifold, Grassmann)
        assert Grassmann().check_point_on_manifold(point)


@pytest.mark.parametrize("manifold", [Grassmann(), Grassmann("qr"), Grassmann(batched=True)])
def test_arguments_rebuild_it(manifold):
    assert str(Grassmann(**manifold.arguments)) == str(manifold)
    assert copy.deepcopy(manifold).arguments == manifold.arguments


def test_str_shows_what_is_not_default():
    assert str(Grassmann()) == "Grassmann()"
    assert str(Grassmann("qr", batched=True)) == "Grassmann(retraction='qr', batched=True)"


def test_checks_say_what_is_wrong():
    manifold = Grassmann()
    x, u, _ = point_and_tangents(manifold, (3, 5))
    assert manifold.check_vector_on_tangent(x, 1e6 * u)
    rotation = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0]], dtype=torch.float64)
    vertical = rotation @ x
    assert Stiefel().check_vector_on_tangent(x, vertical)
    ok, reason = manifold.check_vector_on_tangent(x, vertical, explain=True)
    assert not ok
    assert "XᵀU reaches 1" in reason
    ok, reason = manifold.check_point_on_manifold(2 * x, explain=True)
    assert not ok
    assert "reaches 3" in reason
    assert not manifold.check_vector_on_tangent(x, torch.full_like(x, torch.nan))


def test_bad_arguments():
    with pytest.raises(ValueError, match="retraction must be one of polar, qr, got 'cayley'"):
        Grassmann("cayley")
    with pytest.raises(TypeError, match="batched must be a bool, got 2"):
        Grassmann(batched=2)
    with pytest.raises(ValueError, match=r"Grassmann\(\) needs a non-empty weight .* got shape \(5,\)"):
        Grassmann().proju(torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape \(3, 4\), the weight has \(3, 5\)"):
        Grassmann().logmap(torch.eye(3, 5), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"turn must have shape \(..., 3, 3\) .* got \(5, 5\)"):
        Grassmann().act(torch.eye(3, 5), torch.eye(5))
