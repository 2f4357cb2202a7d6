"""Which terms to keep: errors against the tensors themselves, orders against exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds.cp_terms import cp_norm, cp_tensor
from retract.manifolds.cp_truncation import refit, select_terms, soft_threshold, truncation_error

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def terms(shape, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(rank, d, generator=generator, dtype=dtype) for d in shape]
    return torch.randn(rank, generator=generator, dtype=dtype), tuple(f / f.norm(dim=1, keepdim=True) for f in factors)


def measured(weights, factors, kept, new_weights):
    """Norm of the change, of the tensors themselves."""
    part = cp_tensor(new_weights.double(), [factor[kept].double() for factor in factors])
    return float((cp_tensor(weights.double(), [factor.double() for factor in factors]) - part).norm())


def best_error(weights, factors, kept):
    """By least squares on the tensors."""
    basis = torch.stack([cp_tensor(weights.new_ones(1), [f[[r]] for f in factors]).flatten() for r in kept]).T
    whole = cp_tensor(weights, factors).flatten()
    coefficients = torch.linalg.lstsq(basis, whole, driver="gelsd").solution
    return float((whole - basis @ coefficients).norm())


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.integers(1, 6), st.data())
def test_truncation_error_is_the_norm_of_what_is_dropped(shape, rank, data):
    weights, factors = terms(shape, rank)
    kept = torch.tensor(data.draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True)))
    error = float(truncation_error(weights, factors, kept))
    assert error == pytest.approx(measured(weights, factors, kept, weights[kept]), abs=1e-7)
    mask = torch.zeros(rank, dtype=torch.bool).index_fill(0, kept, True)
    assert float(truncation_error(weights, factors, mask)) == error


def test_in_single_precision_the_formula_is_right_to_four_digits():
    weights, factors = terms((16, 8, 3, 3), 40, dtype=torch.float32)
    kept = weights.abs().argsort(descending=True)[:20]
    error = float(truncation_error(weights, factors, kept))
    assert error == pytest.approx(measured(weights, factors, kept, weights[kept]), rel=1e-4)


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.integers(1, 8), st.data())
def test_refitted_weights_are_least_squares(shape, rank, data):
    weights, factors = terms(shape, rank)
    kept = torch.tensor(data.draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True)))
    error = measured(weights, factors, kept, refit(weights, factors, kept))
    assert error <= float(truncation_error(weights, factors, kept)) + 1e-7
    assert error == pytest.approx(best_error(weights, factors, kept.tolist()), abs=1e-3 * float(weights.norm()))


def test_refitted_weights_come_in_the_order_of_the_kept():
    weights, factors = terms((5, 4, 3), 6)
    one, other = refit(weights, factors, torch.tensor([4, 1, 2])), refit(weights, factors, torch.tensor([1, 2, 4]))
    torch.testing.assert_close(one, other[[2, 0, 1]])
    mask = torch.tensor([False, True, True, False, True, False])
    torch.testing.assert_close(refit(weights, factors, mask), other)
    torch.testing.assert_close(refit(weights, factors, torch.arange(6)), weights)


def test_the_curve_is_that_of_the_refitted_beginnings():
    weights, factors = terms((6, 5, 3, 3), 20)
    selection = select_terms(weights, factors)
    assert sorted(selection.order.tolist()) == list(range(20))
    for count in range(1, 21):
        error = measured(weights, factors, selection.order[:count], refit(weights, factors, selection.order[:count]))
        assert float(selection.errors[count]) == pytest.approx(error, abs=1e-6)
    assert float(selection.errors[0]) == pytest.approx(float(cp_norm(weights, factors)))
    assert (selection.errors.diff() <= 0).all() and float(selection.errors[-1]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_every_next_term_is_the_best_that_can_be_added(seed):
    weights, factors = terms((4, 3, 3), 7, seed)
    selection = select_terms(weights, factors, 4)
    chosen = []
    for count, term in enumerate(selection.order.tolist(), 1):
        errors = {r: best_error(weights, factors, [*chosen, r]) for r in range(7) if r not in chosen}
        chosen.append(term)
        assert float(selection.errors[count]) == pytest.approx(min(errors.values()), abs=1e-6)
    every = min(best_error(weights, factors, list(some)) for some in itertools.combinations(range(7), 4))
    assert float(selection.errors[4]) <= 1.3 * every + 1e-6


def test_the_order_beats_that_of_the_magnitudes():
    weights, factors = terms((16, 8, 3, 3), 200)
    weights = 1 + 0.1 * weights
    selection = select_terms(weights, factors)
    by_magnitude = weights.abs().argsort(descending=True)
    for count in (50, 100, 150):
        kept = by_magnitude[:count]
        simple = measured(weights, factors, kept, weights[kept])
        assert float(selection.errors[count]) < 0.93 * simple


def test_a_shorter_order_is_the_beginning_of_a_longer_one():
    weights, factors = terms((6, 5, 3, 3), 20)
    whole, part = select_terms(weights, factors), select_terms(weights, factors, 7)
    assert part.order.tolist() == whole.order[:7].tolist()
    torch.testing.assert_close(part.errors, whole.errors[:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_terms_than_can_be_told_apart(dtype):
    """A singular Gram matrix: as many terms as the tensor has dimensions are all of it, and weights stay moderate."""
    weights, factors = terms((4, 3, 2), 60, dtype=dtype)
    twice = (torch.cat([weights, weights]), [torch.cat([factor, factor]) for factor in factors])
    selection = select_terms(*twice)
    assert (selection.errors.diff() <= 0).all()
    assert float(selection.errors[24]) < 1e-4 * float(selection.errors[0])
    for count in (10, 20, 60, 119):
        kept = selection.order[:count]
        new = refit(*twice, kept)
        assert torch.isfinite(new).all()
        error = measured(*twice, kept, new)
        assert error <= float(truncation_error(*twice, kept)) + 1e-6
        assert error == pytest.approx(float(selection.errors[count]), abs=1e-2 * float(selection.errors[0]))


def test_of_two_equal_terms_one_is_enough():
    weights, factors = terms((4, 3), 2)
    same = (weights[[0, 0, 1]], [factor[[0, 0, 1]] for factor in factors])
    selection = select_terms(*same)
    assert set(selection.order[:2].tolist()) in ({0, 2}, {1, 2})
    assert float(selection.errors[2]) < 1e-7
    kept = selection.order[:2].sort().values
    torch.testing.assert_close(refit(*same, kept), torch.stack([2 * weights[0], weights[1]]), atol=1e-6, rtol=0)


def test_terms_of_weight_zero_come_last_and_cost_nothing():
    weights, factors = terms((5, 4, 3), 8)
    weights[[1, 6]] = 0
    selection = select_terms(weights, factors)
    assert selection.order[-2:].tolist() == [1, 6]
    assert selection.errors[6:].tolist() == [0, 0, 0] and float(selection.errors[5]) > 0
    assert select_terms(weights, factors, 7).order[-1] == 1
    # Even one that could stand for others.
    factors = (torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), factors[1][[0, 0, 0]])
    factors = (torch.nn.functional.normalize(factors[0]), factors[1])
    assert select_terms(torch.tensor([0.0, 1.0, 1.1], dtype=torch.float64), factors).order.tolist() == [2, 1, 0]
    nothing = select_terms(torch.zeros(3), factors)
    assert nothing.errors.tolist() == [0] * 4 and nothing.order.tolist() == [0, 1, 2]


def test_large_negative_terms_are_kept():
    weights, factors = terms((8, 7, 3, 3), 6)
    weights = torch.tensor([0.1, -3.0, 0.2, 2.0, -0.1, 0.3], dtype=torch.float64)
    assert select_terms(weights, factors).order[:2].tolist() == [1, 3]


@settings(deadline=None, max_examples=50)
@given(st.floats(-5, 5), st.floats(0, 5))
def test_soft_threshold_is_the_proximal_step(weight, threshold):
    value = float(soft_threshold(torch.tensor(weight, dtype=torch.float64), threshold))
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    objective = 0.5 * (grid - weight) ** 2 + threshold * grid.abs()
    assert 0.5 * (value - weight) ** 2 + threshold * abs(value) <= float(objective.min()) + 1e-12
    assert value == 0 or abs(weight) > threshold


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_threshold_is_not_negative(threshold):
    with pytest.raises(ValueError, match="threshold"):
        soft_threshold(torch.ones(2), threshold)


@pytest.mark.parametrize(
    "kept",
    [
        torch.tensor([], dtype=torch.long),
        torch.tensor([0, 5]),
        torch.tensor([-1]),
        torch.tensor([1, 1]),
        torch.tensor([0.0, 1.0]),
        torch.zeros(5, dtype=torch.bool),
        torch.ones(4, dtype=torch.bool),
    ],
)
def test_kept_are_distinct_terms(kept):
    weights, factors = terms((4, 3), 5)
    for function in (truncation_error, refit):
        with pytest.raises(ValueError, match="kept must be"):
            function(weights, factors, kept)


@pytest.mark.parametrize("count", [0, 6, -1])
def test_the_count_is_one_of_terms(count):
    with pytest.raises(ValueError, match="count must be between 1"):
        select_terms(*terms((4, 3), 5), count)
