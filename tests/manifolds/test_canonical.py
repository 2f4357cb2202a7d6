"""Counts of canonical tensors: parameters, degrees of freedom as the rank of a Jacobian, identifiability."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

from retract.manifolds import canonical
from retract.manifolds.canonical import break_even_rank, cp_tensor, degrees_of_freedom, exceeds_ambient, is_identifiable


@pytest.mark.parametrize(
    ("shape", "terms", "rank", "null"),
    [((4, 3, 3, 3), 5, 50, 21), ((6, 5, 3, 3), 10, 140, 41), ((3, 2, 2), 6, 12, None)],
)
def test_the_jacobian_has_as_many_dimensions_as_there_are_degrees_of_freedom(shape, terms, rank, null):
    """Of sigma, weights and vectors of any length; what remains is gauge, but where terms cannot be told apart."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(terms, d, dtype=torch.float64, generator=generator) for d in shape]
    weights, sigma = (
        torch.rand(terms, dtype=torch.float64, generator=generator) + 0.5,
        torch.ones(1, dtype=torch.float64),
    )

    def weight(sigma, weights, *factors):
        return cp_tensor(sigma * weights, [factor / factor.norm(dim=1, keepdim=True) for factor in factors]).flatten()

    parts = jacobian(weight, (sigma, weights, *factors))
    values = torch.linalg.svdvals(torch.cat([part.flatten(1) for part in parts], dim=1))
    found = int((values > 1e-9 * values[0]).sum())
    assert found == rank == min(degrees_of_freedom(shape, terms), math.prod(shape))
    parameters = terms * (sum(shape) + 1) + 1
    assert null is None or parameters - found == null == len(shape) * terms + 1
    assert exceeds_ambient(shape, terms) == (null is None)


def test_the_break_even_rank_is_the_first_that_has_as_many_parameters():
    for shape in [(64, 3, 3, 3), (192, 64, 3, 3), (256, 256, 3, 3), (10, 128), (1, 1)]:
        rank = break_even_rank(shape)
        assert (rank - 1) * (sum(shape) + 1) < math.prod(shape) <= rank * (sum(shape) + 1)


def test_published_ranks_are_more_than_can_be_told_apart():
    published = {(64, 3, 3, 3): 36, (192, 64, 3, 3): 571, (256, 384, 3, 3): 1948, (256, 256, 3, 3): 1644}
    for shape, rank in published.items():
        assert rank > break_even_rank(shape)
        assert exceeds_ambient(shape, rank)
        assert not exceeds_ambient(shape, rank // 10)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_unique_terms_are_no_more_than_can_be_told_apart(shape, rank):
    if is_identifiable(shape, rank):
        assert not exceeds_ambient(shape, rank)
    assert is_identifiable(shape, 1)
    assert is_identifiable([*shape, 1], rank) == is_identifiable(shape, rank)


def test_kruskals_condition_on_convolutions_and_matrices():
    """Of (256, 256, 3, 3) a tenth of the parameters, 113 terms, is within: 113 + 113 + 3 + 3 >= 2 * 113 + 3."""
    assert is_identifiable((256, 256, 3, 3), 113)
    assert is_identifiable((256, 256, 3, 3), 256)
    assert not is_identifiable((256, 256, 3, 3), 260)
    assert not is_identifiable((64, 32), 2)
    assert [is_identifiable((3, 3, 3), rank) for rank in (3, 4)] == [True, False]


@pytest.mark.parametrize("shape", [(), (3, 0), (-1, 2)])
def test_sizes_are_positive(shape):
    for function in (break_even_rank, degrees_of_freedom, exceeds_ambient, is_identifiable):
        with pytest.raises(ValueError, match="shape must be sizes >= 1"):
            function(*(shape,) if function is break_even_rank else (shape, 2))


def test_everything_is_offered_in_one_place():
    for name in canonical.__all__:
        assert getattr(canonical, name).__doc__
