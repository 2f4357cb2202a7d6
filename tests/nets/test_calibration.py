"""Calibration: low-rank layers fitted, one after another, to a dense network on data."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from retract.nets.cnn import digitsnet
from retract.nets.init.calibration import calibrate
from retract.nets.layers.low_rank import LowRankLayer, low_rank_layer
from tests.nets.calibration_models import (
    convolutional,
    images,
    lowered,
    normal,
    perceptron,
    relative_error,
    same,
    scrambled,
    state,
    trained,
)

# ---------------------------------------------------------------------------------------------- exact where it can be


@pytest.mark.parametrize("unfolding", ["output", "input", "separable"])
def test_a_network_of_low_rank_is_found_again(unfolding):
    """Whatever the factors were, biases included, without and with groups, and a layer without a bias."""
    reference = lowered(convolutional(norm=False), 2, unfolding=unfolding)
    for name, layer in list(reference.named_children()):
        if isinstance(layer, LowRankLayer):
            setattr(reference, name, layer.to_dense())
    model = scrambled(lowered(reference, 2, unfolding=unfolding))
    report = calibrate(model, images(), reference=reference)
    assert relative_error(model, reference, images(1, seed=50)[0]) < 1e-16
    assert max(layer.error for layer in report.layers) < 1e-16
    assert min(layer.error_before for layer in report.layers) > 0.01
    assert [layer.energy for layer in report.layers] == pytest.approx([1] * 4)


def test_at_full_rank_a_normalized_network_is_found_again():
    batches = images()
    reference = trained(convolutional(), batches)
    model = scrambled(copy.deepcopy(reference))
    for name, rank in (("0", 8), ("3", 4), ("6", 6), ("10", 5)):
        setattr(model, name, low_rank_layer(reference.get_submodule(name), rank))
    scrambled(model)
    calibrate(model, batches, reference=reference)
    assert relative_error(model, reference, images(1, seed=50)[0]) < 1e-2  # statistics of the reference are others


# -------------------------------------------------------------------------------------------------------- what it buys


def test_on_features_after_a_relu_whitening_and_the_rectifier_reach_the_published_gains():
    """m = d = 256, r = 32: spectral .55, whitened .32, with the rectifier .28, of test rows."""
    first, second = normal(256, 256, seed=1) * math.sqrt(2 / 256), normal(256, 256, seed=2) * math.sqrt(2 / 256)
    x, test = (F.relu(normal(rows, 256, seed=rows) @ first.T) for rows in (6000, 4000))
    reference = nn.Sequential(nn.Linear(256, 256), nn.ReLU()).double()
    with torch.no_grad():
        reference[0].weight.copy_(second)
        reference[0].bias.zero_()
    error = {"spectral": relative_error(lowered(reference, 32), reference, test)}
    for name, options in (
        ("whitened", {"iterations": 0, "bias": False}),
        ("with bias", {"iterations": 0}),
        ("rectifier", {"iterations": 20}),
    ):
        model = lowered(reference, 32)
        calibrate(model, [x], reference=reference, **options)
        error[name] = relative_error(model, reference, test)
    assert 0.53 < error["spectral"] < 0.60
    assert 0.54 < error["whitened"] / error["spectral"] < 0.64
    assert error["rectifier"] < 0.9 * error["with bias"] < 0.9 * error["whitened"]


def test_a_deep_network_keeps_its_output_energy():
    """Six layers, r = d / 8: the nearest matrices lose all but a few thousandths of it."""
    reference = perceptron(*(96,) * 7)
    x, test = (normal(rows, 96, seed=rows) for rows in (2500, 2000))
    spectral, model = lowered(reference, 12), lowered(reference, 12)
    report = calibrate(model, x.split(500), reference=reference)
    with torch.no_grad():
        wanted = reference(test).square().sum()
        energy = {name: float(net(test).square().sum() / wanted) for name, net in (("s", spectral), ("c", model))}
    assert energy["s"] < 0.02 and energy["c"] > 0.6
    assert relative_error(model, reference, test) < 0.4
    assert [layer.name for layer in report.layers] == ["0", "2", "4", "6", "8", "10"]
    # Error does not pile up: what is measured on the way is what the network does at its end.
    assert report.layers[-1].energy == pytest.approx(energy["c"], rel=0.05)
    assert report.layers[-1].error == pytest.approx(relative_error(model, reference, test), rel=0.1)


def test_each_layer_reads_what_the_fitted_ones_give():
    """The second layer is fitted alone just as in a network whose first one was fitted before."""
    reference, batches = perceptron(10, 12, 8), normal(400, 10).split(100)
    together = lowered(reference, 3)
    calibrate(together, batches, reference=reference)
    apart = lowered(reference, 3)
    apart[0] = together[0].to_dense()
    calibrate(apart, batches, reference=reference)
    torch.testing.assert_close(apart[2].weight, together[2].weight)
    other = lowered(reference, 3, skip=("0",))
    calibrate(other, batches, reference=reference)
    assert float((other[2].weight - apart[2].weight).detach().abs().max()) > 1e-3


def test_a_trained_network_keeps_its_accuracy():
    digits = load_digits()
    x, y = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(0)
    reference = digitsnet()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.03, momentum=0.9)
    for _ in range(10):
        for rows in torch.randperm(1400).split(50):
            optimizer.zero_grad()
            F.cross_entropy(reference(x[rows]), y[rows]).backward()
            optimizer.step()

    def accuracy(net):
        with torch.no_grad():
            return float((net.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean())

    batches = [(x[:1200][i::6], None) for i in range(6)]
    spectral, model = (lowered(reference, 8, skip=("block1.0", "fc")) for _ in range(2))
    torch.optim.swa_utils.update_bn([batch for batch, _ in batches], spectral)
    calibrate(model, batches, reference=reference, rows=4096, iterations=5)
    assert accuracy(reference) > 0.9
    assert accuracy(model) > accuracy(reference) - 0.06
    assert accuracy(model) > accuracy(spectral) + 0.02


# ------------------------------------------------------------------------------------------------------ normalizations


def test_running_statistics_are_those_of_the_models_own_activations():
    batches = images()
    reference = trained(convolutional(), batches)
    model = lowered(reference, 2)
    parameters = [parameter.detach().clone() for parameter in model[1].parameters()]
    calibrate(model, batches, reference=reference)
    assert model[0].bias is not None and model[6].bias is None
    assert all(torch.equal(a, b) for a, b in zip(parameters, model[1].parameters(), strict=True))
    seen = {place: [] for place in (1, 4, 7)}
    for place in seen:
        model[place].register_forward_pre_hook(lambda m, args, place=place: seen[place].append(args[0]))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    # The first of a batch's own statistics shape what the later normalizations read while they are estimated.
    for place, inputs in seen.items():
        close = {"rtol": 1e-9, "atol": 1e-9} if place == 1 else {"rtol": 0.05, "atol": 0.05}
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(model[place].running_mean, mean, **close)
        torch.testing.assert_close(model[place].running_var, variance, **close)
        assert model[place].momentum is None  # as `trained` left it


def test_statistics_before_the_first_fitted_layer_stay():
    batches = images()
    reference = trained(convolutional(), batches)
    model = lowered(reference, 2, skip=("0",))
    model[1].momentum = 0.3
    calibrate(model, images(seed=60), reference=reference)
    assert torch.equal(model[1].running_mean, reference[1].running_mean) and model[1].momentum == 0.3
    assert not torch.equal(model[4].running_mean, reference[4].running_mean)


def test_a_fresh_network_is_calibrated_with_statistics_of_the_batches():
    """Its running statistics say nothing; a reference that has seen the same batches gives the same fit."""
    reference, batches = convolutional(), images()
    seen = copy.deepcopy(reference)
    for norm in seen.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            seen(batch)
    one, other = lowered(reference, 2), lowered(reference, 2)
    before = state(reference)
    calibrate(one, batches, reference=reference)
    calibrate(other, batches, reference=seen)
    assert same(before, reference.state_dict())
    assert int(one[1].num_batches_tracked) == len(batches)
    torch.testing.assert_close(one(batches[0]), other(batches[0]))


# ---------------------------------------------------------------------------------------------------- what it leaves


def test_modes_hooks_random_state_and_the_reference_are_left():
    batches = images()
    reference = trained(convolutional(), batches)
    model = lowered(reference, 2).train()
    model[1].eval()
    modes = [[module.training for module in net.modules()] for net in (model, reference)]
    before, random = state(reference), torch.get_rng_state()
    calibrate(model, batches, reference=reference)
    assert modes == [[module.training for module in net.modules()] for net in (model, reference)]
    assert same(before, reference.state_dict()) and torch.equal(random, torch.get_rng_state())
    for module in (*model.modules(), *reference.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_it_is_deterministic_and_runs_in_inference_mode():
    reference, batches = convolutional(norm=False), images()
    one, other = lowered(reference, 2), lowered(reference, 2)
    first = calibrate(one, batches, reference=reference, rows=300)
    with torch.inference_mode():
        assert calibrate(other, batches, reference=reference, rows=300) == first
    assert same(one.state_dict(), other.state_dict())
    one(batches[0]).sum().backward()
    assert first.layers[0].rows + first.layers[0].held_out == 300


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_fitted_or_left(bias):
    reference, batches = perceptron(10, 12, 8), normal(1000, 10).split(100)
    reference[2] = nn.Linear(12, 8, bias=False).double()
    model = lowered(reference, 3)
    before = model[0].bias.detach().clone()
    calibrate(model, batches, reference=reference, bias=bias)
    assert torch.equal(before, model[0].bias) is not bias
    assert model[2].bias is None


def test_the_report():
    batches = images()
    reference = trained(convolutional(), batches)
    model = lowered(reference, 2)
    report = calibrate(model, batches, reference=reference)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "followed", "by", "rank", "rows", "error", "was", "energy", "was"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "3", "6", "10"]
    assert [layer.following for layer in report.layers] == ["BatchNorm, ReLU"] * 3 + [""]
    assert all(layer.error <= layer.error_before for layer in report.layers)
    # The last layer is linear, so what is reported there is what the network does, but for the rows held out.
    assert report.layers[-1].error == pytest.approx(relative_error(model, reference, torch.cat(batches)), rel=0.4)
