import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.nets.init.tensor import tensor_kaiming_
from retract.nets.init.variance import core_variances, stages, tensor_fans
from retract.nets.layers.tensor_formats import tensor_network
from retract.nets.layers.tensor_network import TensorNetwork
from tests.nets.tensor_cases import FORMATS, OTHERS, Cores, spread

NETWORKS = FORMATS | OTHERS
SPLITS = ("equal_norm", "equal_variance", "staged")
MODES = ("fan_in", "fan_out", "fan_avg")
networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))


def moments(network, draws, **options):
    """Mean square of the entries of the weight, of each of some draws of the cores."""
    layer = Cores(network)
    return torch.stack([tensor_kaiming_(layer, **options).weight.detach().square().mean() for _ in range(draws)])


def normal_cores(network, variances):
    return [torch.randn(shape) * v**0.5 for shape, v in zip(network.core_shapes, variances, strict=True)]


# ---------------------------------------------------------------------------------------------------- the product


@networks
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", MODES)
def test_the_product_of_the_variances_is_the_rule(network, split, mode):
    for groups, stride, gain in itertools.product((1, 2), (1, 2), (2**0.5, 1.0, 5 / 3)):
        variances = core_variances(network, gain=gain, mode=mode, groups=groups, stride=stride, split=split)
        fan = tensor_fans(network, groups=groups, stride=stride).select(mode)
        product = math.prod(variances) * network.bond_product * fan
        assert math.isclose(product, gain**2, rel_tol=1e-12)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_the_product_for_random_networks(data):
    """Every assignment of indices to cores, hyperedges and dangling bonds among them."""
    labels = "oihabc"
    count = data.draw(st.integers(1, 4))
    members = [data.draw(st.sets(st.integers(0, count - 1), min_size=1)) for _ in labels]
    cores = ["".join(x for x, m in zip(labels, members, strict=True) if core in m) for core in range(count)]
    sizes = {label: data.draw(st.integers(1, 5)) for label in labels}
    network = TensorNetwork([core for core in cores if core], sizes, inputs="i", outputs="o", kernel="h")
    for split in SPLITS:
        variances = core_variances(network, split=split, gain=1.0)
        product = math.prod(variances) * sizes["a"] * sizes["b"] * sizes["c"] * sizes["i"] * sizes["h"]
        assert math.isclose(product, 1.0, rel_tol=1e-12)
    assert sorted(stage.core for stage in stages(network)) == list(range(len(network.cores)))
    for stage in stages(network):
        parts = stage.summed + stage.passing + stage.new + stage.dangling
        assert sorted(parts) == sorted(network.cores[stage.core])


def test_fans_are_those_of_the_dense_layer():
    network = TensorNetwork(
        ["gor", "irhw"], {"g": 4, "o": 3, "i": 5, "r": 2, "h": 3, "w": 2}, inputs="i", outputs="go", kernel="hw"
    )
    assert tensor_fans(network) == (5 * 6, 12 * 6)
    assert tensor_fans(network, groups=4, stride=2) == (5 * 6, 3 * 6 / 4)
    assert tensor_fans(network, stride=(3, 1)) == (5 * 6, 12 * 6 / 3)
    assert tensor_fans(network).select("fan_avg") == 51


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"padding": 0, "stride": 2},
        {"padding": (2, 0), "stride": (3, 2), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_fans_with_borders_are_those_of_a_weight_of_ones(geometry, groups):
    """Ones convolved with ones count taps; and so do gradients."""
    network = TensorNetwork(["oihw"], {"o": 6, "i": 5, "h": 3, "w": 3}, inputs="i", outputs="o", kernel="hw")
    signal = torch.ones(1, 5 * groups, 8, 9, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(signal, torch.ones(6, 5, 3, 3).double(), groups=groups, **geometry)
    (gradient,) = torch.autograd.grad(output.sum(), signal)
    fans = tensor_fans(network, groups=groups, **geometry, input_size=(8, 9))
    assert math.isclose(fans.fan_in, output.mean().item(), rel_tol=1e-12)
    assert math.isclose(fans.fan_out, gradient.mean().item(), rel_tol=1e-12)


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_the_fraction_of_taps_that_zero_padding_leaves(size):
    network = FORMATS["cp"]
    inside = tensor_fans(network, padding=1, input_size=size)
    for fan, whole in zip(inside, tensor_fans(network), strict=True):
        assert math.isclose(fan / whole, ((3 * size - 2) / (3 * size)) ** 2, rel_tol=1e-12)


# ----------------------------------------------------------------------------------------------------- the split


def test_equal_norm_and_equal_variance():
    network = FORMATS["cp"]
    norms = [v * network.size(core) for v, core in zip(core_variances(network), network.cores, strict=True)]
    assert all(math.isclose(norm, norms[0], rel_tol=1e-12) for norm in norms)
    assert len(set(core_variances(network, split="equal_variance"))) == 1


def test_the_stages_of_a_canonical_form_and_of_trains():
    def order(name):
        return [(FORMATS[name].cores[s.core], s.summed, s.passing, s.new, s.dangling) for s in stages(FORMATS[name])]

    assert order("cp") == [
        ("ir", "i", "", "r", ""),
        ("hr", "h", "r", "", ""),
        ("wr", "w", "r", "", ""),
        ("or", "r", "", "o", ""),
    ]
    assert [core for core, *_ in order("tensor_train")] == ["ia", "ahb", "bwc", "co"]
    assert [core for core, *_ in order("tucker")] == ["iq", "hs", "wt", "pqst", "op"]
    assert ("exy", "x", "", "e", "y") in order("odd")


def test_the_order_in_which_cores_are_listed_does_not_matter():
    sizes = FORMATS["tensor_train"].dims
    for cores in itertools.permutations(FORMATS["tensor_train"].cores):
        network = TensorNetwork(cores, sizes, inputs="i", outputs="o", kernel="hw")
        assert [cores[stage.core] for stage in stages(network)] == ["ia", "ahb", "bwc", "co"]


def test_staged_variances_of_a_canonical_form():
    variances = core_variances(FORMATS["cp"], split="staged")
    assert variances == pytest.approx((2 / 48, 1 / 64, 1 / 3, 1 / 3), rel=1e-12)


@networks
def test_staged_variances_keep_every_intermediate_at_unit_scale(network):
    torch.manual_seed(0)
    variances = core_variances(network, split="staged", gain=1.0)
    # Signs have the second moments of the rule with the least spread.
    draws = 12 if network.parameters > 1000 else 100
    squares = [0.0] * len(variances)
    for _ in range(draws):
        present = network.inputs + network.kernel
        signal = torch.randn(*(network.dims[label] for label in present), 64)
        cores = [core.sign() * v**0.5 for core, v in zip(normal_cores(network, variances), variances, strict=True)]
        for index, stage in enumerate(stages(network)):
            kept = "".join(label for label in present if label not in stage.summed) + stage.new
            signal = torch.einsum(f"{present}Z,{network.cores[stage.core]}->{kept}Z", signal, cores[stage.core])
            squares[index] += signal.square().mean().item() / draws
            present = kept
    assert all(0.6 < square < 1.5 for square in squares), squares


# ------------------------------------------------------------------------------------------ the weight's variance


@networks
@pytest.mark.parametrize("distribution", ["orthogonal", "normal", "uniform"])
def test_the_mean_square_of_the_weight(network, distribution):
    """Small networks of independent entries have heavy tails, and a standard error that is itself uncertain."""
    torch.manual_seed(1)
    draws, errors = (40, 3) if network.parameters > 1000 else (400, 5)
    ratio = moments(network, draws, distribution=distribution) * tensor_fans(network).fan_in / 2
    error = max(float(ratio.std()) / draws**0.5, 1e-6)
    assert abs(float(ratio.mean()) - 1) < errors * error


@pytest.mark.parametrize("name", FORMATS)
def test_semi_orthogonal_cores_meet_the_rule_in_every_draw(name):
    """Exactly, but for rings, dangling bonds, and modes that are split."""
    torch.manual_seed(2)
    assert spread(moments(FORMATS[name], 40)) < {"tensor_ring": 0.12, "odd": 0.05, "tt_matrix": 0.02}.get(name, 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_gaussian_cores_spread(name):
    """What the default distribution is for: the figures of the documentation, to a factor of two."""
    expected = {"tucker2": 0.07, "tensor_train": 0.08, "block_term": 0.06, "tucker": 0.96, "hierarchical_tucker": 0.98}
    torch.manual_seed(3)
    found = spread(moments(FORMATS[name], 40, distribution="normal"))
    assert 0.5 < found / expected.get(name, 0.22) < 2


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_the_spread_of_gaussian_canonical_forms(rank):
    """Var |W|² / E² = (prod (1 + 2/d) - 1) / R, to leading order."""
    torch.manual_seed(4)
    network = TensorNetwork(
        ["or", "ir", "hr", "wr"], {"o": 64, "i": 64, "h": 3, "w": 3, "r": rank}, inputs="i", outputs="o", kernel="hw"
    )
    expected = math.sqrt((math.prod(1 + 2 / d for d in (64, 64, 3, 3)) - 1) / rank)
    assert spread(moments(network, 400, distribution="normal")) == pytest.approx(expected, rel=0.2)


def test_a_hyperedge_counted_more_than_once_fails():
    """CP of rank 40: counted twice the weight is 40 times too small in variance, three times 1600."""
    torch.manual_seed(5)
    network = TensorNetwork(
        ["or", "ir", "hr", "wr"], {"o": 64, "i": 64, "h": 3, "w": 3, "r": 40}, inputs="i", outputs="o", kernel="hw"
    )
    right = float(moments(network, 20).mean()) * 576 / 2
    assert abs(right - 1) < 0.1
    for times in (2, 3):
        gain = math.sqrt(2 / 40 ** (times - 1))
        wrong = core_variances(network, gain=gain)
        draws = [network.weight(normal_cores(network, wrong)).square().mean() for _ in range(20)]
        ratio = float(torch.stack(draws).mean()) * 576 / 2
        assert ratio == pytest.approx(40.0 ** (1 - times), rel=0.2)
        assert not abs(ratio - 1) < 0.1


# --------------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize(("kind", "ratio"), [("TT", 1 / 24**1.5), ("CP", 1.0), ("Tucker", 1.0)])
def test_the_informed_initialization_of_tensorly_torch(kind, ratio):
    """It divides by the product of the ranks of a tensor train where its root is meant."""
    tltorch = pytest.importorskip("tltorch")
    ranks = {"TT": (1, 24, 24, 24, 1), "CP": 48, "Tucker": (16, 16, 3, 3)}[kind]
    torch.manual_seed(6)
    found = []
    for _ in range(30):
        weight = tltorch.FactorizedTensor.new((64, 64, 3, 3), rank=ranks, factorization=kind)
        weight.normal_(0, 0.02)
        found.append(weight.to_tensor().detach().square().mean().item())
    assert math.sqrt(sum(found) / 30) / 0.02 == pytest.approx(ratio, rel=0.05 if kind == "TT" else 0.25)


def test_tensorly_torch_has_our_equal_variances_where_it_is_right():
    """For CP and Tucker, per core; the fan it leaves to its caller."""
    tltorch = pytest.importorskip("tltorch")
    torch.manual_seed(7)
    target = math.sqrt(2 / 576)
    for kind, name, ranks in (("CP", "cp", 48), ("Tucker", "tucker", (16, 16, 3, 3))):
        weight = tltorch.FactorizedTensor.new((64, 64, 3, 3), rank=ranks, factorization=kind)
        ours = core_variances(FORMATS[name], split="equal_variance")[0]
        found = []
        for _ in range(20):
            weight.normal_(0, target)
            found.append(torch.cat([factor.detach().flatten() for factor in weight.factors]).square().mean())
        assert float(torch.stack(found).mean()) == pytest.approx(ours, rel=0.05)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fan"}, "mode must be one of 'fan_in', 'fan_out', 'fan_avg', got 'fan'"),
        ({"split": "equal"}, "split must be one of 'equal_norm', 'equal_variance', 'staged', got 'equal'"),
        ({"gain": 0.0}, "gain must be positive and finite, got 0.0"),
        ({"gain": math.nan}, "gain must be positive and finite, got nan"),
        ({"groups": 3}, "groups must divide the 64 output channels"),
        ({"groups": 0}, "groups must divide the 64 output channels"),
        ({"stride": (1, 2, 1)}, "stride must be one value or 2"),
        ({"stride": 0}, "stride"),
    ],
)
def test_arguments_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        core_variances(FORMATS["cp"], **options)


def test_sizes_that_are_not_allowed():
    with pytest.raises(ValueError, match="input_size must be one value or 2"):
        tensor_fans(FORMATS["cp"], input_size=(1, 2, 3))
    with pytest.raises(ValueError, match="no less than the kernel"):
        tensor_fans(FORMATS["cp"], input_size=2)
    sequence = tensor_network("cp", (4, 4, 2), rank=2)
    with pytest.raises(ValueError, match="input_size 1: every tap falls on padding"):
        tensor_fans(sequence, input_size=1, padding=2, dilation=3, stride=9)
