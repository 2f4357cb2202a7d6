"""Pressure on terms: the penalty is the l1 norm, shrinking its proximal step, and what is zero can be cut."""

import copy

import pytest
import torch
from torch import nn

from retract.nets._canonical_pressure import canonical_penalty, shrink_terms_
from retract.nets._truncation import truncate
from retract.nets.parametrizations.canonical import canonical_weight_norm
from retract.nets.parametrizations.models import canonical_weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).double()
    canonical_weight_norm(model[0], 6)
    canonical_weight_norm(model[3], 4, form="oblique")
    with torch.no_grad():
        for _, _, (weights, *_) in canonical_weights(model):
            weights.normal_()
    return model


def weights_of(model):
    return [originals[0] for _, _, originals in canonical_weights(model)]


def test_the_penalty_is_the_sum_of_the_magnitudes_of_the_terms(model):
    expected = sum(canonical.terms(*originals)[0].abs().sum() for _, canonical, originals in canonical_weights(model))
    penalty = canonical_penalty(model)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    for _, canonical, (weights, *factors) in canonical_weights(model):
        torch.testing.assert_close(weights.grad, canonical.sigma * weights.sign())
        assert all(factor.grad is None for factor in factors)


def test_shrinking_is_the_proximal_step_of_the_penalty(model):
    """lambda minimises |x - lambda|^2 / 2 + threshold * penalty(x): its subgradient condition."""
    before = [weights.detach().clone() for weights in weights_of(model)]
    factors = [f.detach().clone() for _, _, (_, *fs) in canonical_weights(model) for f in fs]
    shrink_terms_(model, 0.4)
    zeros = 0
    for old, (_, canonical, (new, *_)) in zip(before, canonical_weights(model), strict=True):
        pull = (old - new) / (0.4 * canonical.sigma)
        assert (pull.abs() <= 1 + 1e-12).all()
        torch.testing.assert_close(pull[new != 0], new[new != 0].sign())
        zeros += int((new == 0).sum())
    assert zeros > 0
    for old, new in zip(factors, [f for _, _, (_, *fs) in canonical_weights(model) for f in fs], strict=True):
        assert torch.equal(old, new)


def test_terms_that_became_zero_are_cut_without_a_change_of_the_model(model):
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    shrink_terms_(model, 0.4)
    expected = model(x)
    cut = truncate(model, error=0)
    torch.testing.assert_close(cut.model(x), expected)
    for layer, weights in zip(cut.layers, weights_of(model), strict=True):
        assert layer.new_rank == int((weights != 0).sum()) < layer.old_rank
        assert layer.error == 0


def test_the_proximal_gradient_method_reaches_exact_zeros_at_the_minimum_of_loss_and_penalty():
    torch.manual_seed(0)
    layer = canonical_weight_norm(nn.Linear(6, 5, bias=False).double(), 5)
    weights = weights_of(layer)[0]
    _, canonical, (_, *factors) = next(canonical_weights(layer))
    target = canonical(torch.tensor([1.5, -1.2, 1.0, 0.2, 0.1], dtype=torch.float64), *factors).detach()
    optimizer = torch.optim.SGD([weights], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = 0.5 * (layer.weight - target).square().sum()
        loss.backward()
        gradient = weights.grad.clone()
        optimizer.step()
        shrink_terms_(layer, 0.2 * 0.9)
    live, bound = weights != 0, 0.9 * canonical.sigma
    assert 0 < int(live.sum()) < 5
    torch.testing.assert_close(gradient[live], -bound * weights[live].sign(), atol=1e-6, rtol=0)
    assert (gradient[~live].abs() <= bound).all()


def test_a_layer_without_weight_left_cannot_be_cut(model):
    shrink_terms_(model, 100.0)
    assert all((weights == 0).all() for weights in weights_of(model))
    with pytest.raises(ValueError, match=r"layer '0' has weight zero: .* without terms"):
        truncate(model, error=0)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_the_threshold_is_finite_and_not_negative(model, threshold):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="threshold"):
        shrink_terms_(model, threshold)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("function", [canonical_penalty, lambda model: shrink_terms_(model, 0.1)])
def test_a_model_without_canonical_layers_is_refused(function):
    with pytest.raises(ValueError, match="model has no canonical layer"):
        function(nn.Linear(3, 2))
