"""Lengths and biases that are best together: a published-style table, brute force, samples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm
from torch import nn

from retract.nets._unfolding import Unfolding
from retract.nets.init.bias_correction import corrected_units
from retract.nets.init.function_error import function_error, monte_carlo_error
from retract.nets.init.low_rank import lowrank_factors, lowrank_factors_with_bias
from retract.nets.init.rectified_moments import leaky_product

#: rho, c, b, error relative to the energy, without a bias, for ReLU and no bias before.
TABLE = np.array(
    [
        (0.0, 0.0, 0.3989, 0.6817, 0.8987),
        (0.1, 0.0500, 0.3989, 0.6767, 0.8632),
        (0.2, 0.1000, 0.3989, 0.6617, 0.8196),
        (0.3, 0.1518, 0.3983, 0.6366, 0.7670),
        (0.3536, 0.1827, 0.3967, 0.6187, 0.7345),
        (0.5, 0.2886, 0.3793, 0.5518, 0.6291),
        (0.6, 0.3850, 0.3488, 0.4877, 0.5409),
        (0.7071, 0.5139, 0.2920, 0.3985, 0.4294),
        (0.8, 0.6483, 0.2192, 0.3005, 0.3159),
        (0.9, 0.8150, 0.1175, 0.1686, 0.1727),
    ]
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(rho):
    return (np.sqrt(1 - rho**2) + rho * (math.pi - np.arccos(rho))) / math.pi


def error(c, b, rho, beta, slope):
    """E (s(c v + b) - s(u + beta))² from its moments."""
    one = np.ones(1)
    c, b, rho, beta = (x * one for x in (c, b, rho, beta))
    squares = leaky_product((beta, beta), (one, one), one, slope) + leaky_product((b, b), (c, c), one, slope)
    return float((squares - 2 * leaky_product((beta, b), (one, c), rho, slope))[0])


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def test_table_for_relu():
    rho = TABLE[:, 0]
    units = corrected_units(rho, np.zeros_like(rho), length=kernel(rho))
    np.testing.assert_allclose(np.stack([units.length, units.bias, 2 * units.error], 1), TABLE[:, 1:4], atol=1.5e-4)
    np.testing.assert_allclose(1 - kernel(rho) ** 2, TABLE[:, 4], atol=1.5e-4)
    assert units.length[0] == 0 and units.bias[0] == pytest.approx(1 / math.sqrt(2 * math.pi))


def test_table_is_near_the_bayes_error():
    """No function of the projection does better than the conditional mean."""
    rho = 0.5
    sine = math.sqrt(1 - rho**2)

    def mean(v):
        return rho * v * norm.cdf(rho * v / sine) + sine * norm.pdf(rho * v / sine)

    floor = 0.5 - quad(lambda v: mean(v) ** 2 * norm.pdf(v), -12, 12)[0]
    unit = corrected_units(np.array([rho]), np.zeros(1), length=np.array([rho]))
    assert 2 * floor == pytest.approx(0.5467, abs=1e-4)
    assert floor <= unit.error[0] <= floor + 0.004


@pytest.mark.parametrize("slope", [0.0, 0.1, 0.5, 1.0])
def test_units_are_the_best_there_are(slope):
    rho = np.array([0.05, 0.3, 0.6, 0.9, 0.99])
    beta = np.array([-0.7, 0.5, 1.5, -0.2, 0.0])
    units = corrected_units(rho, beta, length=rho, slope=slope)
    for i in range(len(rho)):
        best = min(
            minimize(
                lambda p, i=i: error(abs(p[0]) + 1e-9, p[1], rho[i], beta[i], slope), start, method="Nelder-Mead"
            ).fun
            for start in ([0.1, 0.4], [0.5, 0.0], [1.0, beta[i]])
        )
        assert units.error[i] <= best + 1e-8
        assert units.error[i] == pytest.approx(error(units.length[i], units.bias[i], rho[i], beta[i], slope), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 1), st.floats(-6, 6), st.sampled_from([0.0, 0.01, 0.2, 1.0, -0.3]))
def test_never_worse_than_the_length_alone(rho, beta, slope):
    start = (1 - slope) ** 2 / (1 + slope**2) * kernel(rho) + 2 * slope / (1 + slope**2) * rho
    unit = corrected_units(np.array([rho]), np.array([beta]), length=np.array([start]), slope=slope)
    assert all(np.isfinite(x).all() for x in unit) and unit.length[0] >= 0
    assert unit.error[0] <= error(max(start, 1e-8), beta, rho, beta, slope) + 1e-14


def test_equal_units_stay():
    unit = corrected_units(np.ones(3), np.array([-1.0, 0.0, 2.0]), length=np.ones(3))
    np.testing.assert_allclose(unit.length, 1, atol=1e-6)
    np.testing.assert_allclose(unit.bias, [-1.0, 0.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(unit.error, 0, atol=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("method", ["spectral", "relu_dc"])
def test_layers_with_a_bias(method, slope):
    weight, bias = normal(20, 16), normal(20, seed=1)
    left, right, new = lowrank_factors_with_bias(weight, bias, rank=4, method=method, slope=slope)
    full, corrected = linear(weight, bias), linear(left @ right, new)
    kept = linear(torch.matmul(*lowrank_factors(weight, rank=4, method=method, slope=slope)), bias)
    assert function_error(corrected, full, slope=slope) < 0.97 * function_error(kept, full, slope=slope)
    estimate = monte_carlo_error(corrected, full, normal(200_000, 16, seed=2), slope=slope)
    assert abs(estimate.error - function_error(corrected, full, slope=slope)) < 4 * estimate.standard_error


def test_a_bias_is_worth_more_than_lengths():
    """What the table says of a flat spectrum."""
    weight = torch.linalg.qr(normal(64, 64)).Q
    factors = lowrank_factors_with_bias(weight, rank=16)
    full = linear(weight, torch.zeros(64, dtype=torch.float64))
    spectral = function_error(torch.matmul(*lowrank_factors(weight, rank=16, method="spectral")), weight)
    rows = function_error(torch.matmul(*lowrank_factors(weight, rank=16)), weight)
    biased = function_error(linear(factors.left @ factors.right, factors.bias), full)
    assert 3.5 < (spectral - biased) / (spectral - rows) < 7.5


def test_covariance_and_convolutions():
    weight, bias, root = normal(6, 4, 3), normal(6, seed=1), normal(12, 12, seed=2)
    left, right, new = lowrank_factors_with_bias(weight, bias, rank=3, covariance=root @ root.mT)
    x = normal(200_000, 12, seed=3) @ root.mT
    corrected, full = linear(left @ right, new), linear(weight.flatten(1), bias)
    estimate = monte_carlo_error(corrected, full, x)
    error = function_error(corrected, full, covariance=root @ root.mT)
    assert abs(estimate.error - error) < 4 * estimate.standard_error
    kept = linear(torch.matmul(*lowrank_factors(weight, rank=3, covariance=root @ root.mT)), bias)
    assert error < function_error(kept, full, covariance=root @ root.mT)


@pytest.mark.parametrize("unfolding", ["output", "input", "separable"])
def test_filters_of_groups(unfolding):
    weight, bias = normal(6, 4, 3, 3), normal(6, seed=1)
    factors = lowrank_factors_with_bias(weight, bias, rank=2, unfolding=unfolding, groups=2)
    y = Unfolding((6, 4, 3, 3), unfolding, 2).weight(factors.left @ factors.right)
    kept = Unfolding((6, 4, 3, 3), unfolding, 2).weight(
        torch.matmul(*lowrank_factors(weight, rank=2, unfolding=unfolding, groups=2))
    )
    full = linear(weight.flatten(1), bias)
    errors = [function_error(linear(z.flatten(1), b), full) for z, b in ((y, factors.bias), (kept, bias))]
    assert errors[0] < errors[1]
    alone = lowrank_factors_with_bias(weight[:3], bias[:3], rank=2, unfolding=unfolding)
    torch.testing.assert_close(factors.bias[:3], alone.bias)


def test_scale_of_weights_and_biases():
    weight, bias = normal(8, 6), normal(8, seed=1)
    expected = lowrank_factors_with_bias(weight, bias, rank=2)
    scaled = lowrank_factors_with_bias(1e6 * weight, 1e6 * bias, rank=2)
    product = 1e6 * (expected.left @ expected.right)
    torch.testing.assert_close(scaled.left @ scaled.right, product, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.bias, 1e6 * expected.bias, rtol=1e-5, atol=1e-5)


def test_edge_cases():
    weight, bias = normal(5, 4), normal(5, seed=1)
    weight[0], weight[1] = 0, 1e-30
    left, right, new = lowrank_factors_with_bias(weight, bias, rank=2)
    assert bool(left.isfinite().all() and right.isfinite().all() and new.isfinite().all())
    assert float(new[0]) == pytest.approx(float(bias[0])) and not (left @ right)[0].any()
    assert float(new[1].relu()) == pytest.approx(max(float(bias[1]), 0.0), abs=1e-6)
    whole = lowrank_factors_with_bias(weight, bias, rank=4)
    torch.testing.assert_close(whole.left @ whole.right, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.bias, bias, atol=1e-5, rtol=0)
    half = lowrank_factors_with_bias(weight.half(), bias.half(), rank=2)
    assert {x.dtype for x in half} == {torch.float16}
    zero = lowrank_factors_with_bias(torch.zeros(3, 3), rank=1)
    assert not any(x.any() for x in zero)
    with pytest.raises(ValueError, match=r"bias must be finite, of shape \(5,\)"):
        lowrank_factors_with_bias(weight, bias[:3], rank=2)
    with pytest.raises(ValueError, match="bias must be finite"):
        lowrank_factors_with_bias(weight, bias / 0, rank=2)
