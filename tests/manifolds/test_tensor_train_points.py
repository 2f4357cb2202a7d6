"""Points of STTP and their matrices: spectrum, ranks, projections against tensorly and the bound of TT-SVD."""

import math

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train

from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Bounded
from retract.manifolds.tensor_train import STTP, prime_modes
from tests.manifolds.tensor_trains import SIZES, SPECTRA, ambient, draw, matrix, modes, tangent_space


def unfoldings(manifold, w):
    """Singular values of a matrix's unfolding at every bond, along the train."""
    sizes = (*manifold.out_modes, *reversed(manifold.in_modes))
    count = len(manifold.out_modes)
    tensor = w.reshape(*manifold.out_modes, *manifold.in_modes)
    tensor = tensor.permute(*range(count), *reversed(range(count, tensor.ndim)))
    splits = (tensor.reshape(math.prod(sizes[:k]), -1) for k in range(1, len(sizes)))
    return [torch.linalg.svdvals(split) for split in splits]


@settings(max_examples=25, deadline=None)
@given(
    out_modes=modes, in_modes=modes, cap=st.integers(1, 6), spectrum=st.sampled_from(SPECTRA), seed=st.integers(0, 999)
)
def test_points_are_matrices_of_their_spectrum_and_ranks(out_modes, in_modes, cap, spectrum, seed):
    manifold = STTP((out_modes, in_modes), cap, spectrum)
    x = draw(manifold, seed)
    w, middle = manifold.embed(x), len(out_modes)
    assert manifold.check_point_on_manifold(x, atol=1e-13, explain=True) == (True, None)
    r = manifold.center.rank
    torch.testing.assert_close(torch.linalg.svdvals(w)[:r], x[middle].sort(descending=True).values, atol=1e-13, rtol=0)
    if spectrum == "lipschitz":
        assert float(x[middle].amax()) == 1
    for values, rank in zip(unfoldings(manifold, w), manifold.ranks, strict=True):
        assert int((values > 1e-10 * values[0]).sum()) == rank
    for core, size in ((manifold.frames(x)[0], math.prod(out_modes)), (manifold.frames(x)[2], math.prod(in_modes))):
        assert core.shape == (size, r)
        torch.testing.assert_close(core.mT @ core, torch.eye(r, dtype=torch.float64), atol=1e-13, rtol=0)
    found = manifold.project(w)
    torch.testing.assert_close(manifold.embed(found), w, atol=1e-12, rtol=0)
    torch.testing.assert_close(manifold.embed(manifold.projx(x)), w, atol=1e-13, rtol=0)


def test_frames_are_orthonormal_in_single_precision():
    manifold = STTP((prime_modes(128), (*prime_modes(512), 3, 3)), 128)
    _, _, v = manifold.frames(manifold.random(generator=torch.Generator().manual_seed(0)))
    assert v.shape == (4608, 128)
    assert (v.mT @ v - torch.eye(128)).abs().max() <= 5e-6


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("shape", "ranks"), SIZES)
def test_origin_and_random_have_the_full_ranks(shape, ranks, spectrum):
    manifold = STTP(shape, ranks, spectrum)
    random = manifold.random(dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x in (manifold.origin(dtype=torch.float64), random):
        assert manifold.check_point_on_manifold(x, atol=1e-13, explain=True) == (True, None)
        for values, rank in zip(unfoldings(manifold, manifold.embed(x)), manifold.ranks, strict=True):
            assert int((values > 1e-8 * values[0]).sum()) == rank
        for core in (*x[: len(shape[0]) - 1], *x[len(shape[0]) + 1 : -1]):
            if core.shape[0] == core.shape[1]:
                assert torch.equal(core, torch.eye(len(core), dtype=torch.float64))
        assert tangent_space(manifold, x).shape[1] == manifold.dimension()


def test_random_frames_are_uniform():
    manifold = STTP(((2, 2), (3,)), 2)
    generator = torch.Generator().manual_seed(0)
    left = torch.stack([manifold.frames(manifold.random(generator=generator))[0] for _ in range(3000)])
    assert left.mean(0).abs().max() < 0.04
    torch.testing.assert_close(left.square().mean(0), torch.full((4, 2), 0.25), atol=0.02, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    modes=st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple), cap=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_agrees_with_tensorly_where_one_side_is_one_mode(modes, cap, seed):
    """There TT-SVD from the left, with the values left in the last core, makes the same truncations."""
    manifold = STTP((modes, (7,)), cap)
    w = matrix(manifold, seed)
    ours = manifold.embed(manifold.project(w))
    with tl.backend_context("pytorch"):
        theirs = tensor_train(w.reshape(*modes, 7), [1, *manifold.ranks, 1])
        torch.testing.assert_close(ours, theirs.to_tensor().reshape(w.shape), atol=1e-12, rtol=0)
    flipped = STTP(((7,), tuple(modes)), manifold.ranks[::-1])
    assert torch.linalg.vector_norm(flipped.embed(flipped.project(w.mT)).mT - ours) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(out_modes=modes, in_modes=modes, cap=st.integers(1, 3), seed=st.integers(0, 99))
def test_projection_is_as_near_as_tt_svd_promises(out_modes, in_modes, cap, seed):
    """error² <= sum over bonds of what each bond alone must lose; none loses more than the best train does."""
    manifold = STTP((out_modes, in_modes), cap)
    w = matrix(manifold, seed)
    error = float(torch.linalg.vector_norm(manifold.embed(manifold.project(w)) - w))
    pairs = zip(unfoldings(manifold, w), manifold.ranks, strict=True)
    lost = torch.stack([values[rank:].square().sum() for values, rank in pairs])
    assert error <= math.sqrt(float(lost.sum())) + 1e-12
    assert error <= math.sqrt(len(lost)) * math.sqrt(float(lost.max())) + 1e-12
    assert error >= math.sqrt(float(lost.max())) - 1e-12


@pytest.mark.parametrize("spectrum", ["free", "identity", "lipschitz", Bounded(0.3, 0.8)])
def test_projx_keeps_the_matrix_of_arbitrary_factors(spectrum):
    manifold = STTP(((2, 3, 2), (2, 2, 2)), 3, spectrum)
    factors = ambient(manifold, 3)
    point = manifold.projx(factors)
    assert manifold.check_point_on_manifold(point, atol=1e-12, explain=True) == (True, None)
    expected = manifold.center.embed(SVDSpectral(3, spectrum).project(manifold.embed(factors)))
    torch.testing.assert_close(manifold.embed(point), expected, atol=1e-10, rtol=0)
    x = draw(manifold)
    torch.testing.assert_close(manifold.projx(x)[:2], x[:2], atol=1e-13, rtol=0)  # outer cores stay


def test_rank_deficient_targets():
    manifold = STTP(((2, 3, 2), (2, 2, 2)), 4)
    zero = manifold.project(torch.zeros(12, 8, dtype=torch.float64))
    one = manifold.project(torch.ones(12, 8, dtype=torch.float64))
    for x, w in ((zero, 0.0), (one, 1.0)):
        assert manifold.check_point_on_manifold(x, atol=1e-12, explain=True) == (True, None)
        torch.testing.assert_close(manifold.embed(x), torch.full((12, 8), w).double(), atol=1e-13, rtol=0)
    kernel = matrix(manifold, 0)
    torch.testing.assert_close(manifold.project(kernel.reshape(12, 2, 2, 2)), manifold.project(kernel))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded(dtype):
    manifold = STTP(((2, 2, 3), (2, 3, 2)), 3)
    x, egrad = draw(manifold, dtype=torch.float32), ambient(manifold, 1, dtype)
    x = tuple(t.to(dtype) for t in x)
    wide, gradient = tuple(t.float() for t in x), tuple(t.float() for t in egrad)
    u = tuple(t.to(dtype) for t in manifold.proju(wide, gradient))
    y = manifold.retr(x, u)
    assert manifold.check_vector_on_tangent(x, u, explain=True) == (True, None)
    step, target = tuple(t.float() for t in u), tuple(t.float() for t in y)
    for half, full in (
        (manifold.egrad2rgrad(x, egrad), manifold.egrad2rgrad(wide, gradient)),
        (manifold.retr(x, u), manifold.retr(wide, step)),
        (manifold.transp(x, y, u), manifold.transp(wide, target, step)),
        (manifold.projx(x), manifold.projx(wide)),
        (
            manifold.tangent(x, matrix(manifold, 2).to(dtype)),
            manifold.tangent(wide, matrix(manifold, 2).to(dtype).float()),
        ),
        ((manifold.embed(x),), (manifold.embed(wide),)),
        (manifold.project(manifold.embed(x)), manifold.project(manifold.embed(x).float())),
    ):
        for a, b in zip(half, full, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b.to(dtype))
    for x in (manifold.random(dtype=dtype), manifold.origin(dtype=dtype)):
        assert {t.dtype for t in x} == {dtype}
        assert manifold.check_point_on_manifold(x, explain=True) == (True, None)
