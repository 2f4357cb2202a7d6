"""Errors and costs of `retract bench lowrank`: weights and inputs have their laws, errors are as known."""

from __future__ import annotations

import statistics

import pytest
import torch

from retract.benchmarks import lowrank_errors
from retract.benchmarks.lowrank_errors import (
    INITIALIZATIONS,
    PROBLEMS,
    CostCell,
    ErrorCell,
    cost_cells,
    error_cells,
    initialized,
    inputs_of,
    measure_costs,
    measure_errors,
    weight_of,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def never():
    return False


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize(("law", "values"), [("orthogonal", torch.ones(12)), ("decaying", torch.arange(1, 13) ** -0.5)])
def test_weights_have_their_singular_values(law, values):
    found = torch.linalg.svdvals(weight_of(law, 12, generator()))
    torch.testing.assert_close(found, values.double(), rtol=1e-6, atol=0)


def test_gaussian_weights_have_unit_rows_in_the_mean():
    assert float(weight_of("Gaussian", 128, generator()).square().sum(1).mean()) == pytest.approx(1, abs=0.05)


def test_moments_of_rectified_inputs_are_those_of_the_samples():
    inputs = inputs_of("rectified", 8, generator())
    products = inputs.samples[:, :, None] * inputs.samples[:, None]
    errors = products.std(0) / len(products) ** 0.5
    assert ((products.mean(0) - inputs.second).abs() < 4 * errors).all()
    mean_errors = inputs.samples.std(0) / len(products) ** 0.5
    assert ((inputs.samples.mean(0) - inputs.mean).abs() < 4 * mean_errors).all()
    assert (inputs.samples >= 0).all()


def test_variances_of_decaying_inputs():
    second = inputs_of("1/k", 10, generator()).second
    torch.testing.assert_close(second.diagonal() * torch.arange(1, 11), second[0, 0].expand(10))
    assert float(second.trace()) == pytest.approx(10)
    assert float(second.sum()) == pytest.approx(10)


def test_cells_are_all_sizes_ranks_and_problems():
    errors, costs = error_cells(), cost_cells()
    assert len(set(errors)) == len(errors) == 5 * 3 * 4
    assert len(set(costs)) == len(costs) == 2 * 3 * 4
    for size, ranks in {64: {4, 8, 16, 32}, 1024: {64, 128, 256, 512}}.items():
        assert {cell.rank for cell in (*errors, *costs) if cell.size == size} == ranks


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def measured():
    """Mean errors of matrices of size 24 and rank 3, by problem and initialization."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank_errors, "DRAWS", {24: 2})
        for problem in PROBLEMS:
            errors = measure_errors(ErrorCell(24, 3, *problem), never)["errors"]
            assert {len(values) for values in errors.values()} == {2}
            found[problem] = {name: statistics.mean(values) for name, values in errors.items()}
    return found


def test_gaussian_weights_give_the_errors_that_are_known(monkeypatch):
    """Mean values over 20 draws, of another implementation."""
    known = {"spectral": 0.5339, "scaled": 0.5288, "relu": 0.5267, "relu_dc": 0.5266}
    monkeypatch.setattr(lowrank_errors, "INITIALIZATIONS", {name: INITIALIZATIONS[name] for name in known})
    errors = measure_errors(ErrorCell(64, 8, "Gaussian", "white"), never)["errors"]
    for name, value in known.items():
        assert len(errors[name]) == 20
        assert statistics.mean(errors[name]) == pytest.approx(value, abs=0.005), name


@pytest.mark.parametrize("law", ["Gaussian", "orthogonal", "decaying"])
def test_better_initializations_have_smaller_errors(measured, law):
    errors = measured[law, "white"]
    assert errors["relu, bias"] < errors["relu_dc"] <= errors["relu"] < errors["scaled"] < errors["spectral"]
    assert not any(name.startswith("whitened") for name in errors)


@pytest.mark.parametrize("law", ["1/k", "rectified"])
def test_knowing_the_inputs_is_worth_more_than_the_rectifier(measured, law):
    errors = measured["Gaussian", law]
    assert errors["whitened relu, bias"] < errors["whitened relu"] < errors["whitened"] < 0.8 * errors["relu"]


@pytest.mark.parametrize("law", ["white", "1/k", "rectified"])
@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_at_full_rank_every_initialization_is_the_layer(name, law):
    """With the mean of the inputs taken into account where there is one: the bias is zero then."""
    weight, inputs = weight_of("Gaussian", 6, generator()), inputs_of(law, 6, generator(1))
    layer = initialized(weight, 6, INITIALIZATIONS[name], inputs)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=1e-6)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.detach(), torch.zeros(6).double(), rtol=0, atol=1e-6)
    assert lowrank_errors._error(layer, weight, inputs) < 1e-10


def test_row_spaces_do_not_depend_on_the_mean_where_a_bias_takes_it_up():
    weight, inputs = weight_of("Gaussian", 8, generator()), inputs_of("rectified", 8, generator(1))
    centred = inputs.second - torch.outer(inputs.mean, inputs.mean)
    spaces = []
    for mean in (inputs.mean, 3 * torch.randn(8, dtype=torch.float64, generator=generator(2))):
        shifted = inputs._replace(second=centred + torch.outer(mean, mean), mean=mean)
        layer = initialized(weight, 3, INITIALIZATIONS["whitened relu, bias"], shifted)
        rows = torch.linalg.svd(layer.weight.detach()).Vh[:3]
        spaces.append(rows.mT @ rows)
    torch.testing.assert_close(*spaces, rtol=0, atol=1e-8)


def test_errors_of_samples_are_those_of_the_closed_form():
    weight = weight_of("Gaussian", 16, generator())
    inputs = inputs_of("1/k", 16, generator(1))
    layer = initialized(weight, 4, INITIALIZATIONS["whitened relu, bias"], inputs)
    exact = lowrank_errors._error(layer, weight, inputs)
    samples = torch.randn(20000, 16, dtype=torch.float64, generator=generator(2)) @ inputs.second.sqrt()
    assert lowrank_errors._error(layer, weight, inputs._replace(samples=samples)) == pytest.approx(exact, rel=0.03)


def test_draws_differ_and_repeat(monkeypatch):
    monkeypatch.setattr(lowrank_errors, "DRAWS", {8: 2})
    first, again = (measure_errors(ErrorCell(8, 2, "Gaussian", "white"), never) for _ in range(2))
    assert first == again
    assert first["errors"]["spectral"][0] != first["errors"]["spectral"][1]


def test_a_measurement_that_is_stopped_gives_nothing():
    assert measure_errors(ErrorCell(64, 8, "Gaussian", "white"), lambda: True) is None
    assert measure_costs(CostCell(64, 8, "float32"), lambda: True) is None


# ----------------------------------------------------------------------------------------------------------- costs


def test_costs_have_all_initializations_beside_the_svd(monkeypatch):
    monkeypatch.setattr(lowrank_errors, "COST_SECONDS", 0.0)
    monkeypatch.setattr(lowrank_errors, "COST_ROUNDS", 3)
    dtypes = []

    def factors(weight, **options):
        dtypes.append(weight.dtype)

    monkeypatch.setattr(lowrank_errors, "lowrank_factors", factors)
    monkeypatch.setattr(lowrank_errors, "lowrank_factors_with_bias", factors)
    seconds = measure_costs(CostCell(16, 4, "float64"), never)["seconds"]
    assert list(seconds) == ["SVD", *INITIALIZATIONS]
    assert len(dtypes) == 2 * 3 * len(INITIALIZATIONS)
    assert set(dtypes) == {torch.float64}
    for median, low, high in seconds.values():
        assert 0 < low <= median <= high
