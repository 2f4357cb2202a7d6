"""Factors that copy a layer's function: optimality, order of the methods, bounds, and figures of a published kind."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retract.nets._unfolding import Unfolding
from retract.nets.init._filter_lengths import best_lengths
from retract.nets.init._row_spaces import leading_projection, majorized_projection
from retract.nets.init.function_error import function_error, monte_carlo_error, relu_error, relu_target
from retract.nets.init.low_rank import lowrank_factors

METHODS = ["spectral", "scaled", "norm", "row_norm", "relu", "relu_dc", "relu_varpro"]
#: From the least function error up.
ORDER = ["relu_dc", "relu", "scaled", "spectral"]
UNFOLDINGS = ["output", "input", "separable"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def approximation(weight, rank, method="relu", **options):
    left, right = lowrank_factors(weight, rank=rank, method=method, **options)
    return left @ right


def error_of(weight, rank, method, **options):
    slope = options.get("slope", 0.0)
    return float(relu_error(weight, approximation(weight, rank, method, **options), slope=slope).sum())


def truncated(weight, rank):
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@st.composite
def problems(draw):
    """A matrix of some shape, spectrum and row norms, a rank and a slope."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 10**6))
    weight = normal(rows, columns, seed=seed)
    kind = draw(st.sampled_from(["gaussian", "orthogonal", "decaying", "low rank", "sparse", "repeated"]))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    place = torch.arange(1, len(s) + 1, dtype=torch.float64)
    if kind == "orthogonal":
        weight = u @ vh
    elif kind == "decaying":
        weight = u * place ** -draw(st.floats(0.2, 4)) @ vh
    elif kind == "low rank":
        weight = truncated(weight, 1 + len(s) // 3)
    elif kind == "sparse":
        weight = weight * (torch.rand(rows, columns, generator=generator(seed)) < 0.2)
    elif kind == "repeated":
        weight = weight[torch.randint(rows, (rows,), generator=generator(seed))]
    weight = weight * (draw(st.floats(0, 2)) * normal(rows, 1, seed=seed + 1)).exp()
    slope = draw(st.sampled_from([0.0, 0.0, 0.01, 0.2, 0.7, 1.0, -0.25, 1.5]))
    return weight, draw(st.integers(1, min(rows, columns))), slope


def check_order(problem):
    weight, rank, slope = problem
    energy = (1 + slope**2) / 2 * float(weight.square().sum())
    spectral = float(relu_error(weight, truncated(weight, rank), slope=slope).sum())
    errors = [error_of(weight, rank, method, slope=slope) for method in ORDER] + [spectral]
    assert all(less <= more + 1e-12 * energy for less, more in itertools.pairwise(errors))
    assert errors[-2] == pytest.approx(spectral, abs=1e-12 * energy)
    assert error_of(weight, rank, "relu_varpro", slope=slope, iterations=3) <= errors[1] + 1e-12 * energy


@settings(deadline=None, max_examples=25)
@given(problems())
def test_never_worse_than_spectral(problem):
    check_order(problem)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(problems())
def test_never_worse_than_spectral_on_a_thousand_instances(problem):
    check_order(problem)


# ---------------------------------------------------------------------------------------- the closed-form rows


@pytest.mark.parametrize("slope", [0.0, 0.2, -0.3])
def test_left_factor_is_optimal_for_the_row_space(slope):
    weight, rank = normal(20, 14), 5
    y = approximation(weight, rank, slope=slope).requires_grad_()
    error = relu_error(weight, y, slope=slope).sum()
    (gradient,) = torch.autograd.grad(error, y)
    basis = torch.linalg.svd(weight).Vh[:rank].mT
    assert float((gradient @ basis).abs().max()) < 1e-12 * float(weight.norm())
    energies = (1 + slope**2) / 2 * (weight.square().sum() - y.detach().square().sum())
    error = error.detach()
    assert float(error) == pytest.approx(float(energies), rel=1e-12)
    for seed in range(20):
        other = y.detach() + 10.0 ** -(seed % 5) * normal(20, rank, seed=seed) @ basis.mT
        assert float(relu_error(weight, other, slope=slope).sum()) >= float(error) - 1e-12


def test_one_scalar_is_the_best_one():
    weight = normal(20, 14)
    y = approximation(weight, 4, "scaled")
    errors = [float(relu_error(weight, scale * y).sum()) for scale in (0.999, 1.0, 1.001)]
    assert errors[1] < min(errors[0], errors[2])
    assert torch.linalg.matrix_rank(torch.stack([y.flatten(), truncated(weight, 4).flatten()])) == 1


def test_norms_that_are_kept():
    weight = normal(20, 14)
    assert float(approximation(weight, 4, "norm").norm()) == pytest.approx(float(weight.norm()))
    y = approximation(weight, 4, "row_norm")
    torch.testing.assert_close(y.norm(dim=1), weight.norm(dim=1))
    cosine = nn.functional.cosine_similarity(truncated(weight, 4), weight)
    kappa = ((1 - cosine**2).sqrt() + cosine * (math.pi - torch.acos(cosine))) / math.pi
    torch.testing.assert_close(relu_error(weight, y), weight.square().sum(1) * (1 - kappa))


def gap(s):
    """(kappa(rho) - rho)² at rho² = s."""
    rho = torch.as_tensor(s, dtype=torch.float64).clamp(max=1).sqrt()
    return (((1 - rho**2).sqrt() - rho * torch.acos(rho)) / math.pi).square()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.data())
def test_gain_over_spectral_and_its_bounds(rows, columns, seed, data):
    weight = normal(rows, columns, seed=seed) * normal(rows, 1, seed=seed + 1).exp()
    rank = data.draw(st.integers(1, min(rows, columns)))
    kept = truncated(weight, rank)
    gain = error_of(weight, rank, "spectral") - error_of(weight, rank, "relu")
    squares = weight.square().sum(1)
    energy = float(squares.sum())
    exact = float((squares * gap(kept.square().sum(1) / squares)).sum()) / 2
    assert gain == pytest.approx(exact, abs=1e-12 * energy)
    assert energy / 2 * float(gap(kept.square().sum() / energy)) - 1e-12 * energy <= gain
    assert gain <= energy / 2 / math.pi**2 + 1e-12 * energy


# ----------------------------------------------------------------------------- majorise-minimise, and the search


@settings(deadline=None, max_examples=60)
@given(problems(), st.integers(1, 3))
def test_majorised_steps_never_increase_the_error(problem, taps):
    weight, rank, slope = problem
    weight = torch.cat([weight] * taps) if taps > 1 else weight
    energy = float(weight.square().sum())
    projection = leading_projection(weight, rank, taps)
    captured = []
    for _ in range(8):
        captured.append(float(best_lengths(projection.norms, projection.projected_norms, slope).square().sum()))
        projection = majorized_projection(projection, slope=slope, iterations=1)
        identity = projection.basis.mT @ projection.basis
        torch.testing.assert_close(identity, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    assert all(later >= sooner - 1e-12 * energy for sooner, later in itertools.pairwise(captured))


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (24, 24)])
def test_limit_is_the_leading_space_of_its_target(shape, slope):
    weight, rank = normal(*shape) * normal(shape[0], 1, seed=1).exp(), 3
    y = approximation(weight, rank, "relu_dc", slope=slope, iterations=2000)
    leading = torch.linalg.svd(relu_target(weight, y, slope=slope)).Vh[:rank]
    own = torch.linalg.svd(y).Vh[:rank]
    assert float(torch.linalg.svdvals(leading @ own.mT).min()) > 1 - 1e-9
    torch.testing.assert_close(
        approximation(weight, rank, "relu_varpro", slope=slope, iterations=500), y, atol=1e-4, rtol=0
    )


def test_small_singular_values_survive_in_single_precision():
    """Products of a matrix with itself lose those below the root of the precision."""
    u, v = (torch.linalg.qr(normal(40, 40, seed=seed)).Q for seed in (0, 1))
    weight = (u * torch.arange(1, 41, dtype=torch.float64) ** -2.0 @ v * normal(40, 1, seed=2).exp()).float()
    for rank in (4, 16, 24):
        errors = [function_error(approximation(weight, rank, method), weight) for method in ("relu_dc", "relu")]
        assert errors[0] <= errors[1] * (1 + 1e-3)


# ------------------------------------------------------------------------------------- exactness and edge cases


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_a_rank_that_is_enough_gives_the_weight(method, shape):
    weight = normal(*shape)
    torch.testing.assert_close(approximation(weight, min(shape), method), weight, rtol=0, atol=1e-12)
    low = truncated(weight, 3)
    for rank in (3, 5):
        assert function_error(approximation(low, rank, method), low) < 1e-24
        torch.testing.assert_close(approximation(low, rank, method), low, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_and_rows_outside_the_row_space(method):
    weight = torch.zeros(7, 6, dtype=torch.float64)
    weight[0, 0], weight[1, 1], weight[2, 2], weight[3, 0] = 3, 2, 1, -3
    y = approximation(weight, 2, method)
    assert bool(y.isfinite().all()) and not y[4:].any()
    if method in ("relu_dc", "relu_varpro"):  # the row space turns towards the row that it left out
        assert function_error(y, weight) < function_error(approximation(weight, 2), weight) - 1e-5
        return
    torch.testing.assert_close(y[[0, 1, 3]], weight[[0, 1, 3]] * (y[0, 0] / 3 if method == "norm" else 1))
    lengths = {"relu": 1 / math.pi, "row_norm": 1.0}
    assert float(y[2].norm()) == pytest.approx(lengths.get(method, 0.0), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_weights_without_variety(method):
    assert not approximation(torch.zeros(4, 3), 2, method).any()
    constant = torch.full((4, 3), 0.5, dtype=torch.float64)
    torch.testing.assert_close(approximation(constant, 2, method), constant)
    assert approximation(normal(1, 5), 1, method).shape == (1, 5)
    assert approximation(normal(5, 1), 1, method).shape == (5, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_weights_of_any_size(method, scale):
    weight = normal(12, 10).float()
    expected = approximation(weight, 3, method)
    torch.testing.assert_close(approximation(weight * scale, 3, method) / scale, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(method, dtype):
    weight = normal(12, 10).to(dtype).requires_grad_()
    left, right = lowrank_factors(weight, rank=3, method=method)
    assert left.dtype == right.dtype == dtype and not left.requires_grad
    expected = lowrank_factors(weight.float(), rank=3, method=method)
    (
        torch.testing.assert_close(left, expected.left.to(dtype)),
        torch.testing.assert_close(right, expected.right.to(dtype)),
    )


@pytest.mark.parametrize("method", METHODS)
def test_factors_share_their_size(method):
    left, right = lowrank_factors(normal(20, 16), rank=5, method=method)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    assert left.is_contiguous() and right.is_contiguous()
    if method in ("spectral", "scaled", "norm", "relu_dc", "relu_varpro"):
        torch.testing.assert_close(left.mT @ left, right @ right.mT)
    if method == "spectral":
        torch.testing.assert_close(left.norm(dim=0), torch.linalg.svdvals(normal(20, 16))[:5].sqrt())


# ------------------------------------------------------------------------------------ invariances and variants


@pytest.mark.parametrize("method", METHODS)
def test_invariances(method):
    weight, rank = normal(14, 10), 4
    y = approximation(weight, rank, method)
    turn, order = torch.linalg.qr(normal(10, 10, seed=1)).Q, torch.randperm(14, generator=generator(2))
    tolerance = {"rtol": 0, "atol": 1e-5 if method == "relu_varpro" else 1e-10}
    torch.testing.assert_close(approximation(weight @ turn, rank, method), y @ turn, **tolerance)
    torch.testing.assert_close(approximation(weight[order], rank, method), y[order], **tolerance)
    torch.testing.assert_close(approximation(-3 * weight, rank, method), -3 * y, **tolerance)


@pytest.mark.parametrize("method", ["spectral", "scaled", "relu", "relu_dc", "relu_varpro"])
def test_for_a_linear_layer_all_is_spectral(method):
    weight = normal(14, 10)
    torch.testing.assert_close(approximation(weight, 4, method, slope=1.0), truncated(weight, 4), rtol=0, atol=1e-12)


def test_batch_normalization_removes_lengths():
    weight, x = normal(14, 10), normal(64, 10, seed=1)
    normalized = nn.BatchNorm1d(14, eps=1e-60, dtype=torch.float64)
    expected = normalized(x @ approximation(weight, 4, "spectral").mT)
    for method in ("scaled", "norm", "row_norm", "relu"):
        torch.testing.assert_close(normalized(x @ approximation(weight, 4, method).mT), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_identity_covariance_changes_nothing(method):
    weight = normal(14, 10)
    y = approximation(weight, 4, method)
    whitened = approximation(weight, 4, method, covariance=torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(whitened, y, rtol=0, atol=1e-5 if method == "relu_varpro" else 1e-10)


def test_covariance_is_that_of_the_inputs():
    weight, root = normal(14, 10), normal(10, 10, seed=1) * torch.logspace(0, -2, 10, dtype=torch.float64)
    covariance = root @ root.mT
    errors = {}
    for method in ("spectral", "relu", "relu_dc"):
        y = approximation(weight, 4, method, covariance=covariance)
        errors[method] = function_error(y, weight, covariance=covariance)
        whole = approximation(weight @ root, 4, method)  # the roots differ by a rotation
        assert errors[method] == pytest.approx(function_error(whole, weight @ root), rel=1e-9)
    x = normal(200_000, 10, seed=2) @ root.mT
    estimate = monte_carlo_error(lambda x: x @ y.mT, lambda x: x @ weight.mT, x)
    assert abs(estimate.error - errors["relu_dc"]) < 4 * estimate.standard_error
    plain = function_error(approximation(weight, 4), weight, covariance=covariance)
    assert errors["relu_dc"] <= errors["relu"] < errors["spectral"] < plain


def test_covariance_of_fewer_directions():
    """What inputs never do costs nothing: five directions of ten, and factors that leave out the others."""
    weight, root = normal(14, 10), normal(10, 5, seed=1)
    covariance = root @ root.mT
    for rank in (3, 5, 8):
        y = approximation(weight, rank, "relu", covariance=covariance)
        assert float(y.abs().max()) < 10
        if rank >= 5:
            torch.testing.assert_close(y @ root, weight @ root, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize("unfolding", UNFOLDINGS)
@pytest.mark.parametrize("method", ["spectral", "relu", "relu_dc", "relu_varpro"])
def test_convolutions_filter_by_filter(unfolding, method):
    weight, rank, layout = normal(8, 6, 3, 3), 5, Unfolding((8, 6, 3, 3), unfolding)
    left, right = lowrank_factors(weight, rank=rank, method=method, unfolding=unfolding)
    y = layout.weight(left @ right)
    whole, part = weight.flatten(1).square().sum(1), y.flatten(1).square().sum(1)
    error = relu_error(weight, y)
    if method == "spectral":
        torch.testing.assert_close(layout.matrix(y), truncated(layout.matrix(weight), rank))
    else:  # the identity of best lengths, filter by filter
        torch.testing.assert_close(error, (whole - part) / 2)
        spectral = layout.weight(approximation(weight, rank, "spectral", unfolding=unfolding))
        assert bool((error.sum() < relu_error(weight, spectral).sum()).all())
    full, layer = (nn.Conv2d(6, 8, 3, bias=False, dtype=torch.float64) for _ in range(2))
    full.weight.data, layer.weight.data = weight, y
    estimate = monte_carlo_error(layer, full, normal(1500, 6, 6, 6, seed=3))
    assert abs(estimate.error - function_error(layer, full)) < 3 * estimate.standard_error


@pytest.mark.parametrize("unfolding", UNFOLDINGS)
@pytest.mark.parametrize("method", METHODS)
def test_groups_have_factors_of_their_own(unfolding, method):
    weight = normal(6, 4, 3, 2)
    left, right = lowrank_factors(weight, rank=3, method=method, unfolding=unfolding, groups=2)
    for group in range(2):
        alone = approximation(weight[3 * group : 3 * group + 3], 3, method, unfolding=unfolding)
        tolerance = 1e-3 if method == "relu_varpro" else 1e-10  # groups share steps of L-BFGS
        torch.testing.assert_close(left[group] @ right[group], alone, rtol=0, atol=tolerance)


def test_covariance_of_groups():
    weight, roots = normal(6, 4, 3), normal(2, 12, 12, seed=1)
    y = approximation(weight, 2, groups=2, covariance=roots @ roots.mT)
    for group in range(2):
        alone = approximation(weight[3 * group : 3 * group + 3], 2, covariance=roots[group] @ roots[group].mT)
        torch.testing.assert_close(y[group], alone)


# -------------------------------------------------------------------------------------------- figures and cost


@pytest.mark.parametrize(
    ("share", "spectral", "relu", "window"),
    [(16, 0.679, 0.662, 0.002), (8, 0.534, 0.528, 0.004), (4, 0.330, 0.329, 0.005)],
)
def test_errors_of_gaussian_weights(share, spectral, relu, window):
    weight = normal(256, 256)
    for method, expected in (("spectral", spectral), ("relu", relu)):
        error = function_error(approximation(weight, 256 // share, method), weight)
        assert error == pytest.approx(expected, abs=window)


@pytest.mark.slow
def test_cost_beside_the_singular_value_decomposition():
    weight, seconds = normal(768, 768), {}
    for _ in range(3):
        for method in ("svd", "relu", "relu_dc"):
            start = time.process_time()
            if method == "svd":
                torch.linalg.svd(weight, full_matrices=False)
            else:
                lowrank_factors(weight, rank=192, method=method)
            seconds.setdefault(method, []).append(time.process_time() - start)
    best = {method: min(taken) for method, taken in seconds.items()}
    assert best["relu"] < 1.1 * best["svd"]
    assert best["relu_dc"] < 4 * best["svd"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank must be from 1 to 5"),
        ({"rank": 6}, ValueError, "rank must be from 1 to 5"),
        ({"rank": 2.0}, TypeError, "rank must be an int"),
        ({"method": "svd"}, ValueError, "method must be one of 'spectral'"),
        ({"slope": math.nan}, ValueError, "slope must be a finite number"),
        ({"slope": "relu"}, ValueError, "slope must be a finite number"),
        ({"iterations": 5}, ValueError, "for relu_dc or relu_varpro; got 5 for relu"),
        ({"method": "relu_dc", "iterations": 0}, ValueError, "iterations must be at least 1"),
        ({"method": "relu_dc", "iterations": 1.5}, TypeError, "iterations must be an int"),
        ({"unfolding": "rows"}, ValueError, "unfolding must be one of"),
        ({"groups": 4}, ValueError, "groups must divide"),
        ({"covariance": torch.eye(4)}, ValueError, "covariance must be of shape"),
        ({"weight": torch.ones(6, 5) * math.nan}, ValueError, "weight must be finite"),
        ({"weight": torch.ones(6, 5) * -math.inf}, ValueError, "weight must be finite"),
        ({"weight": torch.ones(6, 5).long()}, TypeError, "weight must be a tensor"),
        ({"weight": [[1.0]]}, TypeError, "got list"),
        ({"weight": torch.ones(6)}, ValueError, "two or more dimensions"),
    ],
)
def test_arguments_that_are_refused(options, error, match):
    options = {"weight": normal(6, 5), "rank": 2, **options}
    with pytest.raises(error, match=match):
        lowrank_factors(options.pop("weight"), **options)
