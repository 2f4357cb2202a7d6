import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.nets.init.reproducing import dummy_tensor, reproducing_transformation
from retract.nets.init.tensor import tensor_kaiming_
from retract.nets.init.variance import tensor_fans
from retract.nets.layers.tensor_network import TensorNetwork
from tests.nets.tensor_cases import OTHERS, Cores, formats

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
GRID = [case for case in itertools.product((7, 8, 11), (1, 2, 3, 5), (1, 2, 3), range(5)) if case[3] < case[1]]


def dense(out, into, *kernel):
    labels = "hwd"[: len(kernel)]
    dims = {"o": out, "i": into, **dict(zip(labels, kernel, strict=True))}
    return TensorNetwork([f"oi{labels}"], dims, inputs="i", outputs="o", kernel=labels)


def random_cores(network):
    """Of a weight that keeps signals at their size: the bounds of rounding are absolute ones."""
    return list(tensor_kaiming_(Cores(network, torch.float64), distribution="normal").cores)


def assert_gradient(network, cores, size, groups=1, **geometry):
    """The reproduced convolution gives the gradient that autograd gives."""
    channels = network.in_features * groups
    signal = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    output = CONVOLVE[len(size)](signal, network.weight(cores), None, groups=groups, **geometry)
    cotangent = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, signal, cotangent)
    reproduced = reproducing_transformation(network, cores, groups=groups, **geometry)
    torch.testing.assert_close(reproduced(cotangent, size), expected, atol=1e-12, rtol=0)
    assert reproduced.network.in_features == network.out_features // groups
    assert reproduced.network.out_features == channels


@pytest.mark.parametrize("size", [7, 8, 11])
def test_the_backward_pass_of_a_strided_padded_convolution_is_one_of_stride_one(size):
    torch.manual_seed(0)
    for n, k, s, p in GRID:
        if n == size:
            network = dense(4, 3, k, k)
            assert_gradient(network, random_cores(network), (n, n), stride=s, padding=p)


def test_dummy_tensors_are_the_convolution():
    torch.manual_seed(0)
    for n, k, s, p in GRID:
        signal, weight = torch.randn(2, 3, n, n).double(), torch.randn(4, 3, k, k).double()
        dummy = dummy_tensor(n, k, stride=s, padding=p)
        contracted = torch.einsum("bcij,iuh,jvw,ochw->bouv", signal, dummy, dummy, weight)
        torch.testing.assert_close(contracted, F.conv2d(signal, weight, stride=s, padding=p), atol=1e-12, rtol=0)


def test_a_dummy_tensor_with_dilation():
    signal, weight = torch.randn(11).double(), torch.randn(3).double()
    contracted = torch.einsum("i,iuh,h->u", signal, dummy_tensor(11, 3, stride=2, padding=1, dilation=3), weight)
    expected = F.conv1d(signal[None, None], weight[None, None], stride=2, padding=1, dilation=3)[0, 0]
    torch.testing.assert_close(contracted, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", formats())
def test_every_format_with_the_same_cores(name):
    torch.manual_seed(0)
    network = formats(16, 32)[name]
    assert_gradient(network, random_cores(network), (8, 9), stride=(2, 1), padding=1)


@pytest.mark.parametrize("name", [name for name, network in OTHERS.items() if network.kernel])
def test_other_networks(name):
    torch.manual_seed(0)
    network = OTHERS[name]
    size = (8, 9)[: len(network.kernel)]
    assert_gradient(network, random_cores(network), size, stride=2, padding=2, dilation=2)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), spatial=st.integers(1, 3), groups=st.integers(1, 3))
def test_any_geometry(data, spatial, groups):
    def draw(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(spatial))

    kernel, stride, dilation, padding = draw(1, 3), draw(1, 3), draw(1, 2), draw(0, 4)
    reach = [e * (k - 1) for e, k in zip(dilation, kernel, strict=True)]
    size = tuple(max(1, r + 1 - 2 * p) + extra for r, p, extra in zip(reach, padding, draw(0, 3), strict=True))
    labels = "hwd"[:spatial]
    dims = {"g": groups, "o": 2, "i": 3, "r": 2, **dict(zip(labels, kernel, strict=True))}
    network = TensorNetwork(["gor", f"ir{labels}"], dims, inputs="i", outputs="go", kernel=labels)
    torch.manual_seed(0)
    assert_gradient(
        network, random_cores(network), size, groups=groups, stride=stride, padding=padding, dilation=dilation
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_padding_by_name(padding, kernel):
    network = dense(2, 3, kernel, 3)
    assert_gradient(network, random_cores(network), (6, 7), padding=padding, dilation=(1, 2))


def test_padding_beyond_the_kernel_crops_the_cotangent():
    network = dense(2, 3, 2)
    assert_gradient(network, random_cores(network), (5,), padding=4, stride=2)


def test_a_linear_layer():
    network = OTHERS["linear"]
    cores = random_cores(network)
    cotangent = torch.randn(4, 8, dtype=torch.float64)
    reproduced = reproducing_transformation(network, cores)
    torch.testing.assert_close(reproduced(cotangent, ()), cotangent @ network.weight(cores), atol=1e-12, rtol=0)


def test_the_transformation_is_differentiable_in_cores_and_cotangent():
    network = formats(16, 16)["block_term"]
    cores = random_cores(network)
    cotangent = torch.randn(1, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    gradient = reproducing_transformation(network, cores, stride=2, padding=1)(cotangent, (5, 5))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(gradient.square().sum(), [*cores, cotangent]))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_one_calculus_serves_both_directions(stride):
    """The fan backward is the fan of the reproduced convolution, of whose inputs stride - 1 of stride are zero."""
    network = formats(16, 32)["cp"]
    reproduced = reproducing_transformation(network, random_cores(network), stride=stride, padding=1)
    backward = tensor_fans(reproduced.network).fan_in / stride**2
    assert math.isclose(backward, tensor_fans(network, stride=stride).fan_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "groups must be the product of the sizes of the first outputs"),
        ({"stride": (1, 2, 3)}, "stride must be one value or 2"),
        ({"stride": 0}, "stride and dilation must be at least 1"),
        ({"dilation": 0}, "stride and dilation must be at least 1"),
        ({"padding": -1}, "padding at least 0"),
        ({"padding": "full"}, "'same', 'valid'"),
    ],
)
def test_arguments_that_are_not_allowed(options, message):
    network = dense(4, 3, 2, 2)
    with pytest.raises(ValueError, match=message):
        reproducing_transformation(network, random_cores(network), **options)


def test_cores_and_sizes_that_do_not_fit():
    network = dense(4, 3, 2, 2)
    with pytest.raises(ValueError, match="must have shapes"):
        reproducing_transformation(network, [torch.ones(4, 3, 2, 3)])
    reproduced = reproducing_transformation(network, random_cores(network))
    with pytest.raises(ValueError, match="input_size must have 2 numbers"):
        reproduced(torch.ones(1, 4, 3, 3), (4,))
    with pytest.raises(ValueError, match="cotangent must have shape"):
        reproduced(torch.ones(1, 4, 3, 3).double(), (7, 4))
    with pytest.raises(ValueError, match="no less than the kernel"):
        dummy_tensor(3, 5)
