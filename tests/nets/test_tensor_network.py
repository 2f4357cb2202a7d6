"""Tensor networks as specifications: what they hold, what they refuse, and the weight against einsum."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.nets.layers.tensor_network import TensorNetwork

CP = ["or", "ir", "hr", "wr"]
DIMS = {"o": 4, "i": 3, "h": 3, "w": 2, "r": 5}


def cp(**changes):
    return TensorNetwork(CP, DIMS | changes, inputs="i", outputs="o", kernel="hw")


def random_cores(network, **options):
    return [torch.randn(shape, dtype=torch.float64, **options) for shape in network.core_shapes]


# ------------------------------------------------------------------------------------------------------------ attribute


def test_sizes_of_the_canonical_form():
    network = cp()
    assert network.cores == tuple(CP)
    assert network.dims == DIMS
    assert network.bonds == "r" and network.bond_product == 5  # a hyperedge of degree four, once
    assert network.core_shapes == ((4, 5), (3, 5), (3, 5), (2, 5))
    assert network.weight_shape == (4, 3, 3, 2)
    assert (network.in_features, network.out_features, network.kernel_size) == (3, 4, (3, 2))
    assert network.parameters == 60
    assert network.equation == "or,ir,hr,wr->oihw"
    assert str(network) == "or,ir,hr,wr -> o i hw (r=5)"
    assert len(repr(network)) < 150 and eval(repr(network)) == network


def test_bonds_are_counted_once_whatever_their_degree():
    # A hyperedge of three cores (a), bonds of two, and a dangling one (y).
    dims = {"i": 2, "h": 3, "w": 3, "o": 4, "x": 2, "a": 5, "b": 2, "c": 3, "d": 2, "e": 3, "y": 7}
    network = TensorNetwork(["iab", "hacx", "wbcd", "oade", "exy"], dims, inputs="i", outputs="o", kernel="hw")
    assert sorted(network.bonds) == sorted("abcdexy")
    assert network.bond_product == 5 * 2 * 3 * 2 * 3 * 2 * 7


def test_several_modes_multiply_row_major():
    network = TensorNetwork(["xia", "yja"], {"x": 2, "y": 3, "i": 5, "j": 2, "a": 4}, inputs="ij", outputs="xy")
    assert network.weight_shape == (6, 10) and network.kernel_size == ()
    first, second = random_cores(network)
    weight = network.weight([first, second])
    assert torch.allclose(weight[1 * 3 + 2, 3 * 2 + 1], (first[1, 3] * second[2, 1]).sum())


def test_networks_are_values():
    network = cp()
    reordered = TensorNetwork(CP, dict(reversed(DIMS.items())), inputs="i", outputs="o", kernel="hw")
    assert network == reordered and hash(network) == hash(reordered)
    assert network != cp(r=6) and network != TensorNetwork(CP, DIMS, inputs="o", outputs="i", kernel="hw")
    assert len({network, reordered, cp(r=6)}) == 2
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin == network and twin.dims == DIMS
        cores = random_cores(network)
        assert torch.equal(twin.weight(cores), network.weight(cores))


def test_networks_cannot_be_changed():
    network = cp()
    with pytest.raises(AttributeError):
        network.inputs = "o"
    with pytest.raises(TypeError):
        network.dims["r"] = 2
    given = dict(DIMS)
    network = TensorNetwork(CP, given, inputs="i", outputs="o", kernel="hw")
    given["r"] = 1
    assert network.dims["r"] == 5


# ---------------------------------------------------------------------------------------------------------------- weigh

NETWORKS = {
    "cp": (CP, "i", "o", "hw"),
    "one core": (["oihw"], "i", "o", "hw"),
    "one core, transposed, dangling": (["hyiwo"], "i", "o", "hw"),
    "no kernel": (["op", "pq", "iq"], "i", "o", ""),
    "ring": (["ria", "ajb", "bhwc", "cxd", "dyr"], "ij", "xy", "hw"),
    "external index in two cores": (["oa", "oia", "hi"], "i", "o", "h"),
    "hyperedge and dangling bond": (["iab", "hacx", "wbcd", "oade", "exy"], "i", "o", "hw"),
    "no inputs: a depthwise convolution": (["or", "hr", "wr"], "", "o", "hw"),
    "unconnected": (["o", "i", "h"], "i", "o", "h"),
    "letters of other alphabets": (["oλ", "iλ", "éλ"], "i", "o", "é"),
}


@pytest.mark.parametrize("name", NETWORKS)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_weight_is_the_einsum(name, data):
    cores, inputs, outputs, kernel = NETWORKS[name]
    labels = dict.fromkeys("".join(cores))
    network = TensorNetwork(
        cores, {label: data.draw(st.integers(1, 4)) for label in labels}, inputs=inputs, outputs=outputs, kernel=kernel
    )
    tensors = random_cores(network, requires_grad=True)
    # einsum's interleaved form: indices as numbers, in one step.
    numbers = {label: number for number, label in enumerate(labels)}
    operands = [x for core, tensor in zip(cores, tensors, strict=True) for x in (tensor, [numbers[c] for c in core])]
    expected = torch.einsum(*operands, [numbers[label] for label in outputs + inputs + kernel])
    weight = network.weight(tensors)
    assert weight.shape == network.weight_shape
    torch.testing.assert_close(weight, expected.reshape(weight.shape), rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(weight)
    gradients = torch.autograd.grad(weight, tensors, cotangent)
    wanted = torch.autograd.grad(expected.reshape(weight.shape), tensors, cotangent)
    for gradient, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-12, atol=1e-12)


def test_weight_takes_the_cheap_path():
    # In one step of all cores this would take 10^10 products; along a path it takes 10^5.
    network = TensorNetwork(["ia", "ab", "bc", "cd", "do"], dict.fromkeys("iabcdo", 40), inputs="i", outputs="o")
    a, b, c, d, e = random_cores(network)
    torch.testing.assert_close(network.weight([a, b, c, d, e]), (a @ b @ c @ d @ e).mT, rtol=1e-10, atol=1e-8)


@pytest.mark.slow
def test_weight_compiles_without_a_break():
    network = cp()
    cores = random_cores(network)
    compiled = torch.compile(lambda *tensors: network.weight(tensors), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*cores), network.weight(cores))


def test_weight_in_half_precision_and_with_nan():
    network = cp()
    cores = [core.half() for core in random_cores(network)]
    assert network.weight(cores).dtype == torch.float16
    cores[0][2, 1] = float("nan")
    assert network.weight(cores).isnan().any(dim=(1, 2, 3)).tolist() == [False, False, True, False]


@pytest.mark.parametrize("wrong", [lambda cores: cores[:-1], lambda cores: [core.mT for core in cores], lambda _: []])
def test_cores_of_other_shapes_are_refused(wrong):
    network = cp()
    with pytest.raises(ValueError, match=r"or,ir,hr,wr.*must have shapes \(\(4, 5\)"):
        network.weight(wrong(random_cores(network)))
    network.check_cores(random_cores(network))


# ------------------------------------------------------------------------------------------------------------- bad inpu


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"cores": []}, ValueError, "got none"),
        ({"cores": ["or", "", "ir"]}, ValueError, "empty"),
        ({"cores": "or,ir"}, TypeError, "sequence of strings"),
        ({"cores": [("o", "r")]}, TypeError, "sequence of strings"),
        ({"cores": ["orr", *CP[1:]]}, ValueError, "'orr'.*'r'.*more than once"),
        ({"cores": ["o r", *CP[1:]]}, ValueError, "letters.*'o r'"),
        ({"cores": ["or,", *CP[1:]]}, ValueError, "letters.*'or,'"),
        ({"cores": CP[:-1], "dims": {k: v for k, v in DIMS.items() if k != "w"}}, ValueError, "kernel.*'w'.*no core"),
        ({"inputs": "ix"}, ValueError, "inputs.*'x'.*no core"),
        ({"outputs": "z"}, ValueError, "outputs.*'z'.*no core"),
        ({"outputs": "oi"}, ValueError, "'i' is in outputs and again in inputs|'i' is in inputs and again in outputs"),
        ({"kernel": "hwh"}, ValueError, "'h' is in kernel and again in kernel"),
        ({"inputs": None}, TypeError, "inputs must be a string"),
        ({"dims": {"o": 4}}, ValueError, "none for 'r'"),
        ({"dims": DIMS | {"z": 2}}, ValueError, "'z', which no core has"),
        ({"dims": DIMS | {"r": 0}}, ValueError, "at least 1, got 0 for index 'r'"),
        ({"dims": DIMS | {"r": -2}}, ValueError, "at least 1, got -2"),
        ({"dims": DIMS | {"r": 2.0}}, TypeError, "integers, got 2.0 for index 'r'"),
        ({"dims": DIMS | {"r": True}}, TypeError, "integers, got True"),
        ({"dims": [4, 3]}, TypeError, "must map"),
    ],
)
def test_bad_specifications(changes, error, match):
    arguments = {"cores": CP, "dims": DIMS, "inputs": "i", "outputs": "o", "kernel": "hw"} | changes
    with pytest.raises(error, match=match):
        TensorNetwork(**arguments)
