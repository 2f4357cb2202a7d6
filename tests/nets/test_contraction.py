"""Contractions with the cores of a network: exact, along the cheapest path, without the weight."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from retract.nets.layers import _contraction_path as path
from retract.nets.layers import _contraction_steps as steps
from retract.nets.layers._contraction import Contraction
from retract.nets.layers._contraction_operands import operands
from retract.nets.layers._convolution_geometry import padding_amounts
from retract.nets.layers.tensor_formats import FORMATS, tensor_network
from retract.nets.layers.tensor_network import TensorNetwork

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = (7, 8, 5)
ODD = TensorNetwork(  # bond a is in three cores, y in one
    ["iab", "hacx", "wbcd", "oade", "exy"],
    {"i": 4, "o": 6, "h": 3, "w": 2, "a": 2, "b": 3, "c": 2, "d": 2, "e": 3, "x": 2, "y": 2},
    inputs="i",
    outputs="o",
    kernel="hw",
)
SHARED = TensorNetwork(  # inputs, outputs and kernel positions in several cores
    ["iohr", "ihj", "pow", "wpjr"],
    {"i": 2, "j": 3, "o": 2, "p": 4, "h": 3, "w": 2, "r": 3},
    inputs="ij",
    outputs="op",
    kernel="hw",
)
CP = tensor_network("cp", (24, 16, 3, 3), rank=8)


def random_cores(network: TensorNetwork, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in network.core_shapes]


def dense(
    network: TensorNetwork,
    input: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    padding: Any,
    mode: str,
    **at: Any,
) -> Tensor:
    """The layer with its weight."""
    weight = network.weight(cores)
    if not network.kernel:
        return F.linear(input, weight, bias)
    amounts = padding_amounts(padding, network.kernel_size, at.get("dilation", (1,) * len(network.kernel)))
    flat = [number for pair in reversed(amounts) for number in pair]
    padded = F.pad(input, flat, "constant" if mode == "zeros" else mode)
    return CONVOLVE[len(network.kernel)](padded, weight, bias, **at)


def assert_equal_to_dense(
    network: TensorNetwork, padding: Any = 0, mode: str = "zeros", tol: float = 1e-12, **at: Any
) -> None:
    """Output and all gradients, in both memory formats."""
    spatial = len(network.kernel)
    cores = random_cores(network)
    bias = torch.randn(network.out_features, dtype=torch.float64, requires_grad=True)
    input = torch.randn(2, at.get("groups", 1) * network.in_features, *SIZES[:spatial], dtype=torch.float64)
    contraction = Contraction(network, **at)
    expected = dense(network, input.requires_grad_(), cores, bias, padding, mode, **at)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [input, bias, *cores], cotangent)
    for last in (False, True)[: 1 + (spatial in (2, 3))]:
        format = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial] if last else torch.contiguous_format
        given_input = input.detach().contiguous(memory_format=format).requires_grad_()
        output = contraction(given_input, cores, padding, padding_mode=mode, bias=bias)
        assert output.is_contiguous(memory_format=torch.contiguous_format if given_input.is_contiguous() else format)
        found = torch.autograd.grad(output, [given_input, bias, *cores], cotangent)
        for one, other in zip((output, *found), (expected, *wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=tol, atol=tol * max(1.0, float(other.abs().max().detach())))


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "unequal": {"stride": (2, 1, 3), "padding": (0, 2, 1), "dilation": (1, 2, 1)},
    "same": {"padding": "same", "dilation": 2},
    "circular": {"padding": 2, "mode": "circular"},
    "reflect": {"padding": 1, "mode": "reflect", "stride": 2},
    "replicate": {"padding": "same", "mode": "replicate"},
    "groups": {"groups": 4, "padding": 1, "stride": 2},
}


@pytest.fixture(params=["memory counts", "multiplications alone", "opt_einsum"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other costs and another search find other paths: all must be exact."""
    if request.param != "memory counts":
        monkeypatch.setattr(path, "MEMORY", 0)
    if request.param == "opt_einsum":
        monkeypatch.setattr(path, "EXACT", 1)
    path.cheapest_chain.cache_clear()
    yield
    path.cheapest_chain.cache_clear()


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_equal_their_convolution(format: str, spatial: int) -> None:
    torch.manual_seed(0)
    network = tensor_network(format, (8, 4, 3, 2, 3)[: 2 + spatial], rank=2)
    for geometry in GEOMETRIES.values() if spatial == 2 else ({}, *list(GEOMETRIES.values())[1:4:2] * (spatial > 0)):
        cut = {name: value[:spatial] if isinstance(value, tuple) else value for name, value in geometry.items()}
        at = {name: value if name == "groups" else _each(value, spatial) for name, value in cut.items() if name in AT}
        assert_equal_to_dense(network, cut.get("padding", 0), cut.get("mode", "zeros"), **at)


AT = ("stride", "dilation", "groups")


def _each(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else value


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("network", [ODD, SHARED], ids=["odd", "shared"])
def test_networks_of_no_name_equal_their_convolution(network: TensorNetwork, geometry: str) -> None:
    torch.manual_seed(0)
    at = {name: value for name, value in GEOMETRIES[geometry].items() if name in AT}
    at = {name: value if name == "groups" else _each(value, 3)[:2] for name, value in at.items()}
    if "groups" in at:
        at["groups"] = 2
    padding = GEOMETRIES[geometry].get("padding", 0)
    padding = padding[:2] if isinstance(padding, tuple) else padding
    assert_equal_to_dense(network, padding, GEOMETRIES[geometry].get("mode", "zeros"), **at)


@st.composite
def networks(draw: st.DrawFn) -> TensorNetwork:
    """Any network: each index in one core or more, sizes of one among them."""
    kernel = "hwd"[: draw(st.integers(0, 2))]
    inputs, outputs = "ij"[: draw(st.integers(1, 2))], "op"[: draw(st.integers(1, 2))]
    bonds = "abcd"[: draw(st.integers(0, 4))]
    labels = inputs + outputs + kernel + bonds
    count = draw(st.integers(1, 5))
    homes = [draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=3)) for _ in labels]
    cores = ["".join(label for label, home in zip(labels, homes, strict=True) if n in home) for n in range(count)]
    dims = {label: draw(st.integers(1, 3)) for label in labels}
    return TensorNetwork([core for core in cores if core], dims, inputs=inputs, outputs=outputs, kernel=kernel)


@settings(deadline=None, max_examples=60)
@given(
    networks(),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from([0, 50]),
    st.sampled_from([1, 8]),
)
def test_any_network_equals_its_convolution(
    network: TensorNetwork, stride: int, dilation: int, padding: int, memory: int, exact: int
) -> None:
    torch.manual_seed(0)
    spatial = len(network.kernel)
    at = {"stride": (stride,) * spatial, "dilation": (dilation,) * spatial} if spatial else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "MEMORY", memory)
        patch.setattr(path, "EXACT", exact)
        path.cheapest_chain.cache_clear()
        try:
            assert_equal_to_dense(network, padding if spatial else 0, **at)
        finally:
            path.cheapest_chain.cache_clear()


@pytest.mark.parametrize("groups", [2, 3, 4, 6, 12])
def test_groups_are_whole_output_indices_or_divide_one(groups: int) -> None:
    torch.manual_seed(0)
    dims = {"o": 2, "p": 6, "i": 3, "h": 3, "w": 3, "r": 4}
    network = TensorNetwork(["or", "pr", "irh", "wr"], dims, inputs="i", outputs="op", kernel="hw")
    if groups == 3:
        with pytest.raises(ValueError, match=r"groups must part the outputs, of sizes \[2, 6\], .* got 3"):
            Contraction(network, groups=groups)
    else:
        assert_equal_to_dense(network, 1, groups=groups, stride=(1, 2))


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    network = tensor_network("cp", (3, 2, 3, 2), rank=2)
    cores, contraction = random_cores(network), Contraction(network, stride=2)
    input = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *cores: contraction(x, cores, 1), (input, *cores))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_single_precision_takes_its_own_kernels(format: str, spatial: int) -> None:
    torch.manual_seed(0)
    network = tensor_network(format, (24, 16, 3, 3, 3)[: 2 + spatial], rank=3)
    cores = random_cores(network, torch.float32)
    input = torch.randn(2, 16, *SIZES[:spatial], requires_grad=True)
    found = Contraction(network)(input, cores, 1)
    expected = dense(network, input, cores, None, 1, "zeros")
    cotangent = torch.randn_like(expected)
    for one, other in zip(
        (found, *torch.autograd.grad(found, [input, *cores], cotangent)),
        (expected, *torch.autograd.grad(expected, [input, *cores], cotangent)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max().detach()))


# ------------------------------------------------------------------------------------------------------------- path


def all_chains(cores: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Every order of products of cores, the products themselves in one order alone."""
    if not cores:
        yield ()
    for size in range(1, len(cores) + 1):
        for chosen in itertools.combinations(cores, size):
            product: Any = chosen[0]
            for core in chosen[1:]:
                product = (product, core)
            for rest in all_chains(tuple(core for core in cores if core not in chosen)):
                yield (product, *rest)


@pytest.mark.parametrize("memory", [0, 50])
@pytest.mark.parametrize("network", [CP, tensor_network("tensor_train", (6, 5, 3, 3), rank=4), ODD, SHARED], ids=str)
def test_no_chain_is_cheaper(network: TensorNetwork, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "MEMORY", memory)
    monkeypatch.setattr(path, "POSITIONS", 10**12)  # products of cores cost nothing, whatever their order
    path.cheapest_chain.cache_clear()
    problem = operands(network, (2, 1), (1, 1), 1)
    search = path._Search(problem)
    chain, cost = path.cheapest_chain(problem)
    path.cheapest_chain.cache_clear()
    count = len(network.cores)
    others = []
    for other in all_chains(tuple(range(count))):
        whole = all(search.convolves_whole(path._cores_of(tree)) for tree in other)
        if whole and (len(other) > 1 or count == 1):
            others.append(search.cost(other).total)
    assert len(chain) > 1
    assert cost.total == pytest.approx(min(others), rel=1e-9)


def test_multiplications_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canonical: R (I s + k + O); Tucker: I q s + q p k + p O; counted for one position of the output."""
    cp = Contraction(tensor_network("cp", (64, 32, 3, 3), rank=20))
    assert cp.multiplications == 20 * (32 + 9 + 64)
    assert (cp.products, cp.building) == (20 * 9, 20 * (64 * 3 + 32 * 3 + 64 * 32 * 9))
    tucker = Contraction(tensor_network("tucker2", (64, 32, 3, 3), rank=(12, 8)))
    assert tucker.multiplications == 32 * 8 + 8 * 12 * 9 + 12 * 64
    assert tucker.dense_multiplications == 64 * 32 * 9
    assert Contraction(tensor_network("cp", (64, 32), rank=5)).multiplications == 5 * 96
    monkeypatch.setattr(path, "MEMORY", 0)
    path.cheapest_chain.cache_clear()
    cp = Contraction(tensor_network("cp", (64, 32, 3, 5), rank=20), stride=(2, 3))
    assert cp.multiplications == 20 * (32 * 6 + 5 * 2 + 3 + 64), "the axis of the longer stride first"
    path.cheapest_chain.cache_clear()


@pytest.mark.parametrize("format", ["tucker2", "tensor_train", "block_term", "hierarchical_tucker"])
def test_multiplications_are_those_that_torch_counts(format: str) -> None:
    network = tensor_network(format, (32, 48, 3, 3), budget=0.1)
    contraction = Contraction(network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contraction(torch.randn(2, 48, 6, 7), random_cores(network, torch.float32), 1)
    assert counter.get_total_flops() == 2 * (2 * 6 * 7 * contraction.multiplications + contraction.products)


def test_kernels_are_split_where_that_is_cheaper_only() -> None:
    """Depthwise 3 x 3 convolutions are bound by memory: two of 3 x 1 and 1 x 3 would take longer."""
    small, large = (Contraction(tensor_network("cp", (64, 64, size, size), rank=16)) for size in (3, 15))
    assert [type(step).__name__ for step in small._steps] == ["Linear", "Convolution", "Linear"]
    assert [type(step).__name__ for step in large._steps] == ["Linear", "Convolution", "Convolution", "Linear"]
    assert large.products == 0


def test_many_cores_are_searched_by_opt_einsum_and_cost_no_less() -> None:
    network = tensor_network("tensor_ring", (16, 16, 3, 3), rank=2)
    problem = operands(network, (1, 1), (1, 1), 1)
    search = path._Search(problem)
    exact = search.cost(search.exact_chain()).total
    proposed = [search.cost(chain).total for chain in search.proposed_chains()]
    assert exact <= min(proposed) <= 3 * exact
    weights = [search.tree_products(tree) for tree in search.proposed_weights()]
    assert search.product(search.all)[0] <= weights[0]


def test_long_chains_of_cores_are_found_at_once() -> None:
    """A train of 16 cores: 3^16 steps would take minutes."""
    bonds = "abcefgjklmnqstu"
    cores, dims = ["ia"], {"i": 4, "o": 4, "h": 3, "w": 3, **dict.fromkeys(bonds, 2)}
    for before, after in itertools.pairwise(bonds):
        cores.append(before + after)
    cores[5] += "h"
    cores[9] += "w"
    cores.append("uo")
    network = TensorNetwork(cores, dims, inputs="i", outputs="o", kernel="hw")
    torch.manual_seed(0)
    assert len(network.cores) == 16
    assert_equal_to_dense(network, 1, tol=1e-11)


def test_auto_prefers_the_weight_where_it_multiplies_less() -> None:
    assert Contraction(tensor_network("cp", (128, 128, 3, 3), budget=0.1)).cheaper
    assert not Contraction(tensor_network("cp", (128, 128, 3, 3), budget=1.0)).cheaper
    assert Contraction(tensor_network("cp", (512, 512), budget=0.5)).cheaper


# ---------------------------------------------------------------------------------------------------------- running


def test_weight_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorNetwork, "weight", lambda *_: pytest.fail("the weight was built"))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, Tensor) else 0)
            return result

    for format in ("cp", "tucker2", "tensor_train", "hierarchical_tucker", "block_term"):
        network = tensor_network(format, (64, 64, 3, 3), budget=0.1)
        cores = random_cores(network, torch.float32)
        with Sizes():
            Contraction(network)(torch.randn(1, 64, 4, 4), cores, 1)
    assert largest <= 64 * 64


def test_depthwise_for_canonical_networks() -> None:
    _, depthwise, _ = Contraction(tensor_network("cp", (128, 128, 3, 3), rank=56))._steps
    assert isinstance(depthwise, steps.Convolution)
    assert (math.prod(depthwise.groups), depthwise.features) == (56, (1, 1))


@pytest.mark.parametrize("format", FORMATS)
def test_no_images(format: str) -> None:
    network = tensor_network(format, (8, 4, 3, 3), rank=2)
    for dtype in (torch.float32, torch.float64):
        output = Contraction(network)(torch.empty(0, 4, 6, 6, dtype=dtype), random_cores(network, dtype), 1)
        assert output.shape == (0, 8, 6, 6)


def test_one_image_and_any_number_of_rows() -> None:
    torch.manual_seed(0)
    cores, input = random_cores(CP), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    contraction = Contraction(CP)
    torch.testing.assert_close(contraction(input[0], cores), contraction(input, cores)[0])
    network = tensor_network("tucker2", (6, 5), rank=3)
    cores, linear = random_cores(network), Contraction(network)
    for lead in ((), (3,), (2, 3), (1, 2, 1, 3), (2, 1, 1, 2, 1)):
        rows = torch.randn(*lead, 5, dtype=torch.float64)
        torch.testing.assert_close(linear(rows, cores), rows @ network.weight(cores).mT)


@pytest.mark.parametrize("format", ["cp", "tucker2", "block_term"])
def test_autocast(format: str) -> None:
    torch.manual_seed(0)
    network = tensor_network(format, (24, 16, 3, 3), rank=4)
    cores, input = random_cores(network, torch.float32), torch.randn(2, 16, 6, 6)
    contraction, bias = Contraction(network), torch.randn(24)
    expected = contraction(input, cores, 1, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = contraction(input, cores, 1, bias=bias)
    assert output.dtype == torch.bfloat16
    assert float((output - expected).detach().norm() / expected.detach().norm()) < 0.03


def test_copies() -> None:
    torch.manual_seed(0)
    cores, input = random_cores(CP), torch.randn(1, 16, 5, 6, dtype=torch.float64)
    contraction = Contraction(CP, stride=2)
    for other in (copy.deepcopy(contraction), pickle.loads(pickle.dumps(contraction))):
        assert torch.equal(other(input, cores), contraction(input, cores))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, "stride must be a positive integer, or 2 of them, got 0"),
        ({"stride": (1, 2, 3)}, r"stride must be a positive integer, or 2 of them, got \(1, 2, 3\)"),
        ({"dilation": (1, 0)}, "dilation must be a positive"),
        ({"groups": 0}, "groups must be a positive"),
        ({"groups": 5}, r"groups must part the outputs, of sizes \[24\], .* got 5"),
    ],
)
def test_wrong_geometry(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Contraction(CP, **arguments)


@pytest.mark.parametrize(
    ("shape", "padding", "message"),
    [
        ((2, 15, 6, 6), 0, r"input must have 16 channels, got shape \(2, 15, 6, 6\)"),
        ((16, 6), 0, r"input must have 3 or 4 dimensions, got \(16, 6\)"),
        ((2, 16, 6, 6), (1, 1, 1), r"padding must be 'same', 'valid', a non-negative integer or 2 of them"),
        ((2, 16, 6, 6), -1, "padding must be .* got -1"),
        ((2, 16, 6, 6), "full", "padding must be .* got 'full'"),
    ],
)
def test_wrong_call(shape: tuple[int, ...], padding: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Contraction(CP)(torch.randn(shape), random_cores(CP, torch.float32), padding)
