"""What STTP's checks say is wrong, and which input it refuses."""

import copy

import pytest
import torch

from retract.manifolds.spectrum import Bounded
from retract.manifolds.tensor_train import STTP, frame
from retract.optim import RiemannianSGD
from tests.manifolds.tensor_trains import ambient, draw, parameters


def test_arguments_rebuild_it():
    manifold = STTP(((2, 3), (2, 2)), 2, Bounded(0.2, 0.9))
    assert STTP(**manifold.arguments).arguments == copy.deepcopy(manifold).arguments == manifold.arguments
    assert str(manifold) == "STTP(((2, 3), (2, 2)), (2, 2, 2), Bounded(low=0.2, high=0.9))"


def test_checks_say_what_is_wrong():
    manifold = STTP(((2, 3, 2), (2, 2)), 3)
    x = draw(manifold)
    u = manifold.proju(x, ambient(manifold, 1))
    assert manifold.check_point_on_manifold(x)
    assert manifold.check_vector_on_tangent(x, u)
    for bad, message in (
        ((x[0], 2 * x[1], *x[2:]), r"core U_2: UᵀU - I reaches 3"),
        ((*x[:4], x[4] + 1e-3, x[5]), r"core V_1: UᵀU - I"),
        ((*x[:3], -x[3], *x[4:]), r"\(U_3, s, V_2\): "),
        ((*x[:5], torch.nan * x[5]), r"\(U_3, s, V_2\): "),
        ((*x[:5], x[5][:, :2]), r"shapes .* got"),
        (tuple(t.long() for t in x), "real floating-point"),
    ):
        ok, reason = manifold.check_point_on_manifold(bad, explain=True)
        assert not ok
        assert not manifold.check_point_on_manifold(bad)
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(reason)
    for bad, message in (
        ((u[0], u[1] + 1e-3 * x[1], *u[2:]), "core U_2: UᵀdU"),
        ((*u[:2], u[2] + x[2], *u[3:]), r"\(U_3, s, V_2\): dU"),
        (u[:-1], "shapes"),
    ):
        ok, reason = manifold.check_vector_on_tangent(x, bad, explain=True)
        assert not ok
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(reason)


def test_bad_input():
    manifold = STTP(((2, 3), (2, 2)), 2)
    x = draw(manifold)
    w = manifold.embed(x)
    with pytest.raises(ValueError, match=r"matrix must have shape \(6, 4\), got \(4, 6\)"):
        manifold.project(w.mT)
    with pytest.raises(ValueError, match="NaN or infinite"):
        manifold.project(torch.where(w == w[0, 0], torch.nan, w))
    with pytest.raises(ValueError, match="NaN or infinite"):
        manifold.projx((torch.inf * x[0], *x[1:]))
    with pytest.raises(ValueError, match=r"ambient must have shape \(6, 4\), got \(4, 6\)"):
        manifold.tangent(x, w.mT)
    with pytest.raises(ValueError, match=r"ambient must have shape \(6, 4\), got \(4, 4\)"):
        manifold.tangent(x, (w.mT, w.mT))
    with pytest.raises(ValueError, match=r"points and vectors of shapes \(\(2, 2\), \(6, 2\)"):
        manifold.retr(x, x[:-1])
    with pytest.raises(TypeError, match=r"got dtype torch.int64"):
        manifold.embed(tuple(t.long() for t in x))
    with pytest.raises(ValueError, match="points of shapes"):
        manifold.dimension([(3, 2)])
    with pytest.raises(ValueError, match="spectrum must be one of"):
        STTP(((2, 3), (2, 2)), 2, "flat")
    with pytest.raises(ValueError, match=r"do not form a chain over modes \(3, 2\)"):
        frame(x[:2], (3, 2))
    with pytest.raises(ValueError, match="is not a point of STTP"):
        RiemannianSGD([{"params": parameters(ambient(manifold, 0)), "manifold": manifold}], lr=1.0)


def test_nan_never_passes_for_a_point():
    manifold = STTP(((2, 3, 2), (2, 2)), 2)
    x = draw(manifold)
    for place in range(len(x)):
        u = [torch.zeros_like(t) for t in x]
        u[place] = torch.full_like(u[place], torch.nan)
        try:
            y = manifold.retr(x, tuple(u))
        except torch.linalg.LinAlgError:
            continue
        square = x[place].ndim == 2 and x[place].shape[0] == x[place].shape[1]
        assert square or not manifold.check_point_on_manifold(y)


@pytest.mark.parametrize("verb", ["logmap", "dist", "expmap"])
def test_what_is_not_offered_names_what_is(verb):
    manifold = STTP(((2,), (2,)), 1)
    x = manifold.random()
    with pytest.raises(NotImplementedError, match="it offers"):
        getattr(manifold, verb)(x, x)
