import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retract.nets.init.tensor import tensor_kaiming_, tensor_xavier_
from retract.nets.init.variance import core_variances, stages, tensor_fans
from retract.nets.layers.tensor import TensorConv1d, TensorConv2d, TensorLinear
from retract.nets.layers.tensor_network import TensorNetwork
from tests.nets.tensor_cases import FORMATS, OTHERS, Cores, arithmetic, circular, formats, geometric, ratios

NETWORKS = FORMATS | OTHERS
DISTRIBUTIONS = ("orthogonal", "normal", "uniform")
STEADY = [name for name in FORMATS if name not in ("tucker", "hierarchical_tucker", "odd")]
names = pytest.mark.parametrize("name", FORMATS)


def deep_ratios(make, depth=16, repeats=1, activation=F.relu):
    """Ratios of every layer but the first, of some networks of equal layers."""
    forward, backward = [], []
    for _ in range(repeats):
        there, back = ratios([make() for _ in range(depth)], activation=activation)
        forward += there
        backward += back
    return forward, backward


def single_ratios(make, repeats, size=8):
    """Mean ratios of one linear layer over draws, and their standard errors."""
    found = [ratios([make()], size=size, batch=2) for _ in range(repeats)]
    return [arithmetic([pair[direction][0] for pair in found]) for direction in (0, 1)]


def from_torch(network, init):
    """A layer whose cores were each given to an initialization of torch, as one does who knows no better."""
    layer = circular(network)
    for core in layer.cores:
        init(core)
    return layer


# ---------------------------------------------------------------------------------------------------------- depth


@names
def test_sixteen_relu_layers_keep_signals_and_gradients(name):
    torch.manual_seed(0)
    forward, backward = deep_ratios(lambda: circular(FORMATS[name]), repeats=3)
    for values in (forward, backward):
        assert 0.85 < arithmetic(values) < 1.2
        assert 0.8 < geometric(values) < 1.05


@pytest.mark.slow
@names
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("split", ["equal_norm", "equal_variance", "staged"])
def test_sixteen_relu_layers_however_their_cores_are_drawn(name, distribution, split):
    """Independent entries spread too much in formats with small cores for the geometric mean, and the window."""
    torch.manual_seed(1)
    options = {"distribution": distribution, "split": split}
    forward, backward = deep_ratios(lambda: tensor_kaiming_(circular(FORMATS[name]), **options), repeats=8)
    steady = name in STEADY or distribution == "orthogonal"
    for values in (forward, backward):
        assert (0.85 if steady else 0.6) < arithmetic(values) < (1.2 if steady else 1.6)
        assert (0.8 if steady else 0.4) < geometric(values) < 1.05


@pytest.mark.parametrize("name", ["cp", "tucker2", "tensor_train"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_sixteen_relu_layers_of_independent_entries(name, distribution):
    torch.manual_seed(2)
    forward, backward = deep_ratios(
        lambda: tensor_kaiming_(circular(FORMATS[name]), distribution=distribution), repeats=3
    )
    for values in (forward, backward):
        assert 0.85 < arithmetic(values) < 1.2
        assert 0.8 < geometric(values) < 1.05


@names
def test_fan_out_keeps_the_gradients_of_layers_of_two_widths(name):
    """64 -> 16 -> 64: each fan keeps its own direction; the other's ratios go from 1/4 to 4 and back."""
    torch.manual_seed(3)
    narrow, wide = formats(64, 16)[name], formats(16, 64)[name]
    for mode, direction in (("fan_in", 0), ("fan_out", 1)):
        layers = [tensor_kaiming_(circular(network), mode=mode) for network in (narrow, wide) * 4]
        found = ratios(layers)
        assert 0.75 < arithmetic(found[direction]) < 1.25
        assert arithmetic(found[1 - direction]) > 1.25


@names
def test_xavier_keeps_both_in_linear_networks(name):
    torch.manual_seed(4)
    forward, backward = deep_ratios(
        lambda: tensor_xavier_(circular(FORMATS[name])), repeats=2, activation=lambda signal: signal
    )
    for values in (forward, backward):
        assert 0.9 < arithmetic(values) < 1.1
        assert 0.85 < geometric(values) < 1.1


@pytest.mark.parametrize(
    ("name", "kaiming", "xavier", "default"),
    [("cp", 0.0417, 0.0068, 3.2e-5), ("tucker2", 16, 0.32, 0.074), ("tensor_train", 8, 0.0196, 0.0062)],
)
def test_each_core_by_itself_does_not(name, kaiming, xavier, default):
    """What torch's initializations give per layer, core by core: predicted, and measured over 16 layers."""

    def convolution(core):
        nn.init.kaiming_uniform_(core, a=5**0.5)

    torch.manual_seed(5)
    for init, expected in (
        (nn.init.kaiming_normal_, kaiming),
        (nn.init.xavier_normal_, xavier),
        (convolution, default),
    ):
        forward, backward = deep_ratios(lambda init=init: from_torch(FORMATS[name], init), depth=10, repeats=3)
        assert arithmetic(forward) == pytest.approx(expected, rel=0.3)
        assert arithmetic(backward) == pytest.approx(expected, rel=0.3)


# ------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize(
    ("name", "distribution"), [("cp", "normal"), ("tucker2", "uniform"), ("tensor_train", "orthogonal")]
)
def test_a_widening_layer_in_all_modes(name, distribution):
    torch.manual_seed(6)
    network = formats(32, 128)[name]

    def measured(mode):
        return single_ratios(
            lambda: tensor_xavier_(circular(network), mode=mode, distribution=distribution), 60, size=6
        )

    forward, backward = measured("fan_in")
    assert forward == pytest.approx(1, abs=0.08) and backward == pytest.approx(4, abs=0.3)
    forward, backward = measured("fan_out")
    assert forward == pytest.approx(0.25, rel=0.1) and backward == pytest.approx(1, abs=0.08)
    forward, backward = measured("fan_avg")
    assert forward == pytest.approx(0.4, rel=0.1) and backward == pytest.approx(1.6, rel=0.1)


@pytest.mark.parametrize("name", ["cp", "tensor_train"])
def test_stride_is_counted_backward(name):
    torch.manual_seed(7)
    network = FORMATS[name]
    forward, backward = single_ratios(lambda: tensor_xavier_(circular(network, stride=2), mode="fan_in"), 20)
    assert forward == pytest.approx(1, abs=0.08) and backward == pytest.approx(0.25, abs=0.02)
    _, backward = single_ratios(lambda: tensor_xavier_(circular(network, stride=2), mode="fan_out"), 20)
    assert backward == pytest.approx(1, abs=0.08)


def test_groups_are_counted():
    torch.manual_seed(8)
    network = TensorNetwork(
        ["gor", "irhw"], {"g": 4, "o": 16, "i": 8, "r": 12, "h": 3, "w": 3}, inputs="i", outputs="go", kernel="hw"
    )
    for mode in ("fan_in", "fan_out"):
        layers = [tensor_xavier_(circular(network, groups=4), mode=mode) for _ in range(20)]
        found = [ratios([layer])[mode == "fan_out"][0] for layer in layers]
        assert arithmetic(found) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("size", [8, 16])
def test_zero_padding_costs_what_is_predicted_and_can_be_corrected(size):
    torch.manual_seed(9)
    network, loss = FORMATS["cp"], ((3 * size - 2) / (3 * size)) ** 2

    def padded(**options):
        return tensor_xavier_(TensorConv2d(network, padding=1, bias=False, execution="weight"), **options)

    forward, _ = single_ratios(lambda: padded(mode="fan_in"), 20, size=size)
    assert forward == pytest.approx(loss, abs=0.04)
    forward, backward = single_ratios(lambda: padded(mode="fan_in", input_size=size), 20, size=size)
    assert forward == pytest.approx(1, abs=0.04) and backward == pytest.approx(1, abs=0.04)


def test_the_correction_knows_the_geometry_and_leaves_circular_padding():
    torch.manual_seed(10)
    network = FORMATS["tucker2"]
    options = {"stride": 2, "padding": 2, "dilation": 2, "bias": False, "execution": "weight"}
    for mode in ("fan_in", "fan_out"):
        layers = [tensor_xavier_(TensorConv2d(network, **options), mode=mode, input_size=(8, 8)) for _ in range(20)]
        found = [ratios([layer])[mode == "fan_out"][0] for layer in layers]
        assert arithmetic(found) == pytest.approx(1, abs=0.05)
    same = [
        tensor_kaiming_(circular(network), input_size=size, generator=torch.Generator().manual_seed(0)).cores[0]
        for size in (8, None)
    ]
    assert torch.equal(*same)


def test_a_linear_layer_and_one_of_one_dimension():
    torch.manual_seed(11)
    linear = TensorLinear(TensorNetwork(["or", "ir"], {"o": 40, "i": 60, "r": 20}, inputs="i", outputs="o"))
    scale = [float(tensor_kaiming_(linear).weight.detach().square().mean()) * 60 for _ in range(30)]
    assert arithmetic(scale) == pytest.approx(2, rel=0.05)
    sizes = {"o": 40, "i": 60, "r": 20, "h": 5}
    network = TensorNetwork(["or", "irh"], sizes, inputs="i", outputs="o", kernel="h")
    conv = TensorConv1d(network, stride=2)
    scale = [float(tensor_kaiming_(conv, mode="fan_out").weight.detach().square().mean()) for _ in range(30)]
    assert arithmetic(scale) == pytest.approx(2 / (40 * 5 / 2), rel=0.05)


# -------------------------------------------------------------------------------------------------------- the cores


@names
def test_all_cores_have_one_product_with_their_gradients_and_one_norm(name):
    """<G, dL/dG> is the same for all cores of a layer: gradient flow keeps the differences of their squared norms."""
    torch.manual_seed(12)
    for distribution in DISTRIBUTIONS:
        layer = tensor_kaiming_(circular(FORMATS[name]).double(), distribution=distribution)
        layer(torch.randn(2, 64, 5, 5).double()).square().sum().backward()
        products = torch.stack([(core * core.grad).sum().detach() for core in layer.cores])
        assert (products.max() - products.min()) / products.abs().mean() < 1e-10
        norms = torch.stack([core.detach().norm() for core in layer.cores])
        # A core of nine Gaussian entries has no norm that is known beforehand.
        small = min(network_size(layer.network)) < 20
        assert norms.max() / norms.min() < (1 + 1e-12 if distribution == "orthogonal" else 4 if small else 1.6)


def network_size(network):
    return [network.size(core) for core in network.cores]


@pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
def test_semi_orthogonal_cores_are_maps_with_orthonormal_rows_or_columns(network):
    torch.manual_seed(13)
    layer = tensor_xavier_(Cores(network, torch.float64))
    variances = core_variances(network, gain=1.0, mode="fan_avg")
    for stage in stages(network):
        labels, core = network.cores[stage.core], layer.cores[stage.core].detach()
        for label in stage.dangling:  # the map that acts is the sum over these
            core = core.sum(labels.index(label), keepdim=True)
        axes = [labels.index(label) for label in stage.passing + stage.dangling + stage.new + stage.summed]
        rows, columns = network.size(stage.new), network.size(stage.summed)
        maps = core.permute(axes).reshape(-1, rows, columns)
        maps = maps if rows >= columns else maps.mT
        expected = variances[stage.core] * max(rows, columns) * network.size(stage.dangling)
        gram = torch.eye(min(rows, columns), dtype=torch.float64).expand(len(maps), -1, -1) * expected
        torch.testing.assert_close(maps.mT @ maps, gram, atol=1e-12 * expected, rtol=0)


@pytest.mark.parametrize("name", ["weighted", "vectors", "rank one", "dangling", "large rank", "dense"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_entries_are_centred_uncorrelated_and_of_the_variance_of_the_rule(name, distribution):
    torch.manual_seed(14)
    network, draws = OTHERS[name], 400
    layer = Cores(network)
    drawn = [
        [core.detach().flatten().clone() for core in tensor_kaiming_(layer, distribution=distribution).cores]
        for _ in range(draws)
    ]
    for entries, variance in zip(map(torch.stack, zip(*drawn, strict=True)), core_variances(network), strict=True):
        moments = entries.T @ entries / draws / variance
        expected = torch.eye(len(moments))
        # Errors of standard deviation .05 to .07, from one to 10^5 of them.
        assert (moments - expected).abs().max() < 0.35
        assert (moments - expected).square().mean().sqrt() < 0.08 + 0.25 / len(moments)
        assert entries.mean(0).abs().max() < 5.5 * (variance / draws) ** 0.5


def test_uniform_entries_are_bounded():
    torch.manual_seed(15)
    layer = tensor_kaiming_(Cores(FORMATS["cp"]), distribution="uniform")
    for core, variance in zip(layer.cores, core_variances(FORMATS["cp"]), strict=True):
        assert 0.9 < core.abs().max() / math.sqrt(3 * variance) < 1 + 1e-6


def test_gains_enter_once_a_layer():
    """Whatever the number of cores, and whichever way they are named."""
    for network in (FORMATS["cp"], FORMATS["tensor_ring"]):

        def norm(init, network=network, **options):
            generator = torch.Generator().manual_seed(0)
            return float(init(Cores(network, torch.float64), generator=generator, **options).weight.detach().norm())

        linear = norm(tensor_kaiming_, nonlinearity="linear")
        assert norm(tensor_kaiming_) / linear == pytest.approx(2**0.5)
        assert norm(tensor_kaiming_, nonlinearity="leaky_relu", a=0.5) / linear == pytest.approx((2 / 1.25) ** 0.5)
        assert norm(tensor_xavier_, gain="tanh", mode="fan_in") / linear == pytest.approx(5 / 3)
        assert norm(tensor_xavier_, gain=0.3, mode="fan_in") / linear == pytest.approx(0.3)
        mean = tensor_fans(network).select("fan_avg") / tensor_fans(network).fan_in
        assert norm(tensor_xavier_) / linear == pytest.approx(mean**-0.5)


# --------------------------------------------------------------------------------------------- devices, dtypes, state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_half_precision_is_rounded_from_single(dtype, distribution):
    half, single = (
        tensor_kaiming_(
            Cores(FORMATS["cp"], kind), distribution=distribution, generator=torch.Generator().manual_seed(0)
        )
        for kind in (dtype, torch.float32)
    )
    for rounded, core in zip(half.cores, single.cores, strict=True):
        assert torch.equal(rounded, core.to(dtype))


def test_a_generator_decides_the_cores_and_torchs_own_is_left():
    state = torch.get_rng_state()
    first, second = (
        tensor_kaiming_(Cores(FORMATS["odd"]), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_the_layer_is_returned_and_its_parameters_stay_the_same_objects():
    layer = TensorConv2d(FORMATS["cp"])
    with torch.no_grad():
        layer.bias.fill_(0.5)
    cores, versions = list(layer.cores), [core._version for core in layer.cores]
    assert tensor_kaiming_(layer) is layer and tensor_xavier_(layer) is layer
    assert all(a is b and a.requires_grad and a.is_leaf for a, b in zip(cores, layer.cores, strict=True))
    assert all(core._version > version for core, version in zip(cores, versions, strict=True))
    assert (layer.bias == 0.5).all()


def test_layers_on_the_meta_device():
    layer = TensorConv2d(FORMATS["odd"], device="meta")
    assert all(core.is_meta for core in tensor_kaiming_(layer).cores)


def test_a_new_layer_has_no_memory_of_what_lay_there():
    """Its cores are filled on construction; those of tensorly-torch are not until someone does."""
    for name in FORMATS:
        layer = TensorConv2d(FORMATS[name])
        assert all(torch.isfinite(core).all() and core.abs().max() < 10 for core in layer.cores)


def test_layers_of_other_libraries_can_be_given_their_network():
    """The factors of a layer of tensorly-torch, which are uninitialised memory, with the network that they are."""
    tltorch = pytest.importorskip("tltorch")
    foreign = tltorch.FactorizedTensor.new((64, 64, 3, 3), rank=48, factorization="CP")
    sizes = {"o": 64, "i": 64, "h": 3, "w": 3, "r": 48}
    network = TensorNetwork(["r", "or", "ir", "hr", "wr"], sizes, inputs="i", outputs="o", kernel="hw")
    layer = Cores(network)
    layer.cores = nn.ParameterList([foreign.weights, *foreign.factors])
    tensor_kaiming_(layer)
    weight = foreign.to_tensor().detach()
    torch.testing.assert_close(weight, layer.weight.detach(), atol=1e-5, rtol=0)
    assert float(weight.square().mean()) * 576 == pytest.approx(2, rel=0.05)


def test_copies_are_independent():
    layer = TensorConv2d(FORMATS["tucker2"])
    other = copy.deepcopy(layer)
    tensor_kaiming_(layer)
    assert not any(torch.equal(a, b) for a, b in zip(layer.cores, other.cores, strict=True))


# ----------------------------------------------------------------------------------------------------------- errors


def test_modules_that_are_no_tensorial_layer():
    with pytest.raises(TypeError, match="layer must be a tensorial one, such as TensorConv2d; Conv2d has no network"):
        tensor_kaiming_(nn.Conv2d(3, 3, 3))
    with pytest.raises(TypeError, match="Sequential has no network"):
        tensor_xavier_(nn.Sequential(TensorConv2d(FORMATS["cp"])))


def test_arguments_that_are_not_allowed_leave_the_layer_as_it_is():
    layer = TensorConv2d(FORMATS["cp"])
    before = [core.clone() for core in layer.cores]
    for options, message in (
        ({"distribution": "gaussian"}, "distribution must be one of 'orthogonal', 'normal', 'uniform', got 'gaussian'"),
        ({"nonlinearity": "swish"}, "nonlinearity must be one that torch.nn.init.calculate_gain knows"),
        ({"mode": "fan"}, "mode must be"),
        ({"split": "even"}, "split must be"),
        ({"input_size": (8, 8, 8)}, "input_size must be"),
        ({"input_size": 1}, "no less than the kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            tensor_kaiming_(layer, **options)
    with pytest.raises(ValueError, match="gain must be positive"):
        tensor_xavier_(layer, gain=-1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.cores, strict=True))


def test_cores_that_do_not_fit_their_network():
    layer = Cores(FORMATS["cp"])
    layer.cores[2] = nn.Parameter(torch.empty(5, 48))
    with pytest.raises(ValueError, match="must have shapes"):
        tensor_kaiming_(layer)
