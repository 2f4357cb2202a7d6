"""Row spaces by variable projection: the objective, its gradient, descent, published and known optima, bad input."""

import math

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds import Stiefel
from retract.manifolds.grassmann import Grassmann
from retract.nets.init import _variable_projection
from retract.nets.init._variable_projection import variable_projection

METHODS = ("lbfgs", "descent")
FLOAT = torch.float64


def normal(*size, seed=0):
    return torch.randn(*size, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


def orthonormal(*size, seed=0):
    return torch.linalg.qr(normal(*size, seed=seed))[0]


def spectral(weight, rank):
    return torch.linalg.svd(weight, full_matrices=False).Vh[..., :rank, :].mT


def relative_error(weight, basis, slope=0.0, taps=1):
    """From the definition: the error of filters of the best length along their projections, each on its own."""
    total, filters = 0.0, weight.double().reshape(-1, taps, weight.shape[1])
    for w in filters:
        norm, projected = float(w.norm()), float((w @ basis.double()).norm())
        if norm == 0:
            continue
        angle = math.acos(min(1.0, projected / norm))
        rectified = (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi
        kernel = ((1 - slope) ** 2 * rectified + 2 * slope * math.cos(angle)) / (1 + slope**2)
        total += norm**2 * (1 - kernel**2)
    return total / float(filters.square().sum())


def error_of(weight, slope=0.0, taps=1):
    return _variable_projection._Error(weight, slope, taps)


@st.composite
def instances(draw):
    """Weights of any shape, spectrum and row lengths, with filters of one or several rows."""
    taps, filters, columns = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 10))
    rows, seed = taps * filters, draw(st.integers(0, 2**20))
    weight = normal(rows, columns, seed=seed)
    kind = draw(st.sampled_from(["gaussian", "decaying", "rows", "sparse", "identity"]))
    if kind == "decaying":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight = left * torch.arange(1.0, len(values) + 1, dtype=FLOAT) ** -1.5 @ right
    elif kind == "rows":
        weight *= (2 * normal(rows, 1, seed=seed + 1)).exp()
    elif kind == "sparse":
        weight *= normal(rows, columns, seed=seed + 1) > 0.7
    elif kind == "identity":
        weight = torch.eye(rows, columns, dtype=FLOAT)
    return weight, draw(st.integers(1, min(rows, columns))), draw(st.sampled_from([0.0, 0.2, 1.0, -0.7, 3.0])), taps


# ---------------------------------------------------------------------------------- the objective, its gradient


@settings(max_examples=40, deadline=None)
@given(instance=instances(), seed=st.integers(0, 1000))
def test_value_is_the_error_with_the_best_lengths(instance, seed):
    weight, rank, slope, taps = instance
    basis = orthonormal(weight.shape[1], rank, seed=seed)
    value, _ = error_of(weight, slope, taps)(basis)
    expected = relative_error(weight, basis, slope, taps) if weight.any() else 1.0
    assert float(value) == pytest.approx(expected, abs=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    taps=st.integers(1, 3),
    slope=st.sampled_from([0.0, 0.2, -0.7]),
    seed=st.integers(0, 1000),
)
def test_gradient_agrees_with_finite_differences(shape, taps, slope, seed):
    weight = normal(taps * shape[0], shape[1], seed=seed)
    rank = 1 + seed % (min(weight.shape) - 1)
    error, manifold = error_of(weight, slope, taps), Grassmann()
    frame = orthonormal(shape[1], rank, seed=seed + 1)
    direction = manifold.proju(frame, normal(*frame.shape, seed=seed + 2))
    _, gradient = error(frame)
    step = 1e-5
    ends = [float(error(manifold.expmap(frame, sign * step * direction))[0]) for sign in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)


def test_gradient_over_matrices_that_are_not_orthonormal():
    weight, matrix = normal(7, 5), normal(5, 2, seed=1)
    error = error_of(weight)

    def value(a):
        return float(error(torch.linalg.qr(a)[0])[0])

    frame = torch.linalg.qr(matrix)[0]
    gradient = _variable_projection._pulled_back(error(frame)[1], matrix, frame)
    direction, step = normal(5, 2, seed=2), 1e-5
    slope = (value(matrix + step * direction) - value(matrix - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, abs=1e-9)


def test_filters_orthogonal_to_the_row_space_pull_at_it():
    """The one-sided derivative along the descent direction is at least what the subgradient promises."""
    weight, frame = torch.eye(6, dtype=FLOAT), torch.eye(6, dtype=FLOAT)[:, :2]
    error, manifold = error_of(weight), Grassmann()
    value, gradient = error(frame)
    direction = -manifold.egrad2rgrad(frame, gradient)
    promise = -float((gradient * direction).sum())
    step = 1e-6
    fall = (float(value) - float(error(manifold.expmap(frame, step * direction))[0])) / step
    assert fall >= promise - 1e-5 > 0.01


# --------------------------------------------------------------------------------------- never above its start


@settings(max_examples=40, deadline=None)
@given(
    instance=instances(),
    method=st.sampled_from(METHODS),
    iterations=st.sampled_from([0, 1, 3, 10]),
    seed=st.one_of(st.none(), st.integers(0, 1000)),
)
def test_never_ends_above_its_start(instance, method, iterations, seed):
    weight, rank, slope, taps = instance
    start = spectral(weight, rank) if seed is None else orthonormal(weight.shape[1], rank, seed=seed)
    found = variable_projection(
        weight,
        rank,
        slope=slope,
        start=None if seed is None else start,
        taps=taps,
        iterations=iterations,
        method=method,
    )
    assert found.shape == (weight.shape[1], rank)
    torch.testing.assert_close(found.mT @ found, torch.eye(rank, dtype=FLOAT), atol=1e-12, rtol=0)
    if weight.any():
        before, after = (relative_error(weight, basis, slope, taps) for basis in (start, found))
        assert after <= before + 1e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_still_lowers_the_error(method, dtype):
    weight = normal(48, 32).to(dtype)
    found = variable_projection(weight, 3, method=method)
    assert found.dtype == dtype
    start = spectral(weight.float(), 3)
    assert relative_error(weight, found) < relative_error(weight, start) - 1e-4


# ------------------------------------------------------------------------------------------------ known optima


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_in_the_plane_it_is_the_best_angle(method, seed):
    weight = normal(30, 2, seed=seed)
    angles = torch.linspace(0, math.pi, 20001, dtype=FLOAT)
    lines = torch.stack((angles.cos(), angles.sin()))
    cosines = ((weight @ lines).abs() / weight.norm(dim=1, keepdim=True)).clamp(max=1)
    turned = torch.acos(cosines)
    kernels = (turned.sin() + (math.pi - turned) * cosines) / math.pi
    best = 1 - float((weight.square().sum(1, keepdim=True) * kernels**2).sum(0).max() / weight.square().sum())
    found = variable_projection(weight, 1, iterations=60, method=method)
    assert relative_error(weight, found) == pytest.approx(best, abs=1e-7)


def test_agrees_with_scipys_quasi_newton_over_both_factors():
    """Minimising over U and V together, with no elimination, ends at the same error."""
    weight, rank = normal(12, 10), 2
    basis = spectral(weight, rank)

    def objective(flat):
        left, right = torch.from_numpy(flat).split((24, 20))
        approximation = (left.reshape(12, 2) @ right.reshape(2, 10)).requires_grad_()
        dots, norms, lengths = (weight * approximation).sum(1), weight.norm(dim=1), approximation.norm(dim=1)
        cosine = dots / (norms * lengths)
        angle = torch.acos(cosine)
        kernels = (angle.sin() + (math.pi - angle) * cosine) / math.pi
        loss = (norms**2 + lengths**2 - 2 * norms * lengths * kernels).sum() / weight.square().sum()
        (gradient,) = torch.autograd.grad(loss, approximation)
        parts = (gradient @ right.reshape(2, 10).mT, left.reshape(12, 2).mT @ gradient)
        return float(loss.detach()), torch.cat([part.flatten() for part in parts]).detach().numpy()

    start = torch.cat([(weight @ basis).flatten(), basis.mT.flatten()]).numpy()
    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
    theirs = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    for method in METHODS:
        found = variable_projection(weight, rank, iterations=300, method=method)
        assert relative_error(weight, found) == pytest.approx(theirs.fun, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_published_optima(method):
    """Orthogonal 128 x 128 of rank 8, and the identity, whose spectral row space is where the error has a kink."""
    for weight in (orthonormal(128, 128), torch.eye(128, dtype=FLOAT)):
        assert relative_error(weight, variable_projection(weight, 8, method=method)) == pytest.approx(0.7945, abs=5e-4)
    errors = [relative_error(w, variable_projection(w, 4)) for w in (normal(64, 64, seed=s) for s in range(4))]
    assert sum(errors) / 4 == pytest.approx(0.6628, abs=0.006)


def test_a_linear_layer_keeps_its_singular_vectors():
    weight = normal(20, 12)
    found = variable_projection(weight, 3, slope=1.0)
    assert float(Grassmann().dist(found, spectral(weight, 3).contiguous())) < 1e-6
    worse = orthonormal(12, 3, seed=5)
    found = variable_projection(weight, 3, slope=1.0, start=worse, iterations=200)
    assert float(Grassmann().dist(found, spectral(weight, 3).contiguous())) < 1e-5


def test_lbfgs_ends_lower_in_fewer_evaluations(monkeypatch):
    """Why it is the default."""
    calls = {}
    evaluate = _variable_projection._Error.__call__

    def count(error, frame):
        calls[method] = calls.get(method, 0) + 1
        return evaluate(error, frame)

    monkeypatch.setattr(_variable_projection._Error, "__call__", count)
    errors, weight = {}, normal(64, 64)
    for method in METHODS:
        errors[method] = relative_error(weight, variable_projection(weight, 8, method=method))
    assert calls["lbfgs"] < 0.6 * calls["descent"]
    assert errors["lbfgs"] <= errors["descent"]


# --------------------------------------------------------------------------------------- invariances, structure


@pytest.mark.parametrize("method", METHODS)
def test_invariances(method):
    weight, rank = normal(14, 9), 2
    found = variable_projection(weight, rank, method=method)

    def distance(other, back=None, **options):
        moved = variable_projection(other, rank, method=method, **options)
        return float(Grassmann().dist(moved if back is None else back @ moved, found))

    turn = orthonormal(9, 9, seed=3)
    assert distance(weight @ turn, back=turn) < 1e-6
    assert distance(1e200 * weight) < 1e-6
    assert distance(1e-200 * weight) < 1e-6
    assert distance(weight[torch.randperm(14, generator=torch.Generator().manual_seed(0))]) < 1e-6
    assert distance(torch.cat((weight, torch.zeros(3, 9, dtype=FLOAT)))) < 1e-6
    basis = spectral(weight, rank) @ Stiefel().random(2, 2, dtype=FLOAT).as_subclass(torch.Tensor)
    assert distance(weight, start=basis) < 1e-6


def test_rows_of_a_filter_count_together():
    """A filter of two rows is as long, and as near to the row space, as the vector of both: here as one of them."""
    weight = normal(8, 6)
    padded = torch.stack((weight, torch.zeros_like(weight)), 1).flatten(0, 1)
    alone, together = variable_projection(weight, 2), variable_projection(padded, 2, taps=2)
    assert float(Grassmann().dist(alone, together)) < 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4), (1, 6), (6, 1)])
def test_full_rank_is_exact(method, shape):
    weight = normal(*shape)
    found = variable_projection(weight, min(shape), method=method)
    torch.testing.assert_close(weight @ found @ found.mT, weight, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_zero_weights_keep_their_start(method):
    start = orthonormal(5, 2)
    assert torch.equal(variable_projection(torch.zeros(4, 5, dtype=FLOAT), 2, start=start, method=method), start)


def test_arguments_and_gradients_are_left_alone():
    weight = normal(6, 5).requires_grad_()
    start = spectral(weight.detach(), 2)
    copy = start.clone()
    found = variable_projection(weight, 2, start=start)
    assert torch.equal(start, copy)
    assert not found.requires_grad
    assert weight.grad is None


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("rank", [0, 5, -1, 1.0, True])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank must be an integer from 1 to 4, got {rank}"):
        variable_projection(normal(4, 6), rank)


def test_bad_arguments():
    weight = normal(4, 6)
    for match, options in (
        (r"start must have shape \(6, 2\), got \(2, 6\)", {"start": normal(2, 6)}),
        ("start must have orthonormal columns", {"start": normal(6, 2)}),
        ("slope must be finite, got nan", {"slope": math.nan}),
        ("iterations must be an integer from 0 to inf, got -1", {"iterations": -1}),
        ("taps must be an integer from 1 to 4, got 0", {"taps": 0}),
        ("taps must divide the number of rows, 4, got 3", {"taps": 3}),
        ("method must be one of lbfgs, descent, got 'adam'", {"method": "adam"}),
    ):
        with pytest.raises(ValueError, match=match):
            variable_projection(weight, 2, **options)
    weight[1, 2] = math.nan
    with pytest.raises(ValueError, match="weight has NaN or infinite entries"):
        variable_projection(weight, 2)
    for other in (normal(5), normal(2, 3, 4), torch.zeros(0, 3), torch.ones(3, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="weight must be a real matrix, got shape"):
            variable_projection(other, 1)
