"""Derivatives of Householder frames, first and second, under torch.func and torch.compile too."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retract.manifolds.householder import householder_frame
from tests.manifolds.householder_frames import (
    CHARTS,
    assert_close,
    gradient_of,
    normal,
    orthonormality,
    random_coordinates,
    reflectors,
    seeds,
    sequential,
    shapes,
)


def lapack(h):
    """The same by torch.linalg, with an independent gradient."""
    return torch.linalg.householder_product(h, 2 / (1 + h.tril(-1).square().sum(-2)))


# ----------------------------------------------------------------------------------------------------- derivatives


@settings(max_examples=25, deadline=None)
@given(shape=shapes, reduced=st.booleans(), seed=seeds)
def test_gradient_is_that_of_sequential_reflections(shape, reduced, seed):
    n, p = shape
    coordinates, weight = random_coordinates(n, p, reduced, seed=seed), normal(n, p, seed=seed + 1)
    assume(coordinates.numel() > 0)
    ours = gradient_of(lambda c: householder_frame(c, n, p, reduced=reduced), coordinates, weight)
    assert_close(ours, gradient_of(lambda c: sequential(c, n, p, reduced), coordinates, weight), atol=1e-10)


@pytest.mark.parametrize(("n", "p"), [(80, 37), (40, 40), (30, 1)])
def test_agrees_with_torch_linalg(n, p):
    coordinates, weight = random_coordinates(n, p), normal(n, p, seed=1)
    h = reflectors(coordinates, n, p).requires_grad_()
    frame = lapack(h)
    assert_close(householder_frame(coordinates, n, p), frame.detach())
    (theirs,) = torch.autograd.grad(frame, h, weight)
    rows, columns = torch.tril_indices(p, p, -1)
    expected = torch.cat((theirs[p:].flatten(), theirs[rows, columns]))
    assert_close(gradient_of(lambda c: householder_frame(c, n, p), coordinates, weight), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("n", "p", "batch", "reduced"),
    [(3, 3, (), False)]  # reduced, it has no coordinates
    + [(*shape, reduced) for shape in ((5, 3, ()), (4, 1, ()), (4, 2, (2,)), (3, 2, (2, 1))) for reduced in CHARTS],
)
def test_first_and_second_derivatives(n, p, batch, reduced):
    coordinates = random_coordinates(n, p, reduced, batch).requires_grad_()

    def frame(c):
        return householder_frame(c, n, p, reduced=reduced)

    assert torch.autograd.gradcheck(frame, coordinates, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(
        frame, coordinates, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("reduced", CHARTS)
def test_gradient_that_will_be_differentiated_is_the_same(reduced):
    """It is computed by other operations than the one that will not be."""
    coordinates = random_coordinates(9, 4, reduced, (2,)).requires_grad_()
    frame, weight = householder_frame(coordinates, 9, 4, reduced=reduced), normal(2, 9, 4, seed=1)
    plain, differentiable = (
        torch.autograd.grad(frame, coordinates, weight, retain_graph=True, create_graph=create)[0]
        for create in (False, True)
    )
    assert_close(plain, differentiable.detach())
    assert not plain.requires_grad
    assert differentiable.requires_grad


@pytest.mark.parametrize("reduced", CHARTS)
def test_gradient_of_any_memory_layout(reduced):
    coordinates = random_coordinates(9, 4, reduced)
    expected = gradient_of(
        lambda c: householder_frame(c, 9, 4, reduced=reduced), coordinates, torch.ones(9, 4).double()
    )
    for layout in (
        lambda u: u.mT.contiguous().sum(),
        lambda u: u.sum(),
        lambda u: (u @ torch.ones(4, 2).double()).sum() / 2,
    ):
        result = gradient_of(lambda c, f=layout: f(householder_frame(c, 9, 4, reduced=reduced)), coordinates, None)
        assert_close(result, expected)
    spread = torch.stack((coordinates, coordinates), dim=-1)[..., 0]  # every second number
    assert not spread.is_contiguous()
    assert_close(
        householder_frame(spread, 9, 4, reduced=reduced), householder_frame(coordinates, 9, 4, reduced=reduced)
    )
    leaf = spread.requires_grad_()
    (gradient,) = torch.autograd.grad(householder_frame(leaf, 9, 4, reduced=reduced).sum(), leaf)
    assert_close(gradient, expected)


@pytest.mark.parametrize("reduced", CHARTS)
def test_float32_gradients_are_those_of_float64(reduced):
    n, p = 1152, 128
    exact = 0.03 * random_coordinates(n, p, reduced)
    weight = normal(n, p, seed=1)
    gradients = [
        gradient_of(lambda c: householder_frame(c, n, p, reduced=reduced), exact.to(dtype), weight.to(dtype)).double()
        for dtype in (torch.float32, torch.float64)
    ]
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


# ----------------------------------------------------------------------------------------- transforms, compilation


@pytest.mark.parametrize("reduced", CHARTS)
def test_vmap_is_a_batch(reduced):
    n, p = 6, 3
    coordinates = random_coordinates(n, p, reduced, (2, 3))
    expected = householder_frame(coordinates, n, p, reduced=reduced)

    def frame(c):
        return householder_frame(c, n, p, reduced=reduced)

    def loss(c):
        return frame(c).sin().sum()

    assert_close(torch.func.vmap(frame)(coordinates), expected)
    assert_close(torch.func.vmap(torch.func.vmap(frame))(coordinates), expected)
    assert_close(torch.func.vmap(frame, in_dims=1)(coordinates), expected.transpose(0, 1))
    assert_close(torch.func.vmap(torch.func.grad(loss))(coordinates[0]), torch.func.grad(loss)(coordinates[0]))


@pytest.mark.parametrize(
    ("n", "p", "reduced"), [(6, 3, False), (6, 3, True), (4, 1, False), (4, 1, True), (3, 3, False)]
)
def test_functional_derivatives_agree(n, p, reduced):
    coordinates = random_coordinates(n, p, reduced)

    def frame(c):
        return householder_frame(c, n, p, reduced=reduced)

    weight = normal(n, p, seed=1)

    def loss(c):
        return (weight * frame(c)).sum()

    assert_close(torch.func.jacfwd(frame)(coordinates), torch.func.jacrev(frame)(coordinates), atol=1e-12)
    forward_over_reverse = torch.func.hessian(loss)(coordinates)
    assert_close(forward_over_reverse, torch.func.jacrev(torch.func.jacrev(loss))(coordinates), atol=1e-12)
    assert_close(forward_over_reverse, torch.autograd.functional.hessian(loss, coordinates, vectorize=True), atol=1e-12)
    tangent = torch.ones_like(coordinates)
    _, slope = torch.func.jvp(loss, (coordinates,), (tangent,))
    assert_close(slope, torch.func.grad(loss)(coordinates) @ tangent, atol=1e-12)


@pytest.mark.parametrize(("backend", "reduced"), [("eager", False), ("eager", True), ("aot_eager", False)])
def test_compiles_into_one_graph(backend, reduced):
    torch.compiler.reset()

    def frame(c):
        return householder_frame(c, 6, 3, reduced=reduced)

    compiled = torch.compile(frame, fullgraph=True, backend=backend)
    coordinates, weight = random_coordinates(6, 3, reduced, (2,)), normal(2, 6, 3, seed=1)
    assert_close(compiled(coordinates), frame(coordinates))
    assert_close(gradient_of(compiled, coordinates, weight), gradient_of(frame, coordinates, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(coordinates.float()).dtype == torch.float32
        assert orthonormality(compiled(coordinates.float())) <= 1e-6
