"""Sums of rank-one terms against explicit outer products and tensorly, and what of them is gauge."""

import functools

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.cp_tensor import cp_to_tensor

from retract.manifolds.cp_terms import (
    canonical_form,
    cp_gram,
    cp_norm,
    cp_normalize,
    cp_tensor,
    degeneracy,
    khatri_rao,
)

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5)
RANKS = st.integers(1, 6)


def terms(shape, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(rank, d, generator=generator, dtype=dtype) for d in shape]
    return torch.randn(rank, generator=generator, dtype=dtype), tuple(f / f.norm(dim=1, keepdim=True) for f in factors)


def outer_products(factors):
    return [functools.reduce(lambda a, b: torch.tensordot(a, b, 0), vectors) for vectors in zip(*factors, strict=True)]


@settings(deadline=None, max_examples=50)
@given(SHAPES, RANKS)
def test_tensor_gram_and_norm_are_those_of_the_outer_products(shape, rank):
    weights, factors = terms(shape, rank)
    products = torch.stack(outer_products(factors))
    explicit = torch.einsum("r,r...->...", weights, products)
    torch.testing.assert_close(cp_tensor(weights, factors), explicit, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(khatri_rao(factors), products.flatten(1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(cp_gram(factors), products.flatten(1) @ products.flatten(1).T, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(cp_norm(weights, factors), explicit.norm(), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_a_convolution_weight_is_tensorlys(rank):
    weights, factors = terms((8, 6, 3, 3), rank)
    with tensorly.backend_context("numpy", local_threadsafe=True):
        theirs = cp_to_tensor((weights.numpy(), [factor.numpy().T for factor in factors]))
    np.testing.assert_allclose(cp_tensor(weights, factors).numpy(), theirs, atol=1e-13)
    single = cp_tensor(weights.float(), [factor.float() for factor in factors])
    assert float((single - torch.from_numpy(theirs)).abs().max()) < 1e-6


def test_the_tensor_has_gradients():
    weights, factors = terms((4, 3, 2), 3)
    inputs = [t.requires_grad_() for t in (weights, *factors)]
    assert torch.autograd.gradcheck(lambda w, *f: cp_tensor(w, f), inputs)
    assert torch.autograd.gradcheck(lambda w, *f: cp_norm(w, f), inputs)


def test_the_norm_of_terms_that_cancel_is_right_in_single_precision():
    weights, factors = terms((6, 5, 4), 1, dtype=torch.float32)
    near = [torch.nn.functional.normalize(f + 1e-3 * torch.randn_like(f)) for f in factors]
    both = [torch.cat(pair) for pair in zip(factors, near, strict=True)]
    weights = torch.tensor([300.0, -300.0])
    exact = cp_tensor(weights.double(), [f.double() for f in both]).norm()
    torch.testing.assert_close(cp_norm(weights, both).double(), exact, rtol=1e-5, atol=0)
    assert degeneracy(weights, both) > 100


@settings(deadline=None, max_examples=50)
@given(SHAPES, RANKS)
def test_normalizing_moves_norms_into_the_weights(shape, rank):
    weights, factors = terms(shape, rank)
    scaled = [factor * torch.logspace(-3, 3, rank, dtype=torch.float64).unsqueeze(1) for factor in factors]
    for given_weights in (weights, None):
        new, units = cp_normalize(scaled, given_weights)
        for unit in units:
            torch.testing.assert_close(unit.norm(dim=1), torch.ones(rank, dtype=torch.float64))
        reference = torch.ones_like(weights) if given_weights is None else weights
        torch.testing.assert_close(cp_tensor(new, units), cp_tensor(reference, scaled))


@settings(deadline=None, max_examples=50)
@given(SHAPES, RANKS, st.integers(0, 100))
def test_the_canonical_form_is_one_for_all_members_of_a_gauge_class(shape, rank, seed):
    weights, factors = terms(shape, rank)
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(rank, generator=generator)
    signs = [1.0 - 2.0 * torch.randint(2, (rank,), generator=generator) for _ in shape]
    lengths = [torch.rand(rank, generator=generator, dtype=torch.float64) + 0.1 for _ in shape]
    moved = weights * torch.stack(signs).prod(0) / torch.stack(lengths).prod(0)
    turned = [f * (s * length).unsqueeze(1) for f, s, length in zip(factors, signs, lengths, strict=True)]
    first, again = (
        canonical_form(weights, factors),
        canonical_form(moved[permutation], [f[permutation] for f in turned]),
    )
    torch.testing.assert_close(again, first, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(cp_tensor(*first), cp_tensor(weights, factors), atol=1e-12, rtol=1e-12)
    assert (first[0] >= 0).all() and (first[0].diff() <= 0).all()
    for factor in first[1][1:]:
        assert (factor.gather(1, factor.abs().argmax(1, keepdim=True)) > 0).all()


def test_weights_are_signed():
    weights, factors = terms((4, 3, 3, 3), 5)
    positive, negative = weights.clone(), weights.clone()
    positive[2], negative[2] = 2.0, -2.0
    difference = cp_tensor(positive, factors) - cp_tensor(negative, factors)
    torch.testing.assert_close(difference, 4 * outer_products(factors)[2])


def test_degeneracy_of_orthogonal_terms_is_at_most_the_root_of_their_number():
    factors = (torch.eye(4, 6), torch.eye(4, 5))
    torch.testing.assert_close(degeneracy(torch.ones(4), factors), torch.tensor(2.0))
    assert degeneracy(torch.zeros(4), factors) == 0
    parallel = (torch.eye(4, 6)[[0, 0]], torch.eye(4, 5)[[0, 0]])
    assert degeneracy(torch.tensor([1.0, -1.0]), parallel) == float("inf")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_row_without_direction_is_named(value):
    weights, factors = terms((4, 3, 2), 5)
    factors[1][3] = value
    with pytest.raises(ValueError, match=r"factors\[1\] has rows that are zero or not finite .*\[3\]"):
        cp_normalize(factors, weights)


@pytest.mark.parametrize(
    ("weights", "factors"),
    [
        (torch.ones(3), []),
        (torch.ones(3), [torch.ones(3, 2), torch.ones(4, 2)]),
        (torch.ones(3), [torch.ones(3, 2), torch.ones(3)]),
        (torch.ones(3), [torch.ones(3, 0)]),
        (torch.ones(2), [torch.ones(3, 2)]),
        (torch.ones(3, 1), [torch.ones(3, 2)]),
    ],
)
def test_terms_that_do_not_fit_together_are_refused(weights, factors):
    for function in (cp_tensor, cp_norm):
        with pytest.raises(ValueError, match="must"):
            function(weights, factors)
