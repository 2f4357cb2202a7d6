"""Householder frames: the product of reflections, its precision, its memory, bad input."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from retract.manifolds.householder import householder_coordinates, householder_frame, num_coordinates
from tests.manifolds.householder_frames import (
    CHARTS,
    SHAPES,
    assert_close,
    batches,
    gradient_of,
    normal,
    orthonormality,
    random_coordinates,
    seeds,
    sequential,
    shapes,
)

# ------------------------------------------------------------------------------------------------------- the frame


@settings(max_examples=40, deadline=None)
@given(shape=shapes, reduced=st.booleans(), batch=batches, seed=seeds, scale=st.floats(-3, 4).map(lambda e: 10**e))
def test_is_the_product_of_reflections(shape, reduced, batch, seed, scale):
    n, p = shape
    coordinates = scale * random_coordinates(n, p, reduced, batch, seed)
    frame = householder_frame(coordinates, n, p, reduced=reduced)
    assert frame.shape == (*batch, n, p)
    assert frame.is_contiguous()
    assert orthonormality(frame) <= 1e-13
    for index in itertools.product(*map(range, batch)):
        assert_close(frame[index], sequential(coordinates[index], n, p, reduced))


@pytest.mark.parametrize("reduced", CHARTS)
def test_large_float32_frames_are_orthonormal(reduced):
    for seed, scale in ((0, 0.015), (1, 1.0)):
        coordinates = scale * random_coordinates(4608, 128, reduced, seed=seed, dtype=torch.float32)
        assert orthonormality(householder_frame(coordinates, 4608, 128, reduced=reduced)) <= 5e-6


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("reduced", CHARTS)
def test_zero_is_minus_the_identity(n, p, reduced):
    zero = torch.zeros(num_coordinates(n, p, reduced=reduced))
    assert torch.equal(householder_frame(zero, n, p, reduced=reduced), -torch.eye(n, p))


def test_square_frames_have_one_determinant():
    for p, seed in itertools.product((1, 2, 5), range(4)):
        frame = householder_frame(random_coordinates(p, p, seed=seed), p, p)
        assert_close(torch.linalg.det(frame), torch.tensor((-1.0) ** p, dtype=torch.float64))


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_reduced_frames_have_a_triangular_leading_block(n, p):
    frame = householder_frame(random_coordinates(n, p, True), n, p, reduced=True)
    assert torch.equal(frame[:p].tril(-1), torch.zeros(p, p, dtype=torch.float64))


@settings(max_examples=15, deadline=None)
@given(shape=shapes, reduced=st.booleans(), seed=seeds)
def test_as_many_coordinates_as_dimensions(shape, reduced, seed):
    """The Jacobian has full rank; so the count is the dimension of the Stiefel manifold, or the Grassmann manifold."""
    n, p = shape
    coordinates = random_coordinates(n, p, reduced, seed=seed)
    assume(coordinates.numel() > 0)
    assert coordinates.numel() == (p * (n - p) if reduced else n * p - p * (p + 1) // 2)
    jacobian = torch.func.jacrev(lambda c: householder_frame(c, n, p, reduced=reduced))(coordinates)
    assert torch.linalg.matrix_rank(jacobian.reshape(n * p, -1), rtol=1e-10) == coordinates.numel()


# ------------------------------------------------------------------------------------------------ precision, memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduced", CHARTS)
def test_half_precision_is_float32_rounded(dtype, reduced):
    coordinates = random_coordinates(20, 6, reduced, dtype=dtype)
    frame = householder_frame(coordinates, 20, 6, reduced=reduced)
    assert frame.dtype == dtype
    assert torch.equal(frame, householder_frame(coordinates.float(), 20, 6, reduced=reduced).to(dtype))
    assert gradient_of(lambda c: householder_frame(c, 20, 6, reduced=reduced), coordinates, frame).dtype == dtype
    if not reduced:
        back, signs = householder_coordinates(frame)
        assert back.dtype == signs.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(householder_frame(back, 20, 6) * signs, frame, atol=4 * eps, rtol=0)


@pytest.mark.parametrize("reduced", CHARTS)
def test_autocast_changes_nothing(reduced):
    coordinates = random_coordinates(30, 8, reduced, dtype=torch.float32).requires_grad_()
    weight = normal(30, 8, seed=1, dtype=torch.float32)

    def both(create_graph):
        frame = householder_frame(coordinates, 30, 8, reduced=reduced)
        return frame, *torch.autograd.grad(frame, coordinates, weight, create_graph=create_graph)

    for create_graph in (False, True):
        expected = both(create_graph)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = both(create_graph)
            coordinates_of_frame, _ = householder_coordinates(expected[0], reduced=reduced)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        assert coordinates_of_frame.dtype == torch.float32


def peak_memory(function):
    """Bytes that are allocated at once while it runs, temporaries within torch's operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del result
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("reduced", CHARTS)
def test_no_temporaries_of_the_frame_s_size(reduced):
    n, p = 4608, 64
    coordinates = random_coordinates(n, p, reduced, dtype=torch.float32).requires_grad_()
    weight, size = normal(n, p, seed=1, dtype=torch.float32), n * p * 4
    frame = householder_frame(coordinates, n, p, reduced=reduced)

    def backward(create_graph=False):
        return torch.autograd.grad(frame, coordinates, weight, retain_graph=True, create_graph=create_graph)

    assert size <= peak_memory(lambda: householder_frame(coordinates, n, p, reduced=reduced)) <= 1.2 * size
    assert 0.9 * size <= peak_memory(backward) <= 1.2 * size
    assert peak_memory(lambda: backward(create_graph=True)) <= 6 * size


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("n", "p"), [(3, 4), (3, 0), (0, 0)])
def test_shapes_that_are_no_frame(n, p):
    with pytest.raises(ValueError, match=f"1 <= p <= n, got n={n}, p={p}"):
        num_coordinates(n, p)
    with pytest.raises(ValueError, match=f"1 <= p <= n, got n={n}, p={p}"):
        householder_frame(torch.zeros(3), n, p)


def test_coordinates_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 9\) for the full chart of 5 x 3 frames, got \(6,\)"):
        householder_frame(torch.zeros(6), 5, 3)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 6\) for the reduced chart of 5 x 3 frames, got \(2, 9\)"):
        householder_frame(torch.zeros(2, 9), 5, 3, reduced=True)
    with pytest.raises(ValueError, match=r"got \(\)"):
        householder_frame(torch.tensor(0.0), 1, 1)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=f"real floating-point numbers, got dtype {dtype}"):
            householder_frame(torch.zeros(9, dtype=dtype), 5, 3)


def test_matrices_that_are_no_frame():
    with pytest.raises(ValueError, match=r"1 <= p <= n, got \(3, 5\)"):
        householder_coordinates(torch.eye(3, 5))
    with pytest.raises(ValueError, match=r"1 <= p <= n, got \(3,\)"):
        householder_coordinates(torch.ones(3))
    with pytest.raises(ValueError, match="orthonormal columns: UᵀU - I reaches 3"):
        householder_coordinates(2 * torch.eye(5, 3))
    with pytest.raises(ValueError, match="orthonormal columns: UᵀU - I reaches nan"):
        householder_coordinates(torch.full((5, 3), torch.nan))
    with pytest.raises(ValueError, match="upper triangular leading block: below its diagonal frame reaches 1"):
        householder_coordinates(torch.eye(5)[:, [1, 0, 2]], reduced=True)
    with pytest.raises(TypeError, match=r"got dtype torch\.int64"):
        householder_coordinates(torch.eye(5, 3, dtype=torch.int64))


def test_signs_that_are_none():
    with pytest.raises(ValueError, match=r"signs must be \+1, -1, or 0 for either, got \[0\.5, 1\.0\]"):
        householder_coordinates(torch.eye(5, 3), signs=torch.tensor([1, 0.5, 1]))
    with pytest.raises(ValueError, match=r"signs must broadcast to shape \(3,\), got \(2,\)"):
        householder_coordinates(torch.eye(5, 3), signs=torch.ones(2))


def test_nan_passes_through():
    coordinates = torch.zeros(num_coordinates(5, 3))
    coordinates[0] = torch.nan
    assert householder_frame(coordinates, 5, 3).isnan().any()
