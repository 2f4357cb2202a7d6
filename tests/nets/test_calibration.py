"""Calibration: low-rank layers fitted, one after another, to a dense network on data."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from retract.nets.cnn import digitsnet
from retract.nets.init.calibration import calibrate
from retract.nets.layers.low_rank import LowRankLayer, LowRankLinear, low_rank_layer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def lowered(reference, rank, *, skip=(), unfolding="output", method="spectral"):
    """A copy with linear layers and convolutions of low rank."""
    model = copy.deepcopy(reference)
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in skip:
            parent, _, child = name.rpartition(".")
            kind = "output" if isinstance(layer, nn.Linear) else unfolding
            setattr(model.get_submodule(parent), child, low_rank_layer(layer, rank, unfolding=kind, method=method))
    return model


def perceptron(*sizes, norm=False, seed=0, bias=True):
    """He's initialization, ReLU after each layer, perhaps BatchNorm before it."""
    torch.manual_seed(seed)
    parts = []
    for before, size in itertools.pairwise(sizes):
        layer = nn.Linear(before, size, bias=bias)
        nn.init.kaiming_normal_(layer.weight)
        parts += [layer, *([nn.BatchNorm1d(size)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts).double()


def convolutional(norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Conv2d(8, 6, 3, bias=False)]
    norms = [nn.BatchNorm2d(layer.out_channels) for layer in layers]
    parts = [part for pair in zip(layers, norms, strict=True) for part in (*pair[: 1 + norm], nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(24, 5)).double()


def images(count=4, size=40, seed=0):
    return [normal(size, 3, 9, 9, seed=seed + i) for i in range(count)]


def trained(model, batches):
    """With the running statistics of some batches, and other parameters than at the start."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = None
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model


def scrambled(model):
    """Other factors and biases in the low-rank layers."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LowRankLayer):
                for parameter in layer.parameters():
                    parameter.copy_(normal(*parameter.shape, seed=parameter.numel()))
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def relative_error(model, reference, x):
    model.eval(), reference.eval()
    wanted = reference(x)
    return float((model(x) - wanted).square().sum() / wanted.square().sum())


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


# ---------------------------------------------------------------------------------------------------------- the data


class Pairs(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.layer(input=x + y)


def test_batches_may_be_any_iterable_of_inputs_and_is_passed_once():
    reference, x = perceptron(6, 5), normal(60, 6)
    labels = torch.zeros(60)
    expected = lowered(reference, 2)
    calibrate(expected, list(x.split(20)), reference=reference)
    passes = []

    def once():
        passes.append(1)
        yield from x.split(20)

    for batches in (
        once(),
        DataLoader(TensorDataset(x, labels), batch_size=20),
        [(batch, "a label") for batch in x.split(20)],
        ([batch] for batch in x.float().double().split(20)),
    ):
        model = lowered(reference, 2)
        calibrate(model, batches, reference=reference)
        torch.testing.assert_close(model[0].weight, expected[0].weight, rtol=1e-3, atol=1e-3)
    assert passes == [1]


def test_an_input_may_be_several_tensors():
    reference = Pairs()
    model = lowered(reference, 2)
    batches = [((normal(20, 4), normal(20, 4, seed=1)), torch.zeros(20))]
    assert calibrate(model, batches, reference=reference).layers[0].rows == 16


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "at least one batch"),
        (torch.zeros(5, 6), TypeError, "iterable of batches"),
        (3, TypeError, "iterable of batches"),
        ([{"x": torch.zeros(5, 6)}], TypeError, None),
        (["text"], TypeError, "batch 0"),
        ([[]], TypeError, "batch 0"),
        ([torch.zeros(5, 6), torch.full((5, 6), math.nan)], ValueError, "batch 1 has NaN"),
        ([torch.full((5, 6), math.inf)], ValueError, "batch 0 has NaN"),
        (
            [torch.zeros(5, 6), torch.full((5, 6), 1e200, dtype=torch.float64)],
            ValueError,
            "batch 1 makes the output of layer '0' NaN, infinite or",
        ),
    ],
)
def test_bad_batches_are_refused_and_nothing_has_changed(batches, error, message):
    reference = perceptron(6, 8, 5, norm=False)
    with torch.no_grad():
        reference[0].weight.mul_(1e10)
    model = lowered(reference, 2).train()
    before = state(model)
    with pytest.raises(error, match=message):
        calibrate(model, batches, reference=reference)
    assert same(before, model.state_dict()) and model.training


def test_an_error_half_way_leaves_the_model_as_it_was():
    batches = images()
    reference = trained(convolutional(), batches)
    model = lowered(reference, 2)
    before = state(model)
    model[10].register_forward_pre_hook(lambda module, args: 1 / 0 if not same(before, model.state_dict()) else None)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, batches, reference=reference)
    assert same(before, model.state_dict()) and model[1].momentum is None
    assert all(module.training for module in (*model.modules(), *reference.modules()))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.used(x)


def test_models_that_do_not_fit_are_refused():
    reference, x = perceptron(6, 8, 5), [normal(20, 6)]
    model = lowered(reference, 2)
    shared = copy.deepcopy(reference)
    shared[0], shared[1] = low_rank_layer(reference[0], 2), reference[1]
    cases = [
        (model, 3, TypeError, "reference must be a torch.nn.Module"),
        (lambda x: x, reference, TypeError, "model must be a torch.nn.Module"),
        (copy.deepcopy(reference), reference, ValueError, "low-rank layer such as LowRankLinear"),
        (model, reference[:2], ValueError, "layer '2'.*got no such layer"),
        (model, perceptron(6, 8, 4), ValueError, r"layer '2' with a weight of shape \(5, 8\), got Linear.*\(4, 8\)"),
        (model, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ReLU()), ValueError, "got ReLU with a weight"),
        (shared, reference, ValueError, "share no module"),
        (lowered(Unused(), 2), Unused(), ValueError, "does not reach the layers unused"),
        (
            nn.Sequential(low_rank_layer(nn.Conv2d(6, 4, 3), 2)),
            nn.Sequential(nn.Conv2d(6, 4, 3, 2)),
            ValueError,
            "stride",
        ),
    ]
    for one, other, error, message in cases:
        with pytest.raises(error, match=message):
            calibrate(one, x, reference=other)
    for name, value, error in (
        ("iterations", -1, ValueError),
        ("iterations", 1.5, TypeError),
        ("rows", 0, ValueError),
        ("rows", True, TypeError),
        ("ridge", 0.0, ValueError),
        ("ridge", math.inf, ValueError),
    ):
        with pytest.raises(error, match=name):
            calibrate(model, x, reference=reference, **{name: value})


# ----------------------------------------------------------------------------------------------- hard data and types


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_fewer_rows_than_inputs_make_nothing_worse_than_the_dense_weight_suggests(rows):
    reference = perceptron(40, 30, 20)
    model, spectral = lowered(reference, 4), lowered(reference, 4)
    report = calibrate(model, [normal(rows, 40)], reference=reference)
    assert all(math.isfinite(layer.error) and layer.error <= layer.error_before for layer in report.layers)
    test = normal(2000, 40, seed=9)
    assert relative_error(model, reference, test) < 1.3 * relative_error(spectral, reference, test)


def test_dead_and_constant_inputs():
    """Directions without data; then a batch that says nothing at all, where the nearest matrix is what there is."""
    reference = perceptron(12, 10, 8)
    with torch.no_grad():
        reference[0].bias[:4] = -1e3
    model = lowered(reference, 3)
    report = calibrate(model, normal(500, 12).split(100), reference=reference)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert report.layers[1].error < report.layers[1].error_before
    model, spectral = scrambled(lowered(reference, 3)), lowered(reference, 3)
    calibrate(model, [torch.ones(50, 12)], reference=reference)
    torch.testing.assert_close(model[0].weight, spectral[0].weight)
    torch.testing.assert_close(model(torch.ones(1, 12).double()), reference(torch.ones(1, 12).double()))


def test_a_layer_whose_reference_is_silent():
    """No energy to divide by."""
    reference = perceptron(6, 5)
    with torch.no_grad():
        reference[0].weight.zero_()
        reference[0].bias.fill_(-1)
    model = lowered(reference, 2)
    layer = calibrate(model, [normal(30, 6)], reference=reference).layers[0]
    assert math.isnan(layer.energy) and all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 5e-3)])
def test_other_precisions(dtype, close):
    reference, x = perceptron(12, 10, 8), normal(400, 12)
    model = lowered(reference, 3)
    calibrate(model, [x], reference=reference)
    narrow = lowered(reference, 3).to(dtype)
    calibrate(narrow, [x], reference=copy.deepcopy(reference).to(dtype))
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
    test = normal(500, 12, seed=9)
    with torch.no_grad():
        apart = narrow(test.to(dtype)).double() - model(test)
        assert float(apart.norm() / model(test).norm()) < close


def test_factors_are_balanced():
    reference = convolutional(norm=False)
    model = lowered(reference, 2, unfolding="separable")
    calibrate(model, images(), reference=reference)
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            torch.testing.assert_close(layer.left.norm(dim=-2), layer.right.norm(dim=-1))


def test_a_model_that_is_one_layer():
    reference = nn.Linear(6, 5).double()
    model = low_rank_layer(reference, 2)
    assert isinstance(model, LowRankLinear)
    report = calibrate(model, [normal(50, 6)], reference=reference)
    assert str(report).splitlines()[2].startswith("(model)")
