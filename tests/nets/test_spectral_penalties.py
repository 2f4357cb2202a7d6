"""Penalties on singular values: closed forms, derivatives, and which layers of a model count."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from retract.nets.parametrizations import sttp, svdp
from retract.nets.spectral import d_optimal, divergence, spectral_penalty

PENALTIES = {"d_optimal": d_optimal, "divergence": divergence}


def values(r, seed=0):
    """Distinct, of either sign, in no order, the largest not 1."""
    s = torch.linspace(0.2, 1.7, r, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (r,), generator=generator) - 1
    return (s * signs)[torch.randperm(r, generator=generator)]


def central_differences(function, s, step=1e-6):
    shifts = step * torch.eye(len(s), dtype=s.dtype)
    return torch.stack([(function(s + d) - function(s - d)) / (2 * step) for d in shifts])


class Spectrum(nn.Module):
    """A parametrization of the user's own: a diagonal matrix, by one or two stored tensors."""

    def __init__(self, stored=1):
        super().__init__()
        self.stored = stored

    def forward(self, *parts):
        return torch.diag(self.singular_values(*parts))

    def right_inverse(self, weight):
        return weight.diagonal() if self.stored == 1 else weight.diagonal().chunk(self.stored)

    def singular_values(self, *parts):
        return torch.cat(parts)


def diagonal(*entries, stored=1):
    layer = nn.Linear(len(entries), len(entries), dtype=torch.float64)
    layer.weight = nn.Parameter(torch.diag(torch.tensor(entries, dtype=torch.float64)))
    return parametrize.register_parametrization(layer, "weight", Spectrum(stored))


# ------------------------------------------------------------------------------------------------------- d_optimal


@pytest.mark.parametrize("r", [1, 2, 9])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_d_optimal_is_the_logarithm_of_the_product(r, scale):
    s = values(r)
    expected = -float((s.abs() / s.abs().max()).log().sum())
    assert float(d_optimal(scale * s, "sum")) == pytest.approx(expected, rel=1e-12)
    assert float(d_optimal(scale * s)) == pytest.approx(expected / r, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_d_optimal_is_zero_where_all_values_are_equal(dtype):
    s = torch.full((7,), 0.3, dtype=dtype, requires_grad=True)
    penalty = d_optimal(s, "sum")
    penalty.backward()
    assert float(penalty.detach()) == 0
    torch.testing.assert_close(s.grad, torch.zeros_like(s), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(r=st.integers(2, 8), seed=st.integers(0, 2**31), name=st.sampled_from(sorted(PENALTIES)))
def test_gradients_agree_with_finite_differences(r, seed, name):
    s = values(r, seed).requires_grad_()
    (gradient,) = torch.autograd.grad(PENALTIES[name](s, reduction="sum"), s)
    numeric = central_differences(lambda s: PENALTIES[name](s, reduction="sum"), s.detach())
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(PENALTIES[name], s)


def test_d_optimal_gradient_is_that_of_the_normalised_values():
    """-1 / s_i below the largest; the largest has what makes the penalty invariant to scale."""
    s = torch.tensor([0.5, -0.1, 2.0, 1e-4], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(d_optimal(s, "sum"), s)
    expected = torch.tensor([-2.0, 10.0, 1.5, -1e4], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-30, 1e-10, 1e-7])
@pytest.mark.parametrize("name", PENALTIES)
def test_vanishing_values_give_finite_results(small, name):
    s = torch.tensor([1.0, small, small], requires_grad=True)
    penalty = PENALTIES[name](s, reduction="sum")
    penalty.backward()
    assert 10 < float(penalty.detach()) < 300
    assert bool(torch.isfinite(s.grad).all())


@pytest.mark.parametrize("small", [1e-30, 1e-10, 1e-8])
def test_d_optimal_lifts_values_however_small(small):
    """A clamp, as published, has no gradient below 1e-7."""
    s = torch.tensor([1.0, small], requires_grad=True)
    d_optimal(s, "sum").backward()
    assert s.grad[1] < -1e5


@pytest.mark.parametrize("name", PENALTIES)
def test_all_values_zero(name):
    s = torch.zeros(3, requires_grad=True)
    PENALTIES[name](s).backward()
    assert bool(torch.isfinite(s.grad).all())


# ------------------------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("a", [0.1, 0.7])
def test_divergence_term_by_term(a):
    s = torch.tensor([0.6, -2.0, 1.0, 0.2], dtype=torch.float64)
    q = [1.0, 0.5, 0.3, 0.1]
    terms = [((1 - q[i]) / a) ** 2 - math.log(q[i - 1] - q[i]) for i in (1, 2, 3)]
    assert float(divergence(s, a, "sum")) == pytest.approx(sum(terms), rel=1e-12)
    assert float(divergence(s, a)) == pytest.approx(sum(terms) / 3, rel=1e-12)


def test_divergence_has_no_terms_for_one_value():
    s = torch.ones(1, requires_grad=True)
    divergence(s).backward()
    assert float(divergence(s.detach())) == 0
    assert float(s.grad) == 0


def test_divergence_separates_values_that_nearly_coincide():
    s = torch.tensor([1.0, 0.9, 0.9 - 1e-6], dtype=torch.float64, requires_grad=True)
    divergence(s).backward()
    assert s.grad[1] < -1e4
    assert s.grad[2] > 1e4


def test_batches_are_normalised_one_by_one():
    batch = torch.stack([values(5), 3 * values(5, seed=1)])
    for penalty in PENALTIES.values():
        parts = penalty(batch[0], reduction="sum") + penalty(batch[1], reduction="sum")
        torch.testing.assert_close(penalty(batch, reduction="sum"), parts, rtol=1e-12, atol=0)
        torch.testing.assert_close(penalty(batch), (penalty(batch[0]) + penalty(batch[1])) / 2, rtol=1e-12, atol=0)


def test_half_precision_is_computed_in_float32():
    s = values(5).bfloat16()
    assert torch.equal(d_optimal(s), d_optimal(s.float()))


# ---------------------------------------------------------------------------------------------------------- models


def test_model_penalty_is_that_of_its_spectral_layers():
    shared = diagonal(1.0, 0.5, stored=2)
    model = nn.Sequential(nn.Linear(3, 3), diagonal(2.0, 1.0, 0.5), shared, nn.ReLU(), shared)
    total = math.log(2) + math.log(4) + math.log(2)
    assert float(spectral_penalty(model).detach()) == pytest.approx(total / 5, rel=1e-12)
    assert float(spectral_penalty(model, reduction="sum").detach()) == pytest.approx(total, rel=1e-12)
    for name, a in (("divergence", 0.1), (partial(divergence, a=0.3), 0.3)):
        expected = sum(float(divergence(torch.tensor(s), a, "sum")) for s in ([2.0, 1.0, 0.5], [1.0, 0.5]))
        assert float(spectral_penalty(model, name, "sum").detach()) == pytest.approx(expected, rel=1e-6)
    assert (
        float(spectral_penalty(model, lambda s, reduction: (s - 2).square().sum(), "sum").detach())
        == 0 + 1 + 2.25 + 1 + 2.25
    )


@pytest.mark.parametrize("form", ["householder", "stiefel"])
@pytest.mark.parametrize("wrap", [svdp, sttp])
def test_layers_of_the_library_are_spectral(wrap, form):
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3), nn.Linear(8, 6), nn.ConvTranspose2d(4, 6, 2)]
    model = nn.Sequential(*(wrap(m.double(), 3, "free", form=form) for m in layers), nn.Conv2d(3, 3, 3))
    matrices = [model[0].weight.flatten(1), model[1].weight, model[2].weight.transpose(0, 1).flatten(1)]
    s = [torch.linalg.svdvals(m.detach())[:3] for m in matrices]
    expected = sum(float(d_optimal(v, "sum")) for v in s)
    assert float(spectral_penalty(model, reduction="sum").detach()) == pytest.approx(expected, rel=1e-10)
    assert float(spectral_penalty(model).detach()) == pytest.approx(expected / 9, rel=1e-10)


def test_descending_the_penalty_flattens_the_spectrum():
    torch.manual_seed(0)
    model = svdp(nn.Conv2d(4, 6, 3), 5, "lipschitz")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = torch.linalg.svdvals(model.weight.detach().flatten(1))[:5]
    for _ in range(300):
        optimizer.zero_grad()
        spectral_penalty(model, reduction="sum").backward()
        optimizer.step()
    after = torch.linalg.svdvals(model.weight.detach().flatten(1))[:5]
    assert before[4] < 0.6
    assert after[4] > 0.95
    assert float(after[0]) == pytest.approx(1, abs=1e-5)


def test_penalty_of_identity_spectra_is_zero():
    assert float(spectral_penalty(svdp(nn.Linear(6, 5), 4, "identity")).detach()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_penalty(nn.Linear(3, 3)), "model has no spectral layer"),
        (lambda: spectral_penalty(diagonal(1.0, 0.5), "entropy"), "penalty must be 'd_optimal' .* got 'entropy'"),
        (lambda: spectral_penalty(diagonal(1.0, 0.5), reduction="none"), "reduction must be .* got 'none'"),
        (lambda: d_optimal(torch.ones(3), "max"), "reduction must be 'mean' or 'sum', got 'max'"),
        (lambda: d_optimal(torch.tensor(1.0)), r"values must be a non-empty tensor .* got shape \(\)"),
        (lambda: d_optimal(torch.ones(2, 0)), r"values must be .* \(2, 0\)"),
        (lambda: divergence(torch.ones(3), 0.0), "a must be positive, got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
