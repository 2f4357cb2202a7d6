"""Lipschitz bounds of whole discriminators: closed forms, other ways to compute norms, and gradients below them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from retract.nets.compress import decompress, factorize
from retract.nets.gan.constraints import CONSTRAINTS, constrain
from retract.nets.gan.lipschitz import lipschitz_bound
from retract.nets.gan.networks import GANS, gan_pair


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Function(nn.Module):
    """A function of the image, with a module at hand that it may use."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.modules_used = function, nn.ModuleList(modules or [nn.Linear(1, 1)])

    def forward(self, x):
        return self.function(x, *self.modules_used)


def bound(function, *modules, shape=(2, 6, 6)):
    return lipschitz_bound(Function(function, *modules), shape)


def scaled(layer, factor):
    """A 1x1 convolution or linear layer that multiplies by a number."""
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(*layer.weight.shape[:2]).reshape(layer.weight.shape))
    return layer


def times(factor, channels=2):
    return scaled(nn.Conv2d(channels, channels, 1), factor)


def map_norm(model, shape):
    """Norm of an affine map of images, by its matrix."""
    inputs = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        matrix = (model(inputs) - model(torch.zeros_like(inputs))).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


# ------------------------------------------------------------------------------------------- how operations compose


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, a, b: b(a(x)), 6),
        (lambda x, a, b: x + a(x), 3),
        (lambda x, a, b: a(x) + b(x), 5),
        (lambda x, a, b: a(x) - b(F.relu(x)), 5),
        (lambda x, a, b: torch.add(x, b(a(x))), 7),
        (lambda x, a, b: x + x, 2),
        (lambda x, a, b: a(x) + 3, 2),
        (lambda x, a, b: a(x) + b.bias[0], 2),
        (lambda x, a, b: b(x + F.leaky_relu(a(x), 0.2)), 9),
        (lambda x, a, b: F.leaky_relu(x, 1.5), 1.5),
        (lambda x, a, b: F.leaky_relu(x, negative_slope=-2), 2),
        (lambda x, a, b: F.relu(x).tanh().reshape(x.shape[0], -1).sum(1), math.sqrt(72)),
        (lambda x, a, b: x.sum((2, 3)), 6),
        (lambda x, a, b: a(x).mean((2, 3)), 2 / 6),
        (lambda x, a, b: F.avg_pool2d(x, 2), 1 / 2),
        (lambda x, a, b: F.avg_pool2d(x, kernel_size=(2, 3)), 1 / math.sqrt(6)),
        (lambda x, a, b: F.avg_pool2d(x, 3, stride=1), 1),
        (lambda x, a, b: F.avg_pool2d(x, 4, 2), 1 / 2),
        (lambda x, a, b: F.max_pool2d(x, 2), 1),
        (lambda x, a, b: F.max_pool2d(x, 3, 2, 1), 2),
        (lambda x, a, b: F.adaptive_avg_pool2d(x, 2), 1 / 3),
        (lambda x, a, b: x.flatten(1).unsqueeze(2).squeeze(2).contiguous(), 1),
        (lambda x, a, b: a(x).view(x.size(0), -1), 2),
    ],
)
def test_closed_forms(function, expected):
    assert bound(function, times(2), times(-3)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.AvgPool2d(2), 1 / 2),
        (nn.MaxPool2d(3, 1), 3),
        (nn.AdaptiveAvgPool2d(1), 1 / 6),
        (nn.LeakyReLU(0.2), 1),
        (nn.Dropout(0.9), 1),
        (nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Tanh(), nn.Flatten()), 1),
    ],
)
def test_modules(module, expected):
    assert bound(lambda x, m: m(x), module) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(4, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    padding=st.integers(0, 2),
    ceil_mode=st.booleans(),
)
def test_average_pooling_is_bounded(size, kernel, stride, padding, ceil_mode):
    pool = nn.AvgPool2d(kernel, stride, min(padding, kernel // 2), ceil_mode, count_include_pad=False)
    model = Function(lambda x, m, _: m(x), pool, nn.Linear(1, 1)).double()
    assert map_norm(model, (1, size, size)) <= lipschitz_bound(model, (1, size, size)) * (1 + 1e-12)


# --------------------------------------------------------------------------------------------- layers with a weight


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(5, 8),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "circular"]),
    seed=st.integers(0, 1000),
)
@example(size=5, kernel=2, stride=1, dilation=1, groups=1, transposed=False, padding_mode="circular", seed=0)
def test_convolutions_are_bounded_and_not_by_much_too_much(
    size, kernel, stride, dilation, groups, transposed, padding_mode, seed
):
    torch.manual_seed(seed)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": kernel // 2, "dtype": torch.float64}
    if transposed:
        layer = nn.ConvTranspose2d(4, 6, kernel, **options)
    elif (kernel - 1) * dilation + 1 > size:
        return
    else:
        layer = nn.Conv2d(4, 6, kernel, padding_mode=padding_mode, **options)
    exact, found = map_norm(layer, (4, size, size)), lipschitz_bound(layer, (4, size, size))
    assert exact <= found * (1 + 1e-9)
    if layer.padding_mode == "circular" and kernel % 2 == 0:
        return  # outputs that go around, and one of them twice
    if stride == 1 or (dilation == 1 and layer.padding_mode == "zeros"):
        assert found <= 2 * exact


def test_strided_convolutions_are_bounded_by_their_phases():
    layer = nn.Conv2d(8, 8, 4, stride=2, padding=1).double()
    exact, found = map_norm(layer, (8, 16, 16)), lipschitz_bound(layer, (8, 16, 16))
    assert exact <= found <= 1.25 * exact


def test_linear_layers_have_their_norm():
    layer = nn.Linear(7, 5).double()
    expected = float(torch.linalg.svdvals(layer.weight.detach())[0])
    assert lipschitz_bound(layer, (7,)) == pytest.approx(expected, rel=1e-12)


CONVOLUTION, TRANSPOSED = (lambda: nn.Conv2d(6, 8, 3, 2, 1)), (lambda: nn.ConvTranspose2d(6, 8, 4, 2, 1))


@pytest.mark.parametrize(
    ("build", "shape", "kind", "options"),
    [
        (CONVOLUTION, (6, 5, 5), "svdp", {}),
        (CONVOLUTION, (6, 5, 5), "svdp", {"form": "stiefel"}),
        (CONVOLUTION, (6, 5, 5), "sttp", {}),
        (CONVOLUTION, (6, 5, 5), "cp", {}),
        (CONVOLUTION, (6, 5, 5), "lowrank", {}),
        (TRANSPOSED, (6, 5, 5), "svdp", {}),
        (TRANSPOSED, (6, 5, 5), "sttp", {"form": "stiefel"}),
        (lambda: nn.Linear(5, 8), (5,), "svdp", {}),
        (lambda: nn.Linear(5, 8), (5,), "lowrank", {}),
    ],
)
def test_factored_layers_as_their_dense_ones(build, shape, kind, options):
    model = factorize(nn.Sequential(build()).double(), kind, rank=3, **options)
    found, dense = lipschitz_bound(model, shape), lipschitz_bound(decompress(model), shape)
    assert 0.9 * dense <= found <= dense * (1 + 1e-9)  # the smaller kernel has the sharper bound


# ------------------------------------------------------------------------------------------------- discriminators


@pytest.mark.parametrize("pair", GANS)
@pytest.mark.parametrize("name", ["none", "sn", "sr", "svdp-c", "sttp-l", "lipschitz-operator"])
def test_gradients_of_discriminators_are_below(name, pair):
    _, model = gan_pair(pair, width=16)
    constrain(model, name, **({"rank": 4} if CONSTRAINTS[name].factored else {}))
    shape = GANS[pair].image_shape
    found = lipschitz_bound(model, shape)
    images = torch.randn(4, *shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.eval()(images).sum(), images)
    norms = gradient.flatten(1).norm(dim=1)
    assert 0 < float(norms.amax()) <= found < math.inf


def test_sngan_under_the_operator_constraint_in_closed_form():
    # Each block is a residual sum of two branches of norm 1, pooled by 2x2 (1/2) in the first two; a sum over 8x8
    # positions; a linear layer of norm 1.
    model = constrain(gan_pair("sngan32", width=8)[1], "lipschitz-operator")
    assert lipschitz_bound(model, (3, 32, 32)) == pytest.approx(1 * 1 * 2 * 2 * 8, rel=1e-5)
    # Four blocks that halve maps to 3x3, and one that does not.
    model = constrain(gan_pair("sngan48", width=16)[1], "lipschitz-operator")
    assert lipschitz_bound(model, (3, 48, 48)) == pytest.approx(2 * 3, rel=1e-5)


def test_scale_of_a_weight_scales_the_bound():
    _, model = gan_pair("digits", width=4)
    before = lipschitz_bound(model, (1, 8, 8))
    with torch.no_grad():
        model.linear.weight.mul_(3)
    assert lipschitz_bound(model, (1, 8, 8)) == pytest.approx(3 * before)


def test_looking_changes_nothing():
    model = constrain(gan_pair("digits", width=4)[1], "sn")
    with torch.no_grad():
        model.linear.parametrizations.weight.original.normal_()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert lipschitz_bound(model, (1, 8, 8)) == lipschitz_bound(model, (1, 8, 8))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    for name in ("none", "svdp-l"):
        model = constrain(gan_pair("digits", width=4)[1], name)
        with torch.no_grad():
            next(model.linear.parameters()).view(-1)[0] = value
            for p in model.parameters():
                p.view(-1)[0] = value
        assert math.isnan(lipschitz_bound(model, (1, 8, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    _, model = gan_pair("digits", width=4)
    expected = lipschitz_bound(model, (1, 8, 8))
    assert lipschitz_bound(model.to(dtype), (1, 8, 8)) == pytest.approx(expected, rel=0.05)


class UsersOwn(nn.Conv2d):
    def forward(self, x):
        return 5 * super().forward(x)


@pytest.mark.parametrize(
    ("function", "module", "message"),
    [
        (lambda x, m: m(x), nn.BatchNorm2d(2), "has the operation BatchNorm2d, of unknown Lipschitz constant; known: "),
        (lambda x, m: m(x), UsersOwn(2, 2, 1), "has the operation conv2d"),
        (lambda x, m: x * x, None, "has the operation mul"),
        (lambda x, m: m(x.chunk(2, 1)[0]), nn.Conv2d(1, 2, 1), "has the operation chunk"),
        (lambda x, m: torch.add(x, x, alpha=9), None, "has the operation add"),
        (lambda x, m: F.max_pool2d(x, 2, dilation=2), None, "pooling with dilation or divisor_override"),
        (lambda x, m: torch.max_pool2d(x, 2, 2, 0, 2), None, "pooling with dilation or divisor_override"),
        (lambda x, m: F.avg_pool2d(x, 2, 2, 0, False, True, 1), None, "pooling with dilation or divisor_override"),
        (lambda x, m: F.adaptive_avg_pool2d(x, 4), None, r"pools maps of \(6, 6\) to \(4, 4\)"),
        (lambda x, m: m(x), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (lambda x, m: x if x.mean() > 0 else -x, None, "cannot be traced by torch.fx"),
    ],
)
def test_what_is_not_known_is_an_error(function, module, message):
    with pytest.raises(ValueError, match=f"discriminator .*{message}"):
        bound(function, module or nn.Linear(1, 1))
