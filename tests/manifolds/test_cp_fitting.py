"""Orthogonal terms and the power method: exact where they can be, no worse than tensorly's, errors that are met."""

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import CPPower

from retract.manifolds import cp_fitting
from retract.manifolds.cp_fitting import _renew, orthogonal_terms, power_method
from retract.manifolds.cp_terms import cp_gram, cp_tensor, degeneracy, khatri_rao

METHODS = [orthogonal_terms, power_method]


def relative_error(tensor, weights, factors):
    return float((tensor - cp_tensor(weights, factors)).norm() / tensor.norm())


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 9), st.sampled_from(METHODS))
def test_any_shape_and_rank_gives_unit_vectors_and_an_error_of_at_most_one(shape, rank, method):
    tensor = draw(*shape)
    weights, factors = method(tensor, rank=rank, generator=generator())
    assert weights.shape == (rank,) and [tuple(f.shape) for f in factors] == [(rank, d) for d in shape]
    for factor in factors:
        torch.testing.assert_close(factor.norm(dim=1), torch.ones(rank, dtype=torch.float64))
    for mode, factor in enumerate(factors):
        assert factor.shape[1] > 1 or (factor == 1).all() or (max(shape) == 1 and mode == 0)
    error = relative_error(tensor, weights, factors)
    assert error <= 1 + 1e-12
    if rank >= math.prod(shape) / max(shape):
        assert error < 1e-7


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.7, 0.95]),
    st.sampled_from(METHODS),
)
def test_every_error_is_met_with_no_more_terms_than_fibres(shape, error, method):
    tensor = draw(*shape)
    weights, factors = method(tensor, error=error, generator=generator())
    assert relative_error(tensor, weights, factors) <= error + 1e-7
    assert len(weights) <= math.prod(shape) // max(shape)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 1, 5), (1, 8, 1, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_terms_of_a_matrix_are_its_singular_triplets(shape, method):
    tensor = draw(*shape)
    u, s, vh = torch.linalg.svd(tensor.squeeze(), full_matrices=False)
    weights, factors = method(tensor, rank=3)
    torch.testing.assert_close(weights, s[:3])
    torch.testing.assert_close(cp_tensor(weights, factors).squeeze(), u[:, :3] * s[:3] @ vh[:3])
    needed, _ = method(tensor, error=float(s[2:].norm() / s.norm()) * 1.001)
    assert len(needed) == 2


def test_orthogonal_terms_are_orthogonal_and_their_errors_those_of_the_weights_left_out():
    tensor = draw(6, 5, 3, 2)
    weights, factors = orthogonal_terms(tensor, rank=30)
    torch.testing.assert_close(cp_gram(factors), torch.eye(30, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (weights.diff() <= 0).all() and (weights > 0).all()
    for rank in (1, 7, 20, 30):
        expected = float(weights[rank:].norm() / tensor.norm())
        assert relative_error(tensor, weights[:rank], [f[:rank] for f in factors]) == pytest.approx(expected, abs=1e-12)
    few, _ = orthogonal_terms(tensor, error=0.4)
    tails = weights.square().flip(0).cumsum(0).flip(0).sqrt() / tensor.norm()
    assert len(few) == int((tails > 0.4).sum())


def test_turned_slices_concentrate_what_separates():
    """A tensor of one kernel direction is a matrix times a vector: as few terms as the matrix has singular values."""
    matrix, kernel = draw(8, 2) @ draw(2, 6, seed=1), draw(3, seed=2)
    tensor = torch.einsum("oi,h,w->oihw", matrix, kernel, kernel)
    assert relative_error(tensor, *orthogonal_terms(tensor, rank=2)) < 1e-12


@pytest.mark.parametrize("shape", [(9, 7, 5), (16, 12, 3, 3), (6, 5, 4, 3, 3)])
def test_the_power_method_finds_orthogonal_terms_that_were_put_in(shape):
    rank = 3
    factors = [torch.linalg.qr(draw(d, d, seed=d)).Q[:rank] for d in shape]
    # Of equal weight: then nothing singles out the axes that orthogonal terms would have to be along.
    tensor = cp_tensor(torch.tensor([2.0, -2.0, 2.0], dtype=torch.float64), factors)
    assert relative_error(tensor, *orthogonal_terms(tensor, rank=rank)) > 0.1
    weights, found = power_method(tensor, rank=rank, generator=generator())
    torch.testing.assert_close(weights, torch.full((3,), 2.0, dtype=torch.float64))
    assert relative_error(tensor, weights, found) < 1e-7
    assert len(power_method(tensor, error=0.01, generator=generator())[0]) == rank


def test_errors_go_down_with_the_rank_and_ranks_up_with_the_precision():
    tensor = draw(24, 16, 3, 3)
    errors = [
        relative_error(tensor, *power_method(tensor, rank=rank, generator=generator())) for rank in (4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    ranks = [len(power_method(tensor, error=error, generator=generator())[0]) for error in (0.9, 0.8, 0.7)]
    assert ranks == sorted(ranks)
    assert ranks[-1] < len(orthogonal_terms(tensor, error=0.7)[0])


def test_rank_and_error_together_stop_at_the_first():
    tensor = draw(12, 8, 3, 3)
    assert len(power_method(tensor, rank=2, error=0.5, generator=generator())[0]) == 2
    by_error = power_method(tensor, error=0.8, generator=generator())[0]
    assert len(power_method(tensor, rank=70, error=0.8, generator=generator())[0]) == len(by_error) < 70


def test_it_is_no_worse_than_the_power_method_of_tensorly():
    tensor = draw(24, 3, 3, 3)
    np.random.seed(0)  # noqa: NPY002  # CPPower draws from the global state
    with tensorly.backend_context("numpy", local_threadsafe=True):
        theirs = CPPower(12).fit_transform(tensor.numpy())
        error = np.linalg.norm(tensorly.cp_to_tensor(theirs) - tensor.numpy()) / float(tensor.norm())
    assert relative_error(tensor, *power_method(tensor, rank=12, generator=generator())) < 1.005 * error


def test_a_layer_at_its_published_rank_is_exact_and_benign():
    """(64, 3, 3, 3) was published with 36 terms; 27 are enough, and the rest has weight zero."""
    tensor = torch.nn.Conv2d(3, 64, 3).weight.detach()
    weights, factors = power_method(tensor, rank=36)
    assert relative_error(tensor, weights, factors) < 1e-5
    assert (weights[27:] == 0).all() and (weights[:27] > 0).all()
    assert degeneracy(weights, factors) < math.sqrt(27)


def test_greedy_terms_do_not_diverge():
    tensor = draw(32, 16, 3, 3)
    weights, factors = power_method(tensor, rank=40, generator=generator())
    assert relative_error(tensor, weights, factors) < 0.97 * relative_error(tensor, *orthogonal_terms(tensor, rank=40))
    assert degeneracy(weights, factors) < 1.2 * math.sqrt(40)


def test_weights_are_refitted_over_all_terms():
    """What is left is orthogonal to every term."""
    tensor = draw(16, 8, 3, 3)
    weights, factors = power_method(tensor, rank=25, generator=generator())
    residual = tensor - cp_tensor(weights, factors)
    products = khatri_rao(factors) @ residual.flatten()
    assert float(products.abs().max()) < 1e-5 * float(weights.abs().max())
    assert float((cp_gram(factors) - torch.eye(25)).abs().max()) > 0.01


def test_what_was_taken_and_what_came_to_the_same_starts_anew():
    pool = [torch.nn.functional.normalize(draw(4, d)) for d in (5, 4, 3)]
    for candidates in pool:
        candidates[2] = -candidates[0]
    before = [candidates.clone() for candidates in pool]
    _renew(pool, torch.tensor(0), generator(1))
    for old, new in zip(before, pool, strict=True):
        assert (old == new).all(dim=1).tolist() == [False, True, False, True]
        torch.testing.assert_close(new.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_the_pool_is_renewed_by_every_term_that_is_taken(monkeypatch):
    renewed = []

    def watch(pool, taken, generator):
        renewed.append([candidates[taken].clone() for candidates in pool])
        _renew(pool, taken, generator)

    monkeypatch.setattr(cp_fitting, "_renew", watch)
    _, factors = power_method(draw(12, 8, 3, 3), rank=6, generator=generator())
    assert len(renewed) == 6
    for term, vectors in enumerate(renewed):
        assert all(torch.equal(factor[term], vector) for factor, vector in zip(factors, vectors, strict=True))


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (3, 1), (1, 3), (3,)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_signs_of_tensors_without_two_large_modes(shape, sign, method):
    tensor = torch.full(shape, sign)
    weights, factors = method(tensor, rank=1)
    torch.testing.assert_close(cp_tensor(weights, factors), tensor)
    assert weights > 0


def test_draws_are_those_of_the_generator_and_no_others():
    tensor = draw(12, 8, 3, 3)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again = (power_method(tensor, rank=10, generator=generator(3)) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first[0], again[0]) and all(map(torch.equal, first[1], again[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_results_have_the_dtype_of_the_tensor(dtype, method):
    tensor = draw(8, 6, 3, 3).to(dtype)
    weights, factors = method(tensor, rank=20, generator=generator())
    assert {weights.dtype, *(factor.dtype for factor in factors)} == {dtype}
    wide = method(tensor.double(), rank=20, generator=generator())
    narrow = relative_error(tensor.double(), weights.double(), [f.double() for f in factors])
    assert narrow == pytest.approx(relative_error(tensor.double(), *wide), abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method):
    tensor = draw(8, 6, 3)
    weights, _ = method(tensor, rank=5, generator=generator())
    for scale in (1e-150, 1e150):
        torch.testing.assert_close(method(scale * tensor, rank=5, generator=generator())[0] / scale, weights)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_tensor_has_terms_of_weight_zero(method):
    weights, factors = method(torch.zeros(4, 3, 2), rank=3)
    assert (weights == 0).all()
    for factor in factors:
        torch.testing.assert_close(factor.norm(dim=1), torch.ones(3))
    assert len(method(torch.zeros(4, 3, 2), error=0.1)[0]) == 1


def test_the_graph_of_the_tensor_is_left_alone():
    tensor = draw(4, 3, 2).requires_grad_()
    before = tensor.detach().clone()
    weights, _ = power_method(tensor, rank=2)
    assert not weights.requires_grad
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tensor", "options", "error", "message"),
    [
        (torch.ones(3, 3), {}, ValueError, "rank or error"),
        (torch.ones(3, 3), {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        (torch.ones(3, 3), {"error": -0.1}, ValueError, "error must be finite"),
        (torch.ones(3, 3), {"error": float("nan")}, ValueError, "error must be finite"),
        (torch.tensor([[1.0, float("nan")]]), {"rank": 1}, ValueError, "tensor must be finite"),
        (torch.tensor(1.0), {"rank": 1}, ValueError, "tensor must be finite, with one mode"),
        (torch.ones(3, 0), {"rank": 1}, ValueError, "one entry"),
        (torch.ones(3, 3, dtype=torch.long), {"rank": 1}, TypeError, "floating-point"),
    ],
)
def test_bad_arguments_are_named(method, tensor, options, error, message):
    with pytest.raises(error, match=message):
        method(tensor, **options)


@pytest.mark.parametrize("name", ["repeats", "iterations"])
def test_the_pool_is_not_empty(name):
    with pytest.raises(ValueError, match="repeats must be at least 1 and iterations 2"):
        power_method(torch.ones(3, 3), rank=1, **{name: 0})
