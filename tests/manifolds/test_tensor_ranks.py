import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds.tensor_train import STTP, capped_ranks, check_ranks, core_shapes, prime_modes

modes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(size=st.integers(1, 10**6))
def test_prime_modes_are_the_prime_factors(size):
    factors = prime_modes(size)
    assert math.prod(factors) == size
    assert list(factors) == sorted(factors)
    assert size == 1 or all(all(f % d for d in range(2, math.isqrt(f) + 1)) and f > 1 for f in factors)


def test_prime_modes_of_one_and_of_none():
    assert prime_modes(1) == (1,)
    assert prime_modes(97) == (97,)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prime_modes(0)


@settings(deadline=None)
@given(out_modes=modes, in_modes=modes, rank=st.integers(1, 9))
def test_the_cap_is_always_admissible(out_modes, in_modes, rank):
    ranks = capped_ranks(out_modes, in_modes, rank)
    assert check_ranks(out_modes, in_modes, ranks) == check_ranks(out_modes, in_modes, rank) == ranks
    middle = ranks[len(out_modes) - 1]
    assert middle == min(rank, math.prod(out_modes), math.prod(in_modes))
    left, right = core_shapes(out_modes, in_modes, ranks)
    for shapes, sizes in ((left, out_modes), (right, in_modes)):
        assert shapes[-1][1] == middle
        before = 1
        for (rows, columns), size in zip(shapes, sizes, strict=True):
            assert rows == before * size >= columns
            before = columns


@settings(deadline=None)
@given(out_modes=modes, in_modes=modes, data=st.data())
def test_ranks_are_refused_exactly_if_no_matrix_has_them(out_modes, in_modes, data):
    """A train of random cores of the given sizes has the given ranks, or it cannot."""
    sizes = (*out_modes, *reversed(in_modes))
    ranks = tuple(data.draw(st.integers(1, 6)) for _ in sizes[1:])
    generator = torch.Generator().manual_seed(0)
    bonds = (1, *ranks, 1)
    tensor = torch.ones(1, 1, dtype=torch.float64)
    for left, size, right in zip(bonds, sizes, bonds[1:], strict=False):
        core = torch.randn(left, size * right, generator=generator, dtype=torch.float64)
        tensor = (tensor @ core).reshape(-1, right)
    attained = tuple(
        int(torch.linalg.matrix_rank(tensor.reshape(math.prod(sizes[:k]), -1), rtol=1e-10))
        for k in range(1, len(sizes))
    )
    if attained == ranks:
        assert check_ranks(out_modes, in_modes, ranks) == ranks
    else:
        with pytest.raises(ValueError, match=r"exceeds"):
            check_ranks(out_modes, in_modes, ranks)


def test_the_example_of_the_paper():
    """16 x (8 * 3 * 3) of rank 4; with 9 as one mode the cores are others."""
    ranks = capped_ranks((2, 2, 2, 2), (2, 2, 2, 3, 3), 4)
    assert ranks == (2, 4, 4, 4, 4, 4, 4, 2)
    left, right = core_shapes((2, 2, 2, 2), (2, 2, 2, 3, 3), ranks)
    assert sorted(left + right) == [(2, 2)] * 2 + [(4, 4)] * 2 + [(8, 4)] * 3 + [(12, 4)] * 2
    whole = core_shapes((2, 2, 2, 2), (2, 2, 2, 9), capped_ranks((2, 2, 2, 2), (2, 2, 2, 9), 4))
    assert (36, 4) in whole[1]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((3, 3, 3, 2), r"R_1 = 3 exceeds R_0 n_1 = 1 \* 2 = 2"),
        ((2, 3, 1, 2), r"R_2 = 3 exceeds n_3 R_3 = 2 \* 1 = 2"),
        ((2, 3, 3, 3), r"R_4 = 3 exceeds n_5 R_5 = 2 \* 1 = 2"),
        ((2, 0, 3, 2), r"at least 1, got \(2, 0, 3, 2\)"),
        ((2, 3), r"must be 4 numbers for modes \(2, 3, 2\) x \(2, 2\)"),
        (0, "at least 1, got 0"),
    ],
)
def test_ranks_that_are_refused(ranks, message):
    for refuses in (lambda: check_ranks((2, 3, 2), (2, 2), ranks), lambda: STTP(((2, 3, 2), (2, 2)), ranks)):
        with pytest.raises(ValueError, match=message):
            refuses()


def test_modes_that_are_refused():
    with pytest.raises(ValueError, match=r"out_modes must be one or more numbers of at least 1, got \(\)"):
        capped_ranks((), (2,), 2)
    with pytest.raises(ValueError, match=r"in_modes must be one or more numbers of at least 1, got \(2, 0\)"):
        check_ranks((2,), (2, 0), (1, 1))
