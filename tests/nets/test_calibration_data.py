"""Data for a calibration: batches of any kind, those it refuses, few rows, silent layers, other precisions."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from retract.nets.init.calibration import calibrate
from retract.nets.layers.low_rank import LowRankLayer, LowRankLinear, low_rank_layer
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
