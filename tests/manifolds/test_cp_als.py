"""Guarded alternating least squares: near where tensorly's is, and never with terms that cancel far."""

import pytest
import tensorly
import torch

from retract.manifolds.cp_als import alternating_least_squares
from retract.manifolds.cp_fitting import power_method
from retract.manifolds.cp_terms import canonical_form, cp_tensor, degeneracy


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(0)


def border_tensor():
    """a o a o b + a o b o a + b o a o a: of rank 3, and the limit of tensors of rank 2 whose terms diverge."""
    a, b = torch.eye(2, dtype=torch.float64)
    return sum(torch.einsum("i,j,k->ijk", *vectors) for vectors in ((a, a, b), (a, b, a), (b, a, a)))


def test_it_improves_on_the_power_method_and_reports_what_it_has():
    tensor = draw(16, 12, 3, 3)
    start = power_method(tensor, rank=30, generator=generator())
    fit = alternating_least_squares(tensor, 30, iterations=50, start=start)
    residual = (tensor - cp_tensor(fit.weights, fit.factors)).norm() / tensor.norm()
    assert fit.error == pytest.approx(float(residual), rel=1e-9)
    assert fit.error < 0.9 * float((tensor - cp_tensor(*start)).norm() / tensor.norm())
    assert fit.degeneracy == pytest.approx(float(degeneracy(fit.weights, fit.factors)))
    for factor in fit.factors:
        torch.testing.assert_close(factor.norm(dim=1), torch.ones(30, dtype=torch.float64))


def test_terms_that_were_put_in_are_found():
    factors = [draw(4, d, seed=d) for d in (9, 8, 7)]
    tensor = cp_tensor(torch.ones(4, dtype=torch.float64), factors)
    fit = alternating_least_squares(tensor, 4, iterations=500, tolerance=1e-14, generator=generator())
    assert fit.error < 1e-5
    assert fit.degeneracy < 10
    found, given = canonical_form(fit.weights, fit.factors), canonical_form(torch.ones(4, dtype=torch.float64), factors)
    torch.testing.assert_close(found[0], given[0], rtol=1e-3, atol=0)
    for one, other in zip(found[1], given[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_a_layer_at_its_published_rank():
    tensor = torch.nn.Conv2d(3, 64, 3).weight.detach()
    fit = alternating_least_squares(tensor, 36)
    assert fit.error < 1e-3
    assert fit.degeneracy < 50
    assert fit.weights.dtype == torch.float32 and fit.factors[0].shape == (36, 64)


def test_ranks_beyond_the_largest_useful_one_stay_finite():
    fit = alternating_least_squares(draw(8, 2, 3, 3), 17, start=power_method(draw(8, 2, 3, 3, seed=1), rank=17))
    assert fit.error < 0.4
    assert torch.isfinite(fit.weights).all()


def test_diverging_components_are_regularised():
    tensor = border_tensor()
    start = power_method(tensor, rank=2, generator=generator())
    options = {"iterations": 500, "tolerance": 0, "start": start}
    free = alternating_least_squares(tensor, 2, **options)
    assert free.degeneracy > 4
    guarded = alternating_least_squares(tensor, 2, largest_degeneracy=3, **options)
    assert guarded.degeneracy <= 3
    assert guarded.ridge > free.ridge
    assert free.error < guarded.error < 0.7


def test_terms_that_cancel_in_spite_of_every_ridge_are_refused():
    with pytest.raises(ValueError, match=r"2 terms of a .* tensor cancel: .*largest_degeneracy allows 0.5"):
        alternating_least_squares(border_tensor(), 2, iterations=5, largest_degeneracy=0.5, generator=generator())


def test_the_backend_of_the_user_stays():
    with tensorly.backend_context("numpy"):
        alternating_least_squares(draw(4, 3, 2), 2, iterations=2)
        assert tensorly.get_backend() == "numpy"


def test_modes_of_size_one_and_zero_tensors():
    fit = alternating_least_squares(draw(6, 1, 5, 1), 2, generator=generator())
    singular = torch.linalg.svdvals(draw(6, 1, 5, 1).squeeze())
    assert fit.error == pytest.approx(float(singular[2:].norm() / singular.norm()), abs=1e-6)
    nothing = alternating_least_squares(torch.zeros(4, 3, 2), 2)
    assert (nothing.weights == 0).all() and nothing.error == 0


def test_the_start_has_the_terms_that_are_asked_for():
    start = power_method(draw(4, 3, 2), rank=2)
    with pytest.raises(ValueError, match="start must have 3 terms"):
        alternating_least_squares(draw(4, 3, 2), 3, start=start)
    with pytest.raises(ValueError, match=r"of a \(5, 3, 2\) tensor"):
        alternating_least_squares(draw(5, 3, 2), 2, start=start)


def test_a_tensor_that_is_not_finite_is_refused():
    start = power_method(draw(4, 3, 2), rank=2)
    with pytest.raises(ValueError, match="finite"):
        alternating_least_squares(torch.full((4, 3, 2), float("nan")), 2)
    with pytest.raises(ValueError, match="finite"):
        alternating_least_squares(torch.full((4, 3, 2), float("nan")), 2, start=start)
