"""The error of a layer as a function: closed form against samples, high precision, and differences."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm
from torch import nn

from retract.nets.init.arc_cosine import angle_between, kernel, kernel_deficit, kernel_derivative
from retract.nets.init.function_error import function_error, monte_carlo_error, relu_error, relu_target
from retract.nets.init.rectified_moments import joint_tail, leaky_product

SLOPES = [0.0, 0.2, 1.0, -0.3, 2.0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def leaky(x, slope):
    return torch.where(x > 0, x, slope * x)


def exact_deficit(angle, slope):
    """1 - kernel in fifty digits."""
    with mpmath.workdps(50):
        t, a = mpmath.mpf(angle), mpmath.mpf(slope)
        rectified = (mpmath.sin(t) + (mpmath.pi - t) * mpmath.cos(t)) / mpmath.pi
        return float(1 - ((1 - a) ** 2 * rectified + 2 * a * mpmath.cos(t)) / (1 + a**2))


@pytest.mark.parametrize("slope", SLOPES)
def test_deficit_keeps_its_relative_precision(slope):
    angles = np.concatenate([np.logspace(-8, -0.2, 60), np.linspace(0.45, 0.55, 9), np.linspace(0.6, math.pi, 20)])
    exact = torch.tensor([exact_deficit(float(angle), slope) for angle in angles], dtype=torch.float64)
    torch.testing.assert_close(kernel_deficit(torch.tensor(angles), slope), exact, rtol=1e-13, atol=0)
    single = kernel_deficit(torch.tensor(angles, dtype=torch.float32), slope)
    torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=1e-30)


def test_identities_of_the_kernel():
    cosines = torch.linspace(-1, 1, 101, dtype=torch.float64)
    angles = torch.acos(cosines)
    assert float(kernel(torch.zeros(()))) == pytest.approx(1 / math.pi)
    torch.testing.assert_close(kernel(cosines) - kernel(-cosines), cosines)
    intercept = kernel(cosines) - cosines * kernel_derivative(angles)
    torch.testing.assert_close(intercept, (1 - cosines**2).sqrt() / math.pi)
    torch.testing.assert_close(kernel(cosines, 1.0), cosines)
    for slope in SLOPES:
        torch.testing.assert_close(1 - kernel(cosines, slope), kernel_deficit(angles, slope))
        inner = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64)
        slopes = (kernel(inner + 1e-6, slope) - kernel(inner - 1e-6, slope)) / 2e-6
        torch.testing.assert_close(slopes, kernel_derivative(torch.acos(inner), slope), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_closed_form_is_what_samples_show(slope):
    w, y = normal(9, 5), normal(9, 5, seed=1)
    y[0], y[1], y[2], y[3], y[4] = w[0], -w[1], 1e-3 * y[2], w[3] + 0.05 * y[3], 0
    w[5] = 0
    x = normal(1_000_000, 5, seed=2)
    samples = (leaky(x @ y.T, slope) - leaky(x @ w.T, slope)).square()
    mean, deviation = samples.mean(0), samples.std(0) / math.sqrt(len(x))
    error = relu_error(w, y, slope=slope)
    assert float(error[0]) == 0
    assert bool(((error - mean)[1:].abs() < 4 * deviation[1:]).all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_errors_of_weights_that_nearly_agree(dtype, tolerance, distance):
    """The formula with 1 - kernel taken directly is wrong by a factor of 13 at 1e-4 in float32."""
    w = normal(6, 40).to(dtype)
    y = w + distance * normal(6, 40, seed=1).to(dtype) * torch.linalg.vector_norm(w) / 40
    error = relu_error(w, y)
    with mpmath.workdps(40):
        for row in range(6):
            a, b = (mpmath.matrix(x[row].double().tolist()) for x in (w, y))
            norms, product = (mpmath.norm(a), mpmath.norm(b)), (a.T * b)[0]
            t = mpmath.acos(product / norms[0] / norms[1])
            kappa = (mpmath.sin(t) + (mpmath.pi - t) * mpmath.cos(t)) / mpmath.pi
            exact = (norms[0] ** 2 + norms[1] ** 2) / 2 - norms[0] * norms[1] * kappa
            assert float(error[row]) == pytest.approx(float(exact), rel=tolerance)


def test_angles_of_rows_of_any_length():
    w = normal(1, 7).repeat(5, 1)
    y = w + 1e-9 * normal(5, 7, seed=1)
    scales = torch.tensor([1e-20, 1e-5, 1.0, 3.0, 1e20], dtype=torch.float64)[:, None]
    torch.testing.assert_close(angle_between(w * scales, y), angle_between(w, y), rtol=1e-6, atol=0)
    zero, one = torch.zeros(1, 7, dtype=torch.float64), w[:1]
    assert float(angle_between(zero, one)) == float(angle_between(one, zero)) == pytest.approx(math.pi / 2)
    assert float(angle_between(zero, zero)) == 0
    assert float(angle_between(one, -2 * one)) == pytest.approx(math.pi)
    assert float(angle_between((1e-30 * one).float(), (1e30 * one).float())) < 1e-6


@pytest.mark.parametrize("slope", SLOPES)
def test_gradient_is_that_of_the_error(slope):
    w, y = normal(5, 4), normal(5, 4, seed=1)
    y[1] = w[1] + 0.01 * y[1]
    assert torch.autograd.gradcheck(
        lambda a, b: relu_error(a, b, slope=slope), (w.requires_grad_(), y.requires_grad_()), rtol=1e-6, atol=1e-8
    )
    (gradient,) = torch.autograd.grad(relu_error(w, y, slope=slope).sum(), y)
    expected = (1 + slope**2) * (y - relu_target(w, y, slope=slope))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slope", SLOPES)
def test_target_is_its_formula(slope):
    w, y = normal(6, 5), normal(6, 5, seed=1)
    cosine = torch.nn.functional.cosine_similarity(w, y)
    curve = (1 - slope) ** 2 / (1 + slope**2)
    slopes = curve * (1 - torch.acos(cosine) / math.pi) + 2 * slope / (1 + slope**2)
    rest = curve * (1 - cosine**2).sqrt() / math.pi * w.norm(dim=1) / y.norm(dim=1)
    expected = slopes[:, None] * w + rest[:, None] * y
    torch.testing.assert_close(relu_target(w, y, slope=slope), expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(SLOPES), st.floats(0.01, 3))
def test_target_majorises_the_error(seed, slope, distance):
    w, y = normal(5, 4, seed=seed), normal(5, 4, seed=seed + 1)
    other = y + distance * normal(5, 4, seed=seed + 2)
    y[0] = 0  # where the gradient is a subgradient
    target = relu_target(w, y, slope=slope)

    def bound(at):
        return (1 + slope**2) / 2 * (at - target).square().sum(1)

    rise = relu_error(w, other, slope=slope) - relu_error(w, y, slope=slope)
    assert bool((rise <= bound(other) - bound(y) + 1e-12).all())


def test_gradient_is_finite_everywhere():
    w, y = normal(4, 3), normal(4, 3, seed=1)
    y[0], y[1], y[2], w[3] = w[0], -w[1], 0, 0
    w.requires_grad_(), y.requires_grad_()
    relu_error(w, y).sum().backward()
    assert bool(w.grad.isfinite().all() and y.grad.isfinite().all())
    assert float(w.grad[0].abs().max()) == float(y.grad[0].abs().max()) == 0


def test_error_depends_on_the_inner_products_alone():
    w, y = normal(6, 5), normal(6, 5, seed=1)
    turn = torch.linalg.qr(normal(5, 5, seed=2)).Q
    torch.testing.assert_close(relu_error(w @ turn, y @ turn), relu_error(w, y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(relu_error(3 * w, 3 * y), 9 * relu_error(w, y), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------- with biases


def test_moments_of_a_quadrant():
    h, k, rho = (x.ravel() for x in np.meshgrid([-1.5, 0.0, 0.7], [-0.4, 0.0], [-0.9, 0.3, 0.99]))
    tail = joint_tail(h, k, rho)
    for i in range(len(h)):
        law = multivariate_normal(cov=[[1, rho[i]], [rho[i], 1]])
        assert tail.one[i] == pytest.approx(law.cdf([h[i], k[i]]), abs=1e-7)
        sine = math.sqrt(1 - rho[i] ** 2)

        def inner(v, i=i, sine=sine):  # E of u over u > -h, given v
            past = (h[i] + rho[i] * v) / sine
            return norm.pdf(v) * (rho[i] * v * norm.cdf(past) + sine * norm.pdf(past))

        assert tail.u[i] == pytest.approx(quad(inner, -k[i], 12, epsabs=1e-12)[0], abs=1e-9)
        assert tail.uv[i] == pytest.approx(quad(lambda v: v * inner(v), -k[i], 12, epsabs=1e-12)[0], abs=1e-9)
    np.testing.assert_allclose(joint_tail(k, h, rho).u, tail.v, atol=1e-14)


def test_moments_where_variables_agree_or_do_not_vary():
    one = np.ones(3)
    means = np.array([-0.5, 0.0, 2.0])
    square = (1 + means**2) * norm.cdf(means) + means * norm.pdf(means)
    np.testing.assert_allclose(leaky_product((means, means), (one, one), one, 0.0), square, atol=1e-13)
    constant = leaky_product((means, means), (0 * one, 0 * one), 0 * one, 0.1)
    np.testing.assert_allclose(constant, np.where(means > 0, means, 0.1 * means) ** 2, atol=1e-13)


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True)])
def test_biases_against_samples(slope, biases):
    full, layer = (nn.Linear(6, 8, bias=has, dtype=torch.float64) for has in biases)
    for seed, module in enumerate((full, layer)):
        nn.init.normal_(module.weight, generator=generator(seed))
        if module.bias is not None:
            nn.init.normal_(module.bias, generator=generator(seed + 5))
    x = normal(200_000, 6, seed=2)
    estimate = monte_carlo_error(layer, full, x, slope=slope)
    assert abs(estimate.error - function_error(layer, full, slope=slope)) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.01


def test_zero_biases_change_nothing():
    full, layer = nn.Linear(5, 4, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64)
    full.bias.data.zero_(), layer.bias.data.zero_()
    assert function_error(layer, full) == pytest.approx(function_error(layer.weight, full.weight), abs=1e-13)
    assert function_error(full, full) == pytest.approx(0, abs=1e-14)


# ------------------------------------------------------------------------------------------------ whole layers


def test_relative_error_is_of_the_energy():
    w = normal(4, 6)
    assert function_error(torch.zeros_like(w), w) == pytest.approx(1)
    assert function_error(-w, w, slope=0.0) == pytest.approx(2)
    assert function_error(2 * w, w, slope=0.3) == pytest.approx(1)
    assert function_error(w, w) == 0
    assert function_error(0 * w, 0 * w) == 0
    assert function_error(w, 0 * w) == math.inf


def test_error_for_inputs_of_a_covariance():
    w, y, root = normal(5, 4), normal(5, 4, seed=1), normal(4, 4, seed=2)
    estimate = monte_carlo_error(lambda x: x @ y.T, lambda x: x @ w.T, normal(200_000, 4, seed=3) @ root.T)
    error = function_error(y, w, covariance=root @ root.T)
    assert abs(error - estimate.error) < 4 * estimate.standard_error
    assert error == pytest.approx(function_error(y @ root, w @ root), rel=1e-10)


@pytest.mark.parametrize("padding", [0, 1])
def test_error_of_a_convolution(padding):
    full, layer = (nn.Conv2d(3, 6, 3, padding=padding, bias=False, dtype=torch.float64) for _ in range(2))
    nn.init.normal_(full.weight, generator=generator(0))
    layer.weight.data = full.weight.data + 0.5 * normal(6, 3, 3, 3, seed=1)
    estimate = monte_carlo_error(layer, full, normal(3000, 3, 8, 8, seed=2))
    # Padding shortens filters at the border; the error there differs.
    assert abs(estimate.error - function_error(layer, full)) < 3 * estimate.standard_error + 0.01 * padding


def test_arguments_that_are_refused():
    w = normal(4, 3)
    with pytest.raises(ValueError, match="same shape"):
        relu_error(w, w[:2])
    with pytest.raises(ValueError, match="same shape"):
        relu_error(w[0], w[0])
    with pytest.raises(TypeError, match="weight must be of float32 or float64"):
        relu_error(w.half(), w.half())
    with pytest.raises(ValueError, match="one shape"):
        function_error(w, w[:2])
    with pytest.raises(TypeError, match="layer must be a weight"):
        function_error(nn.ReLU(), w)
    with pytest.raises(ValueError, match="full must be finite"):
        function_error(w, w / 0)
    with pytest.raises(ValueError, match="symmetric"):
        function_error(w, w, covariance=normal(3, 3))
    with pytest.raises(ValueError, match="semidefinite"):
        function_error(w, w, covariance=-torch.eye(3))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 3, 3\)"):
        function_error(w, w, covariance=torch.eye(4))
    with pytest.raises(ValueError, match="covariance must be finite"):
        function_error(w, w, covariance=torch.eye(3) * math.nan)
    with pytest.raises(TypeError, match="covariance must be a tensor"):
        function_error(w, w, covariance=torch.eye(3).long())
    with pytest.raises(ValueError, match="at least two samples"):
        monte_carlo_error(nn.Identity(), nn.Identity(), w[:1])
    with pytest.raises(ValueError, match="outputs of one shape"):
        monte_carlo_error(lambda x: x[:, :2], nn.Identity(), w)
    with pytest.raises(ValueError, match="not be zero"):
        monte_carlo_error(nn.Identity(), torch.zeros_like, w)


def test_half_precision_layers_are_measured():
    w = normal(4, 3)
    assert function_error((1.1 * w).half(), w.half()) == pytest.approx(0.01, rel=0.05)
