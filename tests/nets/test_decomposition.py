"""Weights to tensor networks: errors that are reached, weights that are recovered, and tensorly beside."""

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker, tensor_train, tucker

from retract.nets.init._blocks import block_spaces
from retract.nets.init.decomposition import decompose
from retract.nets.layers._tensor_ranks import count_parameters
from retract.nets.layers.tensor_formats import FORMATS, tensor_network

NESTED = ["tucker2", "tucker", "tensor_train", "tt_matrix", "hierarchical_tucker"]
SEARCHED = ["cp", "tensor_ring", "block_term"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_weight(shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def decaying_weight(shape, power=1.0, seed=0):
    """As trained weights are: along every mode the principal components decay, by a power of their number."""
    weight = random_weight(shape, seed)
    for size in shape:
        scales = torch.arange(1, size + 1, dtype=torch.float64) ** -power
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator(seed + size), dtype=torch.float64)).Q
        weight = torch.tensordot(weight, scales[:, None] * turn, ([0], [0]))
    return weight


def weight_of(network, seed=0):
    source = generator(seed)
    cores = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in network.core_shapes]
    return network.weight(cores)


def error_of(weight, result):
    built = result.network.weight([core.double() for core in result.cores])
    return float((built - weight).norm() / weight.norm())


def check(weight, result):
    """What holds for every result."""
    result.network.check_cores(result.cores)
    assert result.network.weight_shape == tuple(weight.shape)
    assert result.error == pytest.approx(error_of(weight.double(), result), rel=1e-6, abs=1e-12)
    assert all(core.dtype == weight.dtype for core in result.cores)
    norms = torch.stack([core.double().norm() for core in result.cores])
    torch.testing.assert_close(
        norms, norms.mean().expand_as(norms), rtol=1e-2 if weight.dtype.itemsize == 2 else 1e-5, atol=0
    )


# ------------------------------------------------------------------------------------------------- reaching an error


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (9, 6), (6, 5, 4), (4, 3, 3, 2, 2), (7, 1, 3, 3), (1, 11, 1, 1)])
@pytest.mark.parametrize("kind", [random_weight, decaying_weight])
def test_an_error_is_reached(format, shape, kind):
    weight = kind(shape)
    for error in (0.3,) if format in SEARCHED else (0.5, 0.2, 0.05, 1e-3, 1e-9):
        result = decompose(weight, format, error=error)
        check(weight, result)
        assert result.error <= error


@pytest.mark.parametrize("format", NESTED)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_an_error_is_reached_for_any_shape(format, data):
    kernel = data.draw(st.integers(0, 3))
    shape = data.draw(st.tuples(st.integers(1, 13), st.integers(1, 13), *[st.integers(1, 4)] * kernel))
    error = data.draw(st.floats(1e-8, 0.9))
    weight = decaying_weight(shape, data.draw(st.floats(0.0, 3.0)), data.draw(st.integers(0, 100)))
    result = decompose(weight, format, error=error)
    check(weight, result)
    assert result.error <= error


@pytest.mark.parametrize("format", FORMATS)
def test_parameters_fall_as_the_error_rises(format):
    weight = decaying_weight((8, 6, 4) if format in SEARCHED else (12, 10, 3, 3), 1.5)
    counts = [decompose(weight, format, error=error).network.parameters for error in (0.02, 0.1, 0.3, 0.6)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 2 * counts[-1]


@pytest.mark.parametrize("format", NESTED)
def test_no_smaller_ranks_have_the_error_by_much(format):
    # Any one rank less, of those that can be lowered alone, and the error is missed, or nearly so.
    error, weight = 0.15, decaying_weight((20, 16, 3, 3))
    network = decompose(weight, format, error=error).network
    ranks = [network.dims[bond] for bond in network.bonds]
    for position, rank in enumerate(ranks):
        fewer = [rank - 1 if other == position else one for other, one in enumerate(ranks)]
        if rank == 1 or (format == "hierarchical_tucker" and network.bonds[position] in "stuv"):
            continue
        assert decompose(weight, format, rank=fewer).error > 0.93 * error


def test_full_ranks_are_exact():
    for format in NESTED:
        weight = random_weight((6, 5, 3, 3))
        result = decompose(weight, format, rank=1000)
        assert result.error < 1e-13


# --------------------------------------------------------------------------------------------------------- recovery

RECOVERED = {
    "cp": 4,
    "tucker2": (5, 4),
    "tucker": (5, 4, 2, 3),
    "tensor_train": (4, 6, 5),
    "tt_matrix": (4, 6, 3),
    "tensor_ring": 2,
    "block_term": (3, 3, 2),
    "hierarchical_tucker": (4, 5, 2, 3, 4, 4),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_of_the_format_are_recovered(format, seed):
    network = tensor_network(format, (12, 10, 3, 3), rank=RECOVERED[format])
    weight = weight_of(network, seed)
    ranks = [network.dims[bond] for bond in network.bonds]
    result = decompose(weight, format, rank=ranks)
    check(weight, result)
    assert result.error < (1e-7 if format == "cp" else 1e-9)  # cp has a ridge of 1e-9


@pytest.mark.parametrize("format", FORMATS)
def test_the_ranks_of_such_weights_are_found(format):
    # The search goes through ranks that are in proportion, so for blocks half as many as their rank.
    ranks = (2, 4, 4) if format == "block_term" else RECOVERED[format]
    network = tensor_network(format, (12, 10, 3, 3), rank=ranks)
    result = decompose(weight_of(network), format, error=1e-6)
    assert result.error <= 1e-6
    assert result.network == network


@pytest.mark.parametrize("format", ["tucker2", "tucker", "tensor_train", "hierarchical_tucker", "cp"])
def test_a_matrix_is_cut_at_its_singular_values(format):
    # Eckart and Young: for a linear layer all these formats are the truncated decomposition.
    weight = decaying_weight((14, 11))
    values = torch.linalg.svdvals(weight)
    for rank in (1, 3, 7):
        best = float(values[rank:].norm() / values.norm())
        assert decompose(weight, format, rank=rank).error == pytest.approx(best, rel=1e-6)
        result = decompose(weight, format, error=best * (1 + 1e-6))
        assert {result.network.dims[bond] for bond in result.network.bonds} == {rank}


@given(
    blocks=st.integers(2, 4), p=st.integers(1, 3), q=st.integers(1, 3), taps=st.integers(3, 6), seed=st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_spaces_of_blocks(blocks, p, q, taps, seed):
    if taps < 2 * max(p, q) / min(p, q) + 1:
        return  # too few slices to tell the blocks apart
    source = generator(seed)
    left = torch.randn(blocks, 13, p, generator=source, dtype=torch.float64)
    right = torch.randn(blocks, 12, q, generator=source, dtype=torch.float64)
    core = torch.randn(blocks, p, q, taps, generator=source, dtype=torch.float64)
    weight = torch.einsum("bop,biq,bpqh->oih", left, right, core)
    for true, found in zip((left, right), block_spaces(weight, blocks, p, q), strict=True):
        bases = torch.linalg.qr(true).Q
        cosines = torch.linalg.svdvals(bases.mT[:, None] @ found[None])[..., -1]
        assert (cosines.amax(1) > 1 - 1e-6).all()  # each space is one of those found


# ------------------------------------------------------------------------------------------------------ other libraries


@pytest.fixture
def numpy_backend():
    """Tltorch, where it has been imported, leaves tensorly at another one."""
    with tensorly.backend_context("numpy"):
        yield


@pytest.mark.usefixtures("numpy_backend")
def test_trains_are_those_of_tensorly():
    weight = decaying_weight((12, 10, 3, 3))
    result = decompose(weight, "tensor_train", rank=(5, 6, 4))
    train = tensor_train(weight.permute(1, 2, 3, 0).numpy(), [1, 5, 6, 4, 1])
    theirs = torch.from_numpy(tensorly.tt_to_tensor(train)).permute(3, 0, 1, 2)
    ours = result.network.weight(result.cores)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("numpy_backend")
def test_tucker_is_that_of_tensorly():
    weight = decaying_weight((12, 10, 3, 3))
    result = decompose(weight, "tucker", rank=(5, 4, 2, 2))
    theirs = tensorly.tucker_to_tensor(tucker(weight.numpy(), [5, 4, 2, 2]))
    torch.testing.assert_close(result.network.weight(result.cores), torch.from_numpy(theirs), rtol=1e-8, atol=1e-10)
    result = decompose(weight, "tucker2", rank=(5, 4))
    (core, (left, right)), _ = partial_tucker(weight.numpy(), [5, 4], modes=[0, 1])
    theirs = torch.einsum("op,iq,pqhw->oihw", *map(torch.from_numpy, (left, right, core)))
    torch.testing.assert_close(result.network.weight(result.cores), theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("format", FORMATS)
def test_the_backend_of_tensorly_is_left_as_it_was(format):
    weight = decaying_weight((8, 6, 3, 3))
    expected = decompose(weight, format, rank=2)
    before = tensorly.get_backend()
    try:
        tensorly.set_backend("pytorch")
        result = decompose(weight, format, rank=2)
        assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend(before)
    assert result.error == pytest.approx(expected.error, rel=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_results_repeat_and_leave_the_random_state(format):
    weight = decaying_weight((8, 6, 3, 3))
    torch.manual_seed(3)
    first = decompose(weight, format, rank=2)
    assert torch.initial_seed() == 3 and torch.equal(torch.rand(3), torch.rand(3, generator=generator(3)))
    second = decompose(weight, format, rank=2)
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))


# -------------------------------------------------------------------------------------------------- budgets, precision


@pytest.mark.parametrize("format", FORMATS)
def test_a_budget_gives_the_network_of_the_format(format):
    weight = decaying_weight((12, 8, 3), 2.0).requires_grad_()
    result = decompose(weight, format, budget=0.3)
    assert result.network == tensor_network(format, weight.shape, budget=0.3)
    assert result.network.parameters == count_parameters(result.network.cores, result.network.dims)
    assert result.error < 0.6 and not any(core.requires_grad for core in result.cores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_cores_have_the_dtype_of_the_weight(format, dtype):
    weight = decaying_weight((6, 4, 3)).to(dtype)
    result = decompose(weight, format, error=0.2)
    check(weight, result)
    assert result.error < 0.2 + 4 * torch.finfo(dtype).eps


def test_modes_are_passed_on():
    result = decompose(random_weight((12, 8, 3)), "tt_matrix", rank=2, out_modes=(4, 3), in_modes=(2, 4))
    assert [result.network.dims[label] for label in "xyij"] == [4, 3, 2, 4]


def test_scales_that_squares_would_lose():
    for scale in (1e-160, 1e160):
        result = decompose(scale * decaying_weight((8, 6, 3, 3)), "tensor_train", error=0.1)
        assert result.error <= 0.1


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "one of rank, budget and error"),
        ({"rank": 1, "error": 0.1}, ValueError, "one of rank, budget and error"),
        ({"error": 0.0}, ValueError, r"error must be.*\(0, 1\), got 0.0"),
        ({"error": 1.0}, ValueError, r"\(0, 1\), got 1.0"),
        ({"error": float("nan")}, ValueError, "got nan"),
        ({"error": "small"}, TypeError, "error must be a number"),
        ({"rank": (9, 9, 1)}, ValueError, "rank must be at most"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 1, "format": "qr"}, ValueError, "format must be one of"),
        ({"rank": 1, "weight": torch.zeros(4, 3, 3)}, ValueError, "zero everywhere"),
        ({"rank": 1, "weight": torch.full((4, 3, 3), torch.nan)}, ValueError, "finite"),
        ({"rank": 1, "weight": torch.ones(4, 3, 3, dtype=torch.int64)}, TypeError, "floating-point.*int64"),
        ({"rank": 1, "weight": torch.ones(4, 3, 3, dtype=torch.complex64)}, TypeError, "real.*complex64"),
        ({"rank": 1, "weight": [[1.0]]}, TypeError, "tensor.*list"),
        ({"rank": 1, "weight": torch.ones(4)}, ValueError, "shape must be"),
        ({"rank": 1, "weight": torch.ones(4, 0)}, ValueError, "zero everywhere|shape must be"),
    ],
)
def test_bad_arguments(arguments, error, match):
    arguments = {"weight": random_weight((4, 3, 3)), "format": "tucker"} | arguments
    with pytest.raises(error, match=match):
        decompose(**arguments)
