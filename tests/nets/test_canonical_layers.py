"""Layers that run on the terms of their weight: the dense layer's results, and which way is taken when."""

import copy
import math
import pickle
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from retract.nets.layers.canonical import CANONICAL, runs_factored
from retract.nets.parametrizations import _canonical_base, canonical_weight_norm, put_terms
from retract.nets.parametrizations._canonical_weight import build_weight

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZE = {1: (11,), 2: (9, 7), 3: (5, 7, 6)}
quiet = pytest.mark.filterwarnings("ignore:rank=.*told apart")


def both_ways(module, x, *arguments):
    """Output and gradients with execution "weight" and "factored"."""
    canonical = module.parametrizations.weight[0]
    results = []
    for canonical.execution in ("weight", "factored"):
        inputs = [x.clone().requires_grad_(), *module.parameters()]
        output = module(inputs[0], *arguments)
        probe = torch.randn(output.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        results.append([output, *torch.autograd.grad((output * probe).sum(), inputs)])
    return results


def assert_alike(module, x, *arguments, forward=1e-12, backward=1e-12):
    weight, factored = both_ways(module, x, *arguments)
    for index, (expected, found) in enumerate(zip(weight, factored, strict=True)):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        allowed = (backward if index else forward) * expected.norm()
        assert (found - expected).norm() <= allowed + torch.finfo(x.dtype).tiny


def layer(kind, *arguments, rank=5, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return canonical_weight_norm(kind(*arguments, dtype=dtype, **options), rank, execution="factored")


# ------------------------------------------------------------------------------------------------- the dense results


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolutions(ndim, padding, stride):
    module = layer(CONV[ndim], 6, 8, 3, stride=stride, padding=padding)
    x = torch.randn(2, 6, *SIZE[ndim], dtype=torch.float64)
    assert_alike(module, x)
    assert_alike(module, x[0])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_transposed_convolutions(ndim, padding, stride):
    module = layer(TRANSPOSED[ndim], 6, 8, 3, stride=stride, padding=padding, output_padding=stride - 1)
    x = torch.randn(2, 6, *SIZE[ndim], dtype=torch.float64)
    assert_alike(module, x)
    assert_alike(module, x[0])
    if stride == 2:
        size = [2 * n + 3 - 2 * padding - 2 for n in SIZE[ndim]]
        assert_alike(module, x, size)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_single_precision(padding, stride):
    module = layer(nn.Conv2d, 16, 24, 3, rank=30, stride=stride, padding=padding, dtype=torch.float32)
    assert_alike(module, torch.randn(4, 16, 13, 11), forward=2e-6, backward=5e-6)


@quiet
@settings(max_examples=60, deadline=None)
@given(data=st.data(), ndim=st.integers(1, 3), transposed=st.booleans())
def test_any_geometry(data, ndim, transposed):
    def each(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * ndim))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    options = {"stride": stride, "dilation": dilation, "padding": each(0, 2), "bias": data.draw(st.booleans())}
    if transposed:
        sizes = zip(options["padding"], dilation, kernel, strict=True)
        options["padding"] = tuple(min(padding, step * (taps - 1)) for padding, step, taps in sizes)
        options["output_padding"] = tuple(data.draw(st.integers(0, s - 1)) for s in stride)
    channels = data.draw(st.integers(1, 4))
    kind = (TRANSPOSED if transposed else CONV)[ndim]
    module = layer(kind, channels, data.draw(st.integers(1, 4)), kernel, rank=data.draw(st.integers(1, 4)), **options)
    x = torch.randn(data.draw(st.integers(1, 2)), channels, *each(5, 7), dtype=torch.float64)
    assert_alike(module, x, backward=1e-11)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
def test_padding(mode, padding):
    module = layer(nn.Conv2d, 3, 4, (4, 3), padding=padding, padding_mode=mode, dilation=(1, 2))
    assert_alike(module, torch.randn(2, 3, 9, 8, dtype=torch.float64))


@quiet
@pytest.mark.parametrize("lead", [(3,), (), (2, 3)])
@pytest.mark.parametrize("sizes", [(6, 4), (1, 4), (4, 1), (1, 1)])
def test_linear(sizes, lead):
    assert_alike(layer(nn.Linear, *sizes, rank=3), torch.randn(*lead, sizes[0], dtype=torch.float64))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_last_stays(kind):
    module = layer(kind, 6, 8, 3, padding=1, dtype=torch.float32)
    x = torch.randn(2, 6, 9, 9)
    last = x.contiguous(memory_format=torch.channels_last)
    assert module(x).is_contiguous()
    assert module(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(x), module(last))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_autocast_and_half_precision(kind):
    arguments = (16, 16) if kind is nn.Linear else (16, 16, 3)
    module = layer(kind, *arguments, dtype=torch.float32)
    x = torch.randn(4, 16) if kind is nn.Linear else torch.randn(2, 16, 8, 8)
    expected = module(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.02 * expected.norm()
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    output = module.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.03 * expected.norm()


def test_the_weight_is_not_built(monkeypatch):
    modules = [
        (layer(nn.Conv2d, 6, 8, 3), (2, 6, 5, 5)),
        (layer(nn.ConvTranspose2d, 6, 8, 3), (2, 6, 5, 5)),
        (layer(nn.Linear, 6, 8), (2, 6)),
    ]

    def refuse(*_):
        raise AssertionError("the weight was built")

    monkeypatch.setattr(_canonical_base, "build_weight", refuse)
    for module, shape in modules:
        module(torch.randn(shape, dtype=torch.float64)).sum().backward()
        module.parametrizations.weight[0].execution = "weight"
        with pytest.raises(AssertionError, match="was built"):
            module(torch.randn(shape, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------- which way is taken


def test_the_size_of_the_input_decides():
    """Of 256 channels, 3 x 3: building the weight costs as much as some thousand positions of it do."""
    full, few = (canonical_weight_norm(nn.Conv2d(256, 256, 3), rank).parametrizations.weight[0] for rank in (1145, 60))
    assert runs_factored(full, 1) and runs_factored(full, 512)
    assert not runs_factored(full, 128 * 64)
    assert runs_factored(few, 1) and runs_factored(few, 10**9)
    linear = canonical_weight_norm(nn.Linear(9216, 128), 128).parametrizations.weight[0]
    assert runs_factored(linear, 64) and not runs_factored(linear, 10**6)
    up = canonical_weight_norm(nn.ConvTranspose2d(64, 64, 3, stride=2), 240).parametrizations.weight[0]
    assert runs_factored(up, 1) and not runs_factored(up, 10**6)


def test_a_layer_goes_the_way_of_its_input(monkeypatch):
    module = canonical_weight_norm(nn.Conv2d(16, 16, 3, padding=1), 65)
    canonical = module.parametrizations.weight[0]
    large, small = torch.randn(8, 16, 32, 32), torch.randn(1, 16, 1, 1)
    assert runs_factored(canonical, 1) and not runs_factored(canonical, 8 * 32 * 32)
    built = []
    monkeypatch.setattr(_canonical_base, "build_weight", lambda *a: built.append(a) or build_weight(*a))
    module(small)
    assert not built
    module(large)
    assert built
    canonical.execution = "weight"
    assert not runs_factored(canonical, 1)
    canonical.execution = "factored"
    assert runs_factored(canonical, 10**9)


@pytest.mark.parametrize("kind", list(CANONICAL))
def test_classes(kind):
    arguments = (6, 8) if kind is nn.Linear else (6, 8, 3)
    module = canonical_weight_norm(kind(*arguments), 3)
    assert isinstance(module, CANONICAL[kind]) and isinstance(module, kind)
    twin = copy.deepcopy(module)
    x = torch.randn(2, 6, *(5,) * (module.weight.ndim - 2))
    torch.testing.assert_close(twin(x), module(x))
    contraction = pickle.loads(pickle.dumps(module.parametrizations.weight[0].contraction))
    assert contraction.cost == module.parametrizations.weight[0].contraction.cost


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, 2 * self.weight)


def test_layers_that_cannot():
    module = canonical_weight_norm(Scaled(3, 4, 3), 2)
    assert module.parametrizations.weight[0].contraction is None
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(module(x), F.conv2d(x, 2 * module.weight))
    with pytest.raises(ValueError, match="execution='factored' is not possible: Scaled is not a class"):
        canonical_weight_norm(Scaled(3, 4, 3), 2, execution="factored")
    other = nn.Linear(3, 4)
    other.second = nn.Parameter(torch.randn(4, 3))
    with pytest.raises(ValueError, match="takes its weight, not 'second'"):
        canonical_weight_norm(other, 2, name="second", execution="factored")
    canonical_weight_norm(other, 2, name="second")
    assert other.second.shape == (4, 3)
    torch.testing.assert_close(other(x[0, 0, :, :3]), F.linear(x[0, 0, :, :3], other.weight, other.bias))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_another_parametrization_on_top_is_heeded(kind):
    module = layer(kind, *((6, 8) if kind is nn.Linear else (6, 8, 3)), bias=False)
    x = torch.randn(2, 6, *(5,) * (module.weight.ndim - 2), dtype=torch.float64)
    before = module(x)
    parametrize.register_parametrization(module, "weight", Doubled())
    torch.testing.assert_close(module(x), 2 * before)
    with pytest.raises(ValueError, match="parametrized already"):
        canonical_weight_norm(module, 2)
    canonical, originals = _canonical_base.canonical_weight(module)
    with pytest.raises(ValueError, match="another parametrization on top"):
        put_terms(module, *canonical.terms(*originals))


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["weight", "factored"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_torch_compile_traces_the_whole_layer(kind, execution):
    module = layer(kind, *((6, 8) if kind is nn.Linear else (6, 8, 3)))
    module.parametrizations.weight[0].execution = execution
    x = torch.randn(2, 6, *(5,) * (module.weight.ndim - 2), dtype=torch.float64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


# ---------------------------------------------------------------------------------------------------------------- speed


def naive_weight(weights, factors, shape):
    """The Khatri-Rao product of all modes but the first, from the first on, and a product with it."""
    first, product, *others = factors
    for rows in others:
        product = (product.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)
    return ((weights.unsqueeze(1) * first).mT @ product).reshape(shape)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rank", "repeats"), [((64, 32, 3, 3), 270, 20), ((256, 256, 3, 3), 1644, 2)])
def test_building_the_weight_is_no_slower_than_the_naive_way(shape, rank, repeats):
    torch.manual_seed(0)
    weights = torch.ones(rank, requires_grad=True)
    factors = [torch.randn(rank, size, requires_grad=True) for size in shape]
    probe = torch.randn(shape)

    def seconds(build):  # of the processor: other processes take turns with this one
        start = time.process_time()
        for _ in range(repeats):
            torch.autograd.grad(build(weights, factors, shape), [weights, *factors], probe)
        return time.process_time() - start

    difference = build_weight(weights, factors, shape) - naive_weight(weights, factors, shape)
    assert difference.abs().max() < 1e-4 * math.sqrt(rank)
    times = [(seconds(build_weight), seconds(naive_weight)) for _ in range(9)]
    mine, naive = (min(column) for column in zip(*times, strict=True))
    assert mine < 1.05 * naive
