"""Spectral regularization: the paper's weight, its gradient, and the state of dynamic compensation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from retract.nets.parametrizations.spectral_regularization import SpectralRegularization, spectral_regularization

LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "wide": lambda: nn.Linear(9, 4),
    "conv1d": lambda: nn.Conv1d(2, 5, 3),
    "conv2d": lambda: nn.Conv2d(2, 4, (3, 2)),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 3, 2),
    "embedding": lambda: nn.Embedding(6, 4),
}


def make(name="linear", seed=0):
    torch.manual_seed(seed)
    return LAYERS[name]().double()


def matrix(layer, weight=None):
    weight = layer.weight if weight is None else weight
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1).detach()


def relative_values(layer, weight=None):
    s = torch.linalg.svdvals(matrix(layer, weight))
    return s / s[0]


def original(layer):
    return layer.parametrizations.weight.original


# ---------------------------------------------------------------------------------------------------------- weight


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_static_compensation_raises_the_first_values(name, fraction):
    layer = make(name)
    before = relative_values(layer)
    regularized = spectral_regularization(copy.deepcopy(layer), "static", fraction=fraction)
    raised = max(1, int(fraction * len(before)))
    expected = torch.cat((torch.ones(raised).double(), before[raised:]))
    torch.testing.assert_close(torch.linalg.svdvals(matrix(regularized)), expected, rtol=1e-12, atol=1e-13)
    u, _, vh = torch.linalg.svd(matrix(layer), full_matrices=False)
    torch.testing.assert_close(matrix(regularized), (u * expected) @ vh, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_compensation_starts_as_spectral_normalization(name):
    layer = make(name)
    regularized = spectral_regularization(copy.deepcopy(layer))
    torch.testing.assert_close(
        matrix(regularized), matrix(layer) / torch.linalg.matrix_norm(matrix(layer), 2), rtol=0, atol=1e-13
    )


def test_dynamic_compensation_lets_no_ratio_fall():
    layer = spectral_regularization(make("conv2d"))
    highest = relative_values(layer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        with torch.no_grad():
            original(layer).add_(torch.randn(original(layer).shape, generator=generator, dtype=torch.float64))
        highest = torch.maximum(highest, relative_values(layer, original(layer)))
        torch.testing.assert_close(torch.linalg.svdvals(matrix(layer)), highest, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.parametrizations.weight[0].ratios, highest, rtol=1e-12, atol=0)
    assert bool((highest[1:] > relative_values(layer, original(layer))[1:]).any())


def test_evaluation_compensates_but_does_not_record():
    layer = spectral_regularization(make())
    start = layer.parametrizations.weight[0].ratios.clone()
    flat = nn.init.orthogonal_(torch.empty(7, 5, dtype=torch.float64))
    layer.eval()
    with torch.no_grad():
        original(layer).copy_(flat)
    torch.testing.assert_close(relative_values(layer), torch.ones(5).double())
    assert torch.equal(layer.parametrizations.weight[0].ratios, start)
    layer.train()
    assert layer.weight is not None
    torch.testing.assert_close(layer.parametrizations.weight[0].ratios, torch.ones(5).double())


# -------------------------------------------------------------------------------------------------------- gradient


def singular_triplets(layer):
    u, s, vh = torch.linalg.svd(matrix(layer, original(layer)), full_matrices=False)
    return s, torch.einsum("ik,kj->kij", u, vh)


def test_static_gradient_is_the_papers():
    """The derivative of W^SR by the entry (a, b) of W, as Liu et al. print it."""
    layer = spectral_regularization(make("wide"), "static", fraction=0.5)
    i = layer.parametrizations.weight[0].raised
    assert i == 2
    s, outer = singular_triplets(layer)
    normalised = matrix(layer, original(layer)) / s[0]
    shift = sum((s[0] - s[k]) * outer[k] for k in range(1, i))
    for a, b in ((0, 0), (3, 7)):
        unit = torch.zeros_like(normalised)
        unit[a, b] = 1
        expected = unit - normalised * outer[0, a, b] - shift / s[0] * outer[0, a, b]
        expected = (expected + sum((outer[0, a, b] - outer[k, a, b]) * outer[k] for k in range(1, i))) / s[0]
        jacobian = torch.autograd.functional.jacobian(layer.parametrizations.weight[0], original(layer).detach())
        torch.testing.assert_close(jacobian[:, :, a, b], expected, rtol=0, atol=1e-12)


def test_dynamic_gradient_is_that_of_the_values():
    """W^SR = W / s_1 + sum_k (gamma_k - s_k / s_1) u_k v_k^T at constant gamma, u and v."""
    layer = spectral_regularization(make("wide"))
    parametrization = layer.parametrizations.weight[0]
    parametrization.ratios.copy_(torch.tensor([1, 0.9, 0.8, 0.7]))
    s, outer = singular_triplets(layer)
    weight = original(layer).detach()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, found = torch.autograd.functional.jvp(parametrization, weight, direction)
    slopes = (outer * direction).sum((1, 2))
    relative_slopes = slopes / s[0] - s * slopes[0] / s[0] ** 2
    expected = direction / s[0] - weight * slopes[0] / s[0] ** 2 - (relative_slopes[:, None, None] * outer).sum(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradient_is_finite_where_values_coincide():
    layer = make()
    nn.init.orthogonal_(layer.weight)
    for compensation in ("dynamic", "static"):
        regularized = spectral_regularization(copy.deepcopy(layer), compensation)
        (regularized.weight * torch.arange(5)).sum().backward()
        assert bool(torch.isfinite(original(regularized).grad).all())


@pytest.mark.parametrize("compensation", ["dynamic", "static"])
def test_two_passes_in_one_step_and_one_decomposition_by_cached(compensation, monkeypatch):
    layer = spectral_regularization(make("conv2d"), compensation)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    (layer(x).square().mean() - layer(-x).mean()).backward()
    assert bool(torch.isfinite(original(layer).grad).all())
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    with parametrize.cached():
        layer(x)
        layer(-x)
    assert len(calls) == 1


# --------------------------------------------------------------------------------------------------- use in a model


@pytest.mark.parametrize("compensation", ["dynamic", "static"])
def test_copies_and_state_dicts_keep_the_weight(compensation):
    layer = spectral_regularization(make("conv2d"), compensation)
    with torch.no_grad():
        original(layer).mul_(torch.rand(original(layer).shape))
    weight = layer.weight.detach()
    assert torch.equal(copy.deepcopy(layer).weight, weight)
    other = spectral_regularization(make("conv2d", seed=5), compensation)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, weight)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in make("conv2d").parameters())
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight)


def test_assigned_weights_are_kept_if_they_conform():
    layer = spectral_regularization(make(), "static")
    conforming = layer.weight.detach().clone()
    other = spectral_regularization(make(seed=1), "static")
    other.weight = conforming
    torch.testing.assert_close(other.weight.detach(), conforming, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    layer = make().to(dtype)
    expected = spectral_regularization(copy.deepcopy(layer).float(), "static").weight
    assert torch.equal(spectral_regularization(layer, "static").weight, expected.to(dtype))


def test_autocast_does_not_lower_precision():
    layer = spectral_regularization(make().float())
    expected = layer.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, expected)


def test_training_keeps_the_spectrum_up():
    """Fitting a matrix of rank one collapses the spectrum of a normalised weight; not of a regularized one."""
    torch.manual_seed(0)
    target = torch.zeros(7, 5).double()
    target[0, 0] = 1
    lowest = {}
    for compensation in ("dynamic", "static", None):
        layer = make()
        layer = (
            spectral_regularization(layer, compensation)
            if compensation
            else nn.utils.parametrizations.spectral_norm(layer)
        )
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(200):
            optimizer.zero_grad()
            (layer.weight - target).square().sum().backward()
            optimizer.step()
        lowest[compensation] = float(relative_values(layer)[1])
    assert lowest[None] < 1e-3
    assert lowest["static"] == pytest.approx(1, abs=1e-12)
    assert lowest["dynamic"] >= float(relative_values(make())[1]) - 1e-12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spectral_regularization(make(), "both"), ValueError, "compensation must be .* got 'both'"),
        (lambda: spectral_regularization(make(), "static", fraction=0.0), ValueError, r"fraction must be in \(0, 1\]"),
        (lambda: spectral_regularization(nn.Conv2d(4, 4, 3, groups=2)), ValueError, "groups=2"),
        (lambda: spectral_regularization(nn.BatchNorm2d(4)), TypeError, "module must be one of .* got BatchNorm2d"),
        (lambda: SpectralRegularization(torch.zeros(3, 3)), ValueError, "weight must be finite and not zero"),
        (lambda: SpectralRegularization(torch.full((3, 3), torch.nan)), ValueError, "weight must be finite"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_input_leaves_the_layer():
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="weight"):
        spectral_regularization(layer)
    assert not parametrize.is_parametrized(layer)
