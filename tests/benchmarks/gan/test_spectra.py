"""Spectra in records, against NumPy and closed forms."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.benchmarks.gan.spectra import spectra, stable_rank
from retract.benchmarks.training import DivergedError
from retract.nets.gan.constraints import constrain
from retract.nets.gan.networks import gan_pair


def discriminator(constraint="none", **options):
    torch.manual_seed(0)
    return constrain(gan_pair("digits", width=4)[1], constraint, **options)


def test_figures_are_numpys():
    network = discriminator()
    found = spectra(network, (1, 8, 8))
    weights = {name.removesuffix(".weight"): p for name, p in network.named_parameters() if p.ndim > 1}
    assert found["spectra"].keys() == weights.keys()
    for name, weight in weights.items():
        matrix = weight.detach().double().flatten(1).numpy()
        values = np.linalg.svd(matrix, compute_uv=False)
        expected = {
            "largest": values[0],
            "least": values[-1],
            "stable_rank": (np.linalg.norm(matrix) / np.linalg.norm(matrix, 2)) ** 2,
        }
        assert found["spectra"][name] == pytest.approx(expected, rel=1e-5)
    assert found["spectrum_violation"] == 0
    assert 0 < found["lipschitz_bound"] < float("inf")
    json.dumps(found, allow_nan=False)


def test_a_constrained_network():
    found = spectra(discriminator("svdp-c", rank=3), (1, 8, 8))
    assert found["spectrum_violation"] < 1e-6
    for name, figures in found["spectra"].items():
        rank = 1 if name == "linear" else 3
        assert figures == pytest.approx({"largest": 1, "least": 1, "stable_rank": rank}, rel=1e-5)


def test_nothing_is_changed():
    network = discriminator("sn").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    spectra(network, (1, 8, 8))
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_what_is_not_finite():
    network = discriminator()
    torch.nn.init.constant_(network.linear.weight, float("nan"))
    with pytest.raises(DivergedError, match="linear of the discriminator is nan"):
        spectra(network, (1, 8, 8))


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 8), scale=st.floats(1e-6, 1e6), lower=st.floats(0, 1))
def test_stable_rank_of_one_value_above_equal_ones(rank, scale, lower):
    values = torch.tensor([1.0] + [lower] * (rank - 1), dtype=torch.float64) * scale
    assert stable_rank(values).item() == pytest.approx(1 + (rank - 1) * lower**2)
    assert stable_rank(torch.zeros(3)) == 0
