"""Singular values of the weights that layers work with, and their distance from what is allowed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from retract.nets.compress import factorize
from retract.nets.gan.constraints import CONSTRAINTS, constrain
from retract.nets.gan.networks import gan_pair
from retract.nets.gan.spectra import evaluating, singular_values, spectrum_violation
from retract.nets.spectral import conv_norm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layers():
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ConvTranspose2d(5, 3, 2), nn.Flatten(), nn.Linear(6, 4)).double()


def by_numpy(matrix):
    return np.linalg.svd(matrix.detach().numpy(), compute_uv=False)


def digits(name, **options):
    return constrain(gan_pair("digits", width=8)[1], name, **options)


def test_values_of_plain_layers():
    model = layers()
    found = singular_values(model)
    assert list(found) == ["0", "1", "3"]
    matrices = {
        "0": model[0].weight.reshape(5, 18),
        "1": model[1].weight.transpose(0, 1).reshape(3, 20),
        "3": model[3].weight,
    }
    for name, matrix in matrices.items():
        np.testing.assert_allclose(found[name], by_numpy(matrix), rtol=1e-12)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_values_are_those_of_the_weights_in_use(name):
    model = digits(name).eval()
    for layer, values in singular_values(model).items():
        weight = model.get_submodule(layer).weight
        np.testing.assert_allclose(values, by_numpy(weight.flatten(1))[: len(values)], rtol=1e-5, atol=1e-6)
        assert values.dtype == torch.float32
        assert not values.requires_grad


def test_factored_weights_have_as_many_values_as_their_rank():
    assert [len(values) for values in singular_values(digits("svdp-l", rank=3)).values()] == [3, 3, 1]


@pytest.mark.parametrize("kind", ["cp", "lowrank", "canonical"])
def test_values_of_layers_of_another_kind(kind):
    model = factorize(nn.Sequential(nn.Conv2d(4, 6, 3)), kind, rank=2)
    (values,) = singular_values(model).values()
    np.testing.assert_allclose(values, by_numpy(model[0].weight.flatten(1)), atol=1e-6)
    assert spectrum_violation(model) == 0


@pytest.mark.parametrize("name", ["sn", "sr"])
def test_looking_changes_nothing(name):
    model = digits(name)
    with torch.no_grad():  # the state of both lags behind the weights
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = spectrum_violation(model), spectrum_violation(model, singular_values(model))
    assert first == second
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def _look_and_fail(model, found):
    with evaluating(model):
        found.extend(module.training for module in model.modules())
        raise RuntimeError("inside")


def test_modes_are_restored_after_an_error():
    model = layers()
    model[0].eval()
    found = []
    with pytest.raises(RuntimeError, match="inside"):
        _look_and_fail(model, found)
    assert found == [False] * 5
    assert [module.training for module in model.modules()] == [True, False, True, True, True]


# ----------------------------------------------------------------------------------------------------- violation


def test_no_violation_without_a_constraint():
    assert spectrum_violation(layers()) == 0
    assert spectrum_violation(nn.Sequential(nn.ReLU())) == 0


@pytest.mark.parametrize(
    ("name", "values", "distance"),
    [
        ("svdp-c", [1.0, 1.0, 0.9], 0.1),
        ("svdp-c", [1.3, 1.0, 1.0], 0.3),
        ("svdp-l", [1.0, 0.3, 0.0], 0.0),
        ("svdp-l", [0.8, 0.3, 0.0], 0.2),
        ("sttp-r", [1.25, 1.1, 0.0], 0.25),
        ("sr", [1.0, 0.5, 0.0], 0.0),
        ("sr", [0.9, 0.5, 0.0], 0.1),
        ("sn", [0.9, 0.5, 0.0], 0.0),
        ("sn", [1.4, 0.5, 0.0], 0.4),
        ("none", [7.0, 0.5, 0.0], 0.0),
    ],
)
def test_distance_from_the_set(name, values, distance):
    model = constrain(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)), name)
    good = singular_values(model)["1"]
    found = spectrum_violation(model, {"0": torch.tensor(values, dtype=torch.float64), "1": good})
    assert found == pytest.approx(distance, abs=1e-6)


def test_power_iteration_lags_behind_and_it_shows():
    model = constrain(nn.Linear(6, 4), "sn")
    with torch.no_grad():
        model.parametrizations.weight.original.normal_()
    largest = float(singular_values(model)[""][0])
    assert largest > 1.1
    assert spectrum_violation(model) == pytest.approx(largest - 1)


def test_points_off_their_manifold_show():
    model = digits("svdp-c", form="stiefel", rank=4)
    with torch.no_grad():
        model.linear.parametrizations.weight.original0.mul_(1.5)
    assert spectrum_violation(model) == pytest.approx(0.5, abs=1e-5)


def test_operator_norms_count_for_the_operator_constraint_alone():
    model = constrain(nn.Conv2d(3, 4, 3, padding=1), "lipschitz-operator", form="stiefel")
    assert spectrum_violation(model) <= 1e-6
    with torch.no_grad():  # U twice as long is no isometry: the convolution doubles
        model.parametrizations.weight.original0.mul_(2)
    expected = float(conv_norm(model.weight.detach(), 8)) - 1
    assert expected > 0.5
    assert spectrum_violation(model) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = constrain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "sn")
    with torch.no_grad():
        model[1].parametrizations.weight.original[0, 0] = value
    found = singular_values(model)
    assert found["0"].isfinite().all()
    assert found["1"].isnan().all()
    assert found["1"].shape == (2,)
    assert math.isnan(spectrum_violation(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    model = gan_pair("digits", width=4)[1].to(dtype)
    for name, values in singular_values(model).items():
        assert values.dtype == torch.float32
        np.testing.assert_allclose(values, by_numpy(model.get_submodule(name).weight.float().flatten(1)), rtol=1e-5)
