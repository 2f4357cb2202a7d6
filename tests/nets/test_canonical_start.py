"""Where canonical weights start: their gain, the terms of given weights, and what is refused."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from retract.manifolds.canonical import cp_tensor, degeneracy
from retract.nets.parametrizations import canonical_weight_norm, put_terms
from tests.nets.canonical_cases import LAYERS, made, parts, terms

every_layer = pytest.mark.parametrize("layer", list(LAYERS))
every_form = pytest.mark.parametrize("form", ["euclidean", "oblique"])
quiet = pytest.mark.filterwarnings("ignore:rank=.*told apart")


# ------------------------------------------------------------------------------------------------------------- the gain


@quiet
@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_variance_of_random_weights(draw):
    """sigma^2 R / prod(d), whatever the draw, and with sigma = sqrt(2 out / R) a ReLU layer keeps the mean square."""
    torch.manual_seed(0)
    out, channels, taps, rank = 64, 32, 9, 270
    dense = nn.Conv2d(channels, out, 3, padding=1, padding_mode="circular", bias=False)
    module = canonical_weight_norm(dense, rank, init=draw)
    canonical, (scale, *factors) = parts(module)
    assert (scale - 1).abs().max() < 1e-6
    assert canonical.sigma.item() == pytest.approx(math.sqrt(2 * out / rank))
    assert all((rows.norm(dim=1) - 1).abs().max() < 1e-6 for rows in factors)
    with torch.no_grad():
        ratio = module.weight.var() * out * channels * taps / (rank * canonical.sigma**2)
        x = torch.randn(16, channels, 12, 12)
        gain = module(x).relu().square().mean() / x.square().mean()
    assert 0.95 < ratio < 1.05
    assert 0.9 < gain < 1.1


STACKS = {
    "linear": lambda: nn.Linear(64, 64, bias=False),
    "conv": lambda: nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular", bias=False),
    "low rank": lambda: nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular", bias=False),
}
NONLINEARITIES = {
    "relu": (nn.ReLU, 0.0),
    "leaky_relu": (lambda: nn.LeakyReLU(0.2), 0.2),
    "linear": (nn.Identity, 0.0),
    "tanh": (nn.Tanh, 0.0),
}


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("nonlinearity", list(NONLINEARITIES))
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("stack", list(STACKS))
def test_gain_in_depth(stack, mode, nonlinearity, draw):
    """Each of twelve layers multiplies the mean square of its input, or of its gradient, by gain^2 on average."""
    torch.manual_seed(0)
    activation, slope = NONLINEARITIES[nonlinearity]
    gain = nn.init.calculate_gain(nonlinearity, slope)
    rank = {"linear": 60, "conv": 100, "low rank": 10}[stack]
    shape = (8, 64) if stack == "linear" else (2, 24, 6, 6)
    ratios = []
    for _ in range(6):
        layers = [
            canonical_weight_norm(STACKS[stack](), rank, init=draw, mode=mode, nonlinearity=nonlinearity, a=slope)
            for _ in range(12)
        ]
        inputs, outputs, x = [], [], torch.randn(shape)
        for layer in layers:
            inputs.append(x.detach().requires_grad_() if not inputs else x)
            outputs.append(layer(inputs[-1]))
            x = activation()(outputs[-1])
        if mode == "fan_in":
            pairs = zip(outputs, inputs, strict=True)
        else:
            grads = torch.autograd.grad((x * torch.randn_like(x)).sum(), inputs + outputs)
            pairs = zip(grads[:12], grads[12:], strict=True)
        ratios += [(after.square().mean() / before.square().mean()).item() / gain**2 for after, before in pairs]
    mean = sum(ratios) / len(ratios)
    assert 0.9 < mean < 1.1
    if stack != "low rank" and nonlinearity == "relu":
        product = math.exp(sum(math.log(ratio * gain**2 / 2) for ratio in ratios) / 6)
        assert 0.1 < product < 10, "of twelve layers together"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_strides(mode, transposed):
    """A strided convolution sends back, and a transposed one sends on, one of four taps at a time."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        module = canonical_weight_norm(kind(24, 40, 4, stride=2, bias=False), 160, mode=mode)
        x = torch.randn(2, 24, 30, 30, requires_grad=True)
        y = module(x)
        probe = torch.randn_like(y)
        (back,) = torch.autograd.grad(y, x, probe)
        inside = (..., slice(6, -6), slice(6, -6))
        ratios.append(y[inside].square().mean() / 2 if mode == "fan_in" else back[inside].square().mean() / 2)
    assert 0.93 < sum(ratios) / len(ratios) < 1.07


def test_the_mean_of_the_fans():
    sigma = {
        mode: parts(canonical_weight_norm(nn.Linear(60, 20), 10, mode=mode))[0].sigma.item()
        for mode in ("fan_in", "fan_out", "fan_avg")
    }
    assert sigma["fan_in"] == pytest.approx(math.sqrt(2 * 20 / 10))
    assert sigma["fan_out"] == pytest.approx(math.sqrt(2 * 60 / 10))
    assert sigma["fan_avg"] ** -2 == pytest.approx((sigma["fan_in"] ** -2 + sigma["fan_out"] ** -2) / 2)


def test_a_generator_decides_the_draw():
    def weight(seed):
        generator = torch.Generator().manual_seed(seed)
        return canonical_weight_norm(nn.Linear(5, 4), 3, generator=generator).weight

    state = torch.get_rng_state()
    nn.Linear(5, 4)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    first = weight(0)
    assert torch.equal(torch.get_rng_state(), drawn), "the global generator served torch's own initialization alone"
    assert torch.equal(first, weight(0)) and not torch.equal(first, weight(1))


# ---------------------------------------------------------------------------------------------- assigning and replacing


@quiet
@every_form
@every_layer
def test_assigning_a_weight_fits_it(layer, form):
    module = LAYERS[layer](dtype=torch.float64)
    whole = math.prod(module.weight.shape) // max(module.weight.shape)
    canonical_weight_norm(module, whole, form=form)
    sigma = parts(module)[0].sigma.clone()
    target = torch.randn_like(module.weight)
    optimizer_sees = parts(module)[1]
    module.weight = target
    torch.testing.assert_close(module.weight.detach(), target, rtol=0, atol=1e-10)  # as many terms as any tensor needs
    assert all(a is b for a, b in zip(parts(module)[1], optimizer_sees, strict=True))
    assert parts(module)[0].sigma == sigma
    module.weight = torch.zeros_like(target)
    assert module.weight.abs().max() == 0


@pytest.mark.parametrize("init", ["power", "als"])
def test_starting_from_the_present_weight(init):
    torch.manual_seed(0)
    module = nn.Conv2d(3, 8, 3, dtype=torch.float64)
    before = module.weight.detach().clone()
    canonical_weight_norm(module, 15, init=init)
    _, (scale, *_) = parts(module)
    assert (module.weight - before).norm() < (0.3 if init == "power" else 0.2) * before.norm()
    assert scale.square().mean().sqrt().item() == pytest.approx(1, rel=1e-6)
    assert degeneracy(*terms(module)) < 50


@pytest.mark.parametrize("init", ["power", "als"])
def test_a_zero_weight_can_be_started_from(init):
    module = nn.Linear(4, 3)
    nn.init.zeros_(module.weight)
    canonical_weight_norm(module, 2, init=init)
    assert module.weight.abs().max() == 0
    assert parts(module)[0].sigma == 1
    module.weight.sum().backward()
    assert parts(module)[1][0].grad.abs().max() > 0


@every_form
def test_other_terms_for_a_canonical_layer(form):
    module = made("conv2d", 8, form=form, execution="factored")
    module.bias.requires_grad_(False)
    canonical, (scale, *_) = parts(module)
    weights, factors = canonical.terms(*parts(module)[1])
    kept = torch.tensor([6, 1, 3])
    smaller = copy.deepcopy(module)
    assert put_terms(smaller, weights[kept], [rows[kept] for rows in factors]) is smaller
    new, originals = parts(smaller)
    assert (new.rank, new.form, new.execution) == (3, form, "factored")
    assert new.sigma == canonical.sigma
    torch.testing.assert_close(originals[0], scale[kept])
    torch.testing.assert_close(smaller.weight, cp_tensor(weights[kept], [rows[kept] for rows in factors]))
    assert all(p.requires_grad for p in originals) and not smaller.bias.requires_grad
    assert type(smaller).__bases__ == type(module).__bases__
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), torch.conv2d(x, smaller.weight, smaller.bias))
    torch.testing.assert_close(module(x), torch.conv2d(x, module.weight, module.bias))


def test_given_terms_for_a_plain_layer():
    module = nn.Linear(5, 4, dtype=torch.float64)
    weights, factors = torch.tensor([3.0, -1.0]).double(), [torch.randn(2, d, dtype=torch.float64) for d in (4, 5)]
    put_terms(module, weights, factors, form="oblique")
    torch.testing.assert_close(module.weight.detach(), cp_tensor(weights, factors))
    assert parts(module)[1][0].square().mean().item() == pytest.approx(1)
    assert parts(module)[1][0][1] < 0


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be 1 or more, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an int, got True"),
        ({"form": "stiefel"}, ValueError, "form must be 'euclidean' or 'oblique', got 'stiefel'"),
        ({"init": "fit"}, ValueError, "init must be 'normal', 'uniform', 'power' or 'als', got 'fit'"),
        ({"mode": "both"}, ValueError, "mode must be 'fan_in', 'fan_out' or 'fan_avg', got 'both'"),
        ({"nonlinearity": "swoosh"}, ValueError, "swoosh"),
        ({"execution": "fast"}, ValueError, "execution must be 'auto', 'factored' or 'weight', got 'fast'"),
        ({"module": nn.Conv2d(4, 4, 3, groups=2)}, ValueError, "groups=2"),
        ({"module": nn.Embedding(4, 4)}, TypeError, "linear layer or a convolution, got Embedding"),
        ({"module": nn.LSTM(2, 2)}, TypeError, "got LSTM"),
        ({"module": nn.LazyLinear(3)}, ValueError, "no shape yet"),
        ({"name": "nothing"}, TypeError, "no parameter 'nothing'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"module": nn.Conv2d(4, 4, 3), "rank": 2} | change
    before = set(arguments["module"].state_dict()), type(arguments["module"])
    with pytest.raises(error, match=message):
        canonical_weight_norm(**arguments)
    assert (set(arguments["module"].state_dict()), type(arguments["module"])) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("init", ["power", "als"])
def test_weights_that_are_not_finite(init, bad):
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        canonical_weight_norm(module, 2, init=init)
    assert type(module) is nn.Linear and not parametrize.is_parametrized(module)
    canonical_weight_norm(module, 2)  # random: the present weight does not matter
    assert module.weight.isfinite().all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        module.weight = torch.full((3, 4), bad)
    with pytest.raises(ValueError, match=r"shape \(3, 4\), got \(4, 3\)"):
        module.weight = torch.zeros(4, 3)


def test_terms_that_are_none():
    module = made("linear", 2)
    rows = [torch.randn(2, 5), torch.randn(2, 7)]
    rows[1][1] = 0
    with pytest.raises(ValueError, match=r"factors\[1\] has rows that are zero or not finite"):
        put_terms(module, torch.ones(2), rows)
    with pytest.raises(ValueError, match="NaN or infinite"):
        put_terms(module, torch.tensor([1, torch.nan]), [torch.randn(2, 5), torch.randn(2, 7)])
    with pytest.raises(ValueError, match=r"with d = \(5, 7\) in this order"):
        put_terms(module, torch.ones(2), [torch.randn(2, 7), torch.randn(2, 5)])
    with pytest.raises(ValueError, match="weights must have shape"):
        put_terms(module, torch.ones(3), [torch.randn(2, 5), torch.randn(2, 7)])
    assert parts(module)[0].rank == 2


def test_more_terms_than_can_be_told_apart():
    layers = {nn.Conv2d(4, 6, 3): 16, nn.Linear(6, 4): 4, nn.Conv2d(1, 6, (1, 3)): 3, nn.Linear(1, 5): 1}
    for module, most in layers.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            canonical_weight_norm(copy.deepcopy(module), most)
        with pytest.warns(UserWarning, match=f"rank={most + 1} .*told apart"):
            canonical_weight_norm(module, most + 1)
        assert parts(module)[0].rank == most + 1
