"""Fits of low-rank layers to data: rows of convolutions, reduced-rank regression, steps for the rectifier."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retract.nets._following import Following, Normalization, following
from retract.nets.init._calibration_fit import Fit, Sample, fits
from retract.nets.init._calibration_regression import Factors, Regression
from retract.nets.init._calibration_rows import input_rows, output_rows, positions
from retract.nets.init.calibration import _fit_of
from retract.nets.layers.low_rank import low_rank_layer

UNFOLDINGS = ["output", "input", "separable"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------- rows

GEOMETRIES = {
    "linear": (nn.Linear(5, 4), (2, 3, 5)),
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 8)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=2), (2, 3, 9, 8)),
    "circular": (nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode="circular", groups=2), (2, 4, 6, 5)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 5)),
    "unbatched": (nn.Conv2d(4, 6, 3, bias=False), (4, 6, 5)),
    "3d": (nn.Conv3d(2, 4, (2, 3, 2), padding=(1, 1, 0), stride=(1, 2, 1)), (2, 2, 4, 5, 4)),
}


@pytest.mark.parametrize(
    ("geometry", "unfolding"),
    [("linear", "output"), *((name, kind) for name in GEOMETRIES if name != "linear" for kind in UNFOLDINGS)],
)
def test_a_layer_is_its_factors_on_the_rows(geometry, unfolding):
    dense, shape = GEOMETRIES[geometry]
    layer = low_rank_layer(dense.double(), 2, unfolding=unfolding)
    input = normal(*shape)
    with torch.no_grad():
        output = layer(input)
    chosen = torch.randperm(positions(layer, output.shape))[:11]
    inputs, outputs = input_rows(layer, input, output.shape, chosen), output_rows(layer, output, chosen)
    fit = _fit_of(layer)
    for values in (fit.factors(inputs), inputs @ fit.factors.product.mT):
        torch.testing.assert_close(values + fit.offset, outputs, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- regression


def moments(groups=2, out=5, taps=1, columns=4, rows=200, seed=0):
    """C and M of correlated inputs and some targets."""
    mixing = normal(groups, taps * columns, taps * columns, seed=seed)
    inputs = normal(groups, rows, taps * columns, seed=seed + 1) @ mixing
    targets = inputs @ normal(groups, taps * columns, out, seed=seed + 2) + normal(groups, rows, out, seed=seed + 3)
    return inputs.mT @ inputs / rows, targets.mT @ inputs / rows


def quadratic(product, second, cross):
    return ((product @ second) * product).sum() - 2 * (product * cross).sum()


@pytest.mark.parametrize(("out", "columns"), [(5, 4), (4, 7), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3])
def test_with_one_tap_the_regression_is_the_truncated_decomposition_in_white_inputs(out, columns, rank):
    second, cross = moments(out=out, columns=columns)
    root = torch.linalg.cholesky(second)
    u, s, vh = torch.linalg.svd(torch.linalg.solve_triangular(root, cross.mT, upper=False).mT, full_matrices=False)
    expected = torch.linalg.solve_triangular(
        root, (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :], upper=False, left=False
    )
    found = Regression(second, rank, 1).best(cross).product
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("taps", "out", "columns"), [(1, 5, 4), (3, 2, 6), (3, 4, 5), (9, 2, 4)])
def test_at_full_rank_the_regression_is_least_squares(taps, out, columns):
    second, cross = moments(taps=taps, out=out, columns=columns)
    regression = Regression(second, min(out * taps, columns), taps)
    expected = torch.linalg.solve(second, cross.mT).mT
    torch.testing.assert_close(regression.best(cross).product, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 10**6)
)
def test_with_taps_no_sweep_makes_the_regression_worse(taps, out, columns, rank, groups, seed):
    rank = min(rank, out * taps, columns)
    second, cross = moments(groups, out, taps, columns, seed=seed)
    regression = Regression(second, rank, taps)
    factors = Factors(normal(groups, out, taps * rank, seed=seed), normal(groups, rank, columns, seed=seed + 1))
    values = [float(quadratic(factors.product, second, cross))]
    for _ in range(8):
        factors = regression.improved(cross, factors)
        values.append(float(quadratic(factors.product, second, cross)))
    slack = 1e-10 * (1 + max(map(abs, values)))
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(values))
    assert float(quadratic(regression.best(cross).product, second, cross)) <= 0


def descended(function, *start):
    """The least value that L-BFGS finds from a start."""
    parameters = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in start]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = function(*parameters)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(function(*parameters).detach())


def test_with_taps_the_regression_is_near_the_best_of_many_descents():
    second, cross = moments(groups=1, out=4, taps=3, columns=6, seed=5)
    least = -float((torch.linalg.solve(second, cross.mT).mT * cross).sum())
    for rank in (1, 2):
        found = float(quadratic(Regression(second, rank, 3).best(cross).product, second, cross))
        objective = lambda left, right: quadratic(Factors(left, right).product, second, cross)  # noqa: E731
        others = [
            descended(objective, normal(1, 4, 3 * rank, seed=seed), normal(1, rank, 6, seed=seed + 50))
            for seed in range(4)
        ]
        assert found - least <= 1.1 * (min(others) - least)


# ---------------------------------------------------------------------------------------------------------- rectifiers


def problem(rows=300, inputs=8, out=6, groups=1, seed=0):
    """Post-ReLU inputs in two parts, the outputs of a dense layer for others that are near them, and its weight."""
    x = F.relu(normal(groups, rows, inputs, seed=seed) @ normal(groups, inputs, inputs, seed=seed + 1))
    weight = normal(groups, out, 1, inputs, seed=seed + 2)
    noise = 0.3 * normal(groups, rows, inputs, seed=seed + 3)
    outputs = (x + noise) @ weight[:, :, 0].mT + normal(groups, 1, out, seed=seed + 4)
    return Sample([x[:, : rows // 3], x[:, rows // 3 :]], outputs), weight


def misfit(sample, fit, after):
    gain, shift = after.affine(sample.outputs)
    wanted = after.activation(gain * sample.outputs + shift)
    got = after.activation(gain * sample.map(fit) + shift)
    return float((wanted - got).square().sum() / sample.rows)


def objective(sample, weight, fit, after, ridge):
    """The error with that of the white inputs that the ridge stands for."""
    gain, _ = after.affine(sample.outputs)
    x = torch.cat(list(sample.inputs), 1)
    variance = x.var(1, correction=0).mean(-1)[:, None, None]
    apart = gain.mT * (fit.factors.product - weight.flatten(2))
    return misfit(sample, fit, after) + float((ridge * variance * apart.square()).sum())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.0, 0.01, 0.2, 0.9]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_steps_for_the_rectifier_never_increase_the_error(inputs, out, rank, slope, normalized, seed):
    sample, weight = problem(60, inputs, out, seed=seed)
    norm = Normalization(normal(out, seed=seed), normal(out, seed=seed + 1), None, None, 1e-5) if normalized else None
    after = Following(slope, norm)
    rank = min(rank, inputs, out)
    found = list(fits(sample, weight, rank=rank, following=after, offset=None, ridge=0.01, iterations=30))
    errors = [objective(sample, weight, fit, after, 0.01) for fit in found]
    assert all(later <= earlier * (1 + 1e-10) for earlier, later in itertools.pairwise(errors))
    assert all(torch.linalg.matrix_rank(fit.factors.product, rtol=1e-9).max() <= rank for fit in found)


def test_without_a_rectifier_there_is_regression_alone():
    sample, weight = problem()
    found = list(fits(sample, weight, rank=2, following=Following(), offset=None, ridge=1e-9, iterations=30))
    assert len(found) == 1
    x = torch.cat(list(sample.inputs), 1)[0]
    x, y = x - x.mean(0), sample.outputs[0] - sample.outputs[0].mean(0)
    full = torch.linalg.lstsq(x, y).solution
    _, _, vh = torch.linalg.svd(x @ full, full_matrices=False)
    torch.testing.assert_close(found[0].factors.product[0].T, full @ vh[:2].T @ vh[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sample.map(found[0]).mean(1), sample.outputs.mean(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [None, 0.3])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_steps_end_where_descent_does(slope, offset):
    """A point from which L-BFGS on factors and offset gains little; with a given offset that offset stays."""
    sample, weight = problem(400, 6, 5, seed=3)
    after = Following(slope)
    fixed = None if offset is None else torch.full((1, 1, 5), offset, dtype=torch.float64)
    found = list(fits(sample, weight, rank=2, following=after, offset=fixed, ridge=1e-9, iterations=400))
    first, last = (misfit(sample, fit, after) for fit in (found[0], found[-1]))

    def error(left, right, *free):
        values = sample.map(Fit(Factors(left, right), *free or (fixed,)))
        return (after.activation(sample.outputs) - after.activation(values)).square().sum() / sample.rows

    free = [found[-1].offset] if offset is None else []
    assert offset is None or torch.equal(found[-1].offset, fixed)
    least = descended(error, *found[-1].factors, *free)
    assert first - last > 0 and last - least <= 0.03 * (first - least)


def test_groups_are_fitted_apart():
    one, other = problem(seed=0), problem(seed=9)
    both = Sample(
        [torch.cat(parts) for parts in zip(one[0].inputs, other[0].inputs, strict=True)],
        torch.cat([one[0].outputs, other[0].outputs]),
    )
    options = {"rank": 3, "following": Following(0.0), "offset": None, "ridge": 0.01, "iterations": 1}
    together = list(fits(both, torch.cat([one[1], other[1]]), **options))[-1]
    for index, (sample, weight) in enumerate((one, other)):
        alone = list(fits(sample, weight, **options))[-1]
        torch.testing.assert_close(together.factors.product[index], alone.factors.product[0])


def test_directions_that_the_data_does_not_show_are_the_dense_layers():
    """Inputs without variance: the nearest matrix, so that nothing is lost but what the rank cannot hold."""
    weight = normal(1, 6, 1, 8)
    sample = Sample([torch.ones(1, 20, 8)], torch.ones(1, 20, 1) * normal(1, 1, 6))
    (found,) = fits(sample, weight, rank=3, following=Following(), offset=None, ridge=0.01, iterations=1)
    u, s, vh = torch.linalg.svd(weight[0, :, 0], full_matrices=False)
    torch.testing.assert_close(found.factors.product[0], u[:, :3] * s[:3] @ vh[:3])
    torch.testing.assert_close(sample.map(found), sample.outputs)


# ------------------------------------------------------------------------------------------------------ what follows


class Calls(nn.Module):
    """A layer, and a function of its output and of the module."""

    def __init__(self, tail, *parts):
        super().__init__()
        self.layer, self.parts, self.tail = nn.Conv2d(2, 3, 1), nn.ModuleList(parts), tail

    def forward(self, x):
        return self.tail(self.layer(x), *self.parts)


def plain(x, *parts):
    for part in parts:
        x = part(x)
    return x


class Twice(nn.Module):
    def forward(self, x):
        return F.relu(x) + x


def cases():
    norm = nn.BatchNorm2d
    yield "nothing", Calls(plain), ""
    yield "module", Calls(plain, nn.ReLU()), "ReLU"
    yield "in place", Calls(plain, nn.ReLU(inplace=True), nn.Tanh()), "ReLU"
    yield "function", Calls(lambda x: F.relu(x)), "ReLU"
    yield "method", Calls(lambda x: x.relu_() + 1), "ReLU"
    yield "torch", Calls(lambda x: torch.relu(x)), "ReLU"
    yield "leaky", Calls(plain, nn.LeakyReLU(0.2)), "leaky ReLU 0.2"
    yield "leaky in place", Calls(plain, nn.LeakyReLU(0.2, inplace=True)), "leaky ReLU 0.2"
    yield "leaky function", Calls(lambda x: F.leaky_relu(x)), "leaky ReLU 0.01"
    yield "leaky keyword", Calls(lambda x: F.leaky_relu(input=x, negative_slope=0.3)), "leaky ReLU 0.3"
    yield "norm", Calls(plain, norm(3)), "BatchNorm"
    yield "norm and ReLU", Calls(plain, norm(3), nn.ReLU(inplace=True)), "BatchNorm, ReLU"
    yield "norm, leaky", Calls(lambda x, n: F.leaky_relu(n(x), 0.1), norm(3)), "BatchNorm, leaky ReLU 0.1"
    yield "norm read twice", Calls(plain, norm(3), Twice()), "BatchNorm"
    yield "own statistics", Calls(plain, norm(3, track_running_stats=False), nn.ReLU()), "BatchNorm, ReLU"
    yield "no parameters", Calls(plain, norm(3, affine=False), nn.ReLU()), "BatchNorm, ReLU"
    yield "dropout", Calls(plain, nn.Dropout(), nn.Identity(), nn.ReLU()), "ReLU"
    yield "shape", Calls(lambda x: F.relu(x) * x.shape[0] * x.size(1)), "ReLU"
    yield "residual", Calls(lambda x: F.relu(x + 1)), ""
    yield "twice", Calls(plain, Twice()), ""
    yield "GELU", Calls(plain, nn.GELU()), ""
    yield "group norm", Calls(plain, nn.GroupNorm(1, 3), nn.ReLU()), ""
    yield "pooled", Calls(lambda x: F.relu(F.max_pool2d(x, 2))), ""


@pytest.mark.parametrize(("model", "expected"), [pytest.param(m, e, id=name) for name, m, e in cases()])
def test_what_follows_is_found(model, expected):
    model.eval()
    with torch.no_grad():
        found = following({"layer": model.layer}, lambda: model(torch.randn(4, 2, 6, 6)))
    assert str(found["layer"]) == expected
    assert not model.layer._forward_hooks


def test_a_normalization_is_its_module():
    """With the network's statistics as gain and offset, and with those of the outputs."""
    norm = nn.BatchNorm1d(6).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(normal(6, seed=tensor.numel()))
        norm.running_var.copy_(normal(6).exp())
    model = nn.Sequential(nn.Linear(4, 6).double(), norm, nn.ReLU()).eval()
    x = normal(50, 4)
    with torch.no_grad():
        after = following({"0": model[0]}, lambda: model(x))["0"]
        outputs = model[0](x).reshape(50, 2, 3).movedim(1, 0)
        gain, shift = after.affine(outputs)
        grouped = lambda y: y.reshape(50, 2, 3).movedim(1, 0)  # noqa: E731
        torch.testing.assert_close(after.activation(gain * outputs + shift), grouped(model(x)))
        torch.testing.assert_close(after(outputs), grouped(model.train()(x)))


def test_a_channel_that_normalization_removes_keeps_a_little_weight():
    norm = Normalization(torch.tensor([2.0, 0.0, -0.0, -1e-9]), torch.zeros(4), torch.zeros(4), torch.ones(4), 0.0)
    gain, _ = Following(0.0, norm).affine(normal(1, 5, 4))
    torch.testing.assert_close(gain.flatten(), torch.tensor([2.0, 2e-3, 2e-3, -2e-3]).double())
