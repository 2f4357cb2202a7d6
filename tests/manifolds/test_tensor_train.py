import copy
import io
import math
from itertools import pairwise

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train
from torch.utils._python_dispatch import TorchDispatchMode

from retract.manifolds import Stiefel, diagnostics
from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Bounded, Lipschitz
from retract.manifolds.tensor_train import STTP, capped_ranks, frame, prime_modes
from retract.optim import RiemannianGD, RiemannianSGD

SPECTRA = ("free", "identity", "lipschitz", "bounded")
SIZES = [
    (((2, 2, 2), (2, 2, 3)), 3),
    (((2, 3, 2), (2, 3)), (2, 3, 2, 2)),
    (((3, 3, 3), (2, 2, 2)), (2, 3, 4, 4, 2)),
    (((4,), (5,)), 2),
    (((7,), (3, 2, 2)), 2),
    (((1, 2, 3), (3, 1, 2)), 2),
    (((2, 2, 3), (2, 3)), (2, 4, 4, 2)),
    (((2, 2), (2, 2)), 9),
    (((2, 2, 2), (3,)), 1),
]
modes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


def draw(manifold, seed=0, dtype=torch.float64):
    """A random point, in a random gauge: square cores are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    x = manifold.random(dtype=dtype, generator=generator)
    values = manifold.center.spectrum.project(x[len(manifold.out_modes)] + 0.1 * torch.rand(1, generator=generator))
    x = (*x[: len(manifold.out_modes)], values.to(dtype), *x[len(manifold.out_modes) + 1 :])
    return manifold.act(x, element(manifold, generator, dtype))


def element(manifold, generator, dtype=torch.float64):
    """Rotations of every bond; in the middle those that the spectrum allows everywhere."""
    rotations = [
        Stiefel().random(r, r, dtype=dtype, generator=generator).as_subclass(torch.Tensor) for r in manifold.ranks
    ]
    if not manifold.center.spectrum.skew_only:
        r = manifold.center.rank
        signs = torch.randint(0, 2, (r,), generator=generator) * 2 - 1
        rotations[len(manifold.out_modes) - 1] = (torch.eye(r)[torch.randperm(r, generator=generator)] * signs).to(
            dtype
        )
    return rotations


def ambient(manifold, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in manifold.shapes)


def matrix(manifold, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(manifold.matrix_shape, generator=generator, dtype=torch.float64)


def velocity(manifold, x, u):
    return torch.func.jvp(manifold.embed, (x,), (tuple(u),))[1]


def tangent_space(manifold, x):
    """Orthonormal basis of the tangent space as columns, from Stiefel geometry: no gauge condition, no metric.

    All velocities that keep every core orthonormal and the values allowed, seen in the matrix.
    """
    images = []
    for place, factor in enumerate(x):
        steps = torch.eye(factor.numel(), dtype=factor.dtype).view(-1, *factor.shape)
        if factor.ndim == 1:
            steps = torch.stack([manifold.center.spectrum.constrain(factor, step) for step in steps])
        else:
            steps = steps - factor @ (factor.mT @ steps + steps.mT @ factor) / 2

        def image(t, place=place):
            return manifold.embed((*x[:place], t, *x[place + 1 :])).flatten()

        images.append(torch.vmap(lambda step, f=factor, image=image: torch.func.jvp(image, (f,), (step,))[1])(steps))
    left, values, _ = torch.linalg.svd(torch.cat(images).mT, full_matrices=False)
    return left[:, values > 1e-9 * values[0]]


def unfoldings(manifold, w):
    """Singular values of a matrix's unfolding at every bond, along the train."""
    sizes = (*manifold.out_modes, *reversed(manifold.in_modes))
    count = len(manifold.out_modes)
    tensor = w.reshape(*manifold.out_modes, *manifold.in_modes)
    tensor = tensor.permute(*range(count), *reversed(range(count, tensor.ndim)))
    splits = (tensor.reshape(math.prod(sizes[:k]), -1) for k in range(1, len(sizes)))
    return [torch.linalg.svdvals(split) for split in splits]


# ------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("shape", "ranks", "spectrum"),
    [(*size, "free") for size in SIZES] + [(*size, name) for size in SIZES[1::3] for name in SPECTRA[1:]],
)
def test_is_a_manifold(shape, ranks, spectrum):
    manifold = STTP(shape, ranks, spectrum)
    rotations = element(manifold, torch.Generator().manual_seed(1))
    report = diagnostics.check_manifold(manifold, point=draw(manifold), element=rotations)
    # a zero-dimensional manifold has no unit tangent vector to check a metric with
    expected_failures = {"metric"} if manifold.dimension() == 0 else set()
    assert {r.check for r in report.reports if not r.ok} <= expected_failures, str(report)


@settings(max_examples=8, deadline=None)
@given(
    out_modes=modes, in_modes=modes, cap=st.integers(1, 5), spectrum=st.sampled_from(SPECTRA), seed=st.integers(0, 999)
)
def test_projections_are_those_of_the_dense_tangent_space(out_modes, in_modes, cap, spectrum, seed):
    manifold = STTP((out_modes, in_modes), cap, spectrum)
    x = draw(manifold, seed)
    basis = tangent_space(manifold, x)
    assert basis.shape[1] == manifold.dimension() == manifold.dimension([t.shape for t in x])

    def nearest(z):
        return (basis @ (basis.mT @ z.flatten())).view(z.shape)

    u, z = ambient(manifold, seed + 1), matrix(manifold, seed + 2)
    torch.testing.assert_close(velocity(manifold, x, manifold.proju(x, u)), nearest(velocity(manifold, x, u)))
    torch.testing.assert_close(velocity(manifold, x, manifold.tangent(x, z)), nearest(z))
    torch.testing.assert_close(manifold.tangent(x, (z, torch.eye(z.shape[1]).to(z))), manifold.tangent(x, z))
    gradient = torch.func.grad(lambda p: (manifold.embed(p) * z).sin().sum())(x)
    dense = torch.func.grad(lambda w: (w * z).sin().sum())(manifold.embed(x))
    torch.testing.assert_close(velocity(manifold, x, manifold.egrad2rgrad(x, gradient)), nearest(dense))
    other = draw(manifold, seed + 3)
    v = manifold.proju(other, ambient(manifold, seed + 4))
    moved = manifold.transp(other, x, v)
    torch.testing.assert_close(velocity(manifold, x, moved), nearest(velocity(manifold, other, v)))
    for tangent in (manifold.proju(x, u), manifold.tangent(x, z), manifold.egrad2rgrad(x, gradient), moved):
        assert manifold.check_vector_on_tangent(x, tangent, atol=1e-9, explain=True) == (True, None)
    torch.testing.assert_close(
        manifold.inner(x, u, moved), (velocity(manifold, x, u) * velocity(manifold, x, moved)).sum()
    )


@pytest.mark.parametrize(
    ("shape", "rank", "free", "identity"),
    [
        (((2, 2, 2), (9, 2, 2)), 3, 57, 51),
        (((2, 2, 2), (3, 3, 2, 2)), 3, 57, 51),
        (((2, 2, 2), (9, 2, 2)), 8, 200, 164),
        (((2, 2, 2, 2), (2, 2, 2)), 4, 64, 54),
    ],
)
def test_dimensions_of_the_paper(shape, rank, free, identity):
    """The formula, and the rank of the Jacobian at a random point."""
    for spectrum, expected in (("free", free), ("identity", identity), ("lipschitz", free - 1), ("bounded", free)):
        manifold = STTP(shape, rank, spectrum)
        assert manifold.dimension() == expected
        assert tangent_space(manifold, draw(manifold)).shape[1] == expected
        bonds = (1, *manifold.ranks, 1)
        cores = zip(bonds, (*shape[0], *reversed(shape[1])), bonds[1:], strict=False)
        assert free == sum(a * n * b for a, n, b in cores) - sum(r * r for r in manifold.ranks)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_full_bonds_leave_a_plain_svd(spectrum):
    """12 x 6 of rank 4 with the largest outer ranks is `SVDSpectral`: the same dimension, and the same verbs."""
    manifold, plain = STTP(((2, 2, 3), (2, 3)), (2, 4, 4, 2), spectrum), SVDSpectral(4, spectrum)
    full = STTP(((2, 2, 3), (3, 2)), capped_ranks((2, 2, 3), (3, 2), 4), spectrum)
    assert manifold.ranks == (2, 4, 4, 2)
    assert manifold.dimension() == full.dimension() == plain.dimension((12, 6))
    assert manifold.dimension() == {"free": 56, "identity": 46, "lipschitz": 55, "bounded": 56}[spectrum]
    x, z = draw(manifold), matrix(manifold, 1)
    u, v = manifold.tangent(x, 0.1 * z), manifold.tangent(x, matrix(manifold, 2))
    y, moved = manifold.retr_transp(x, u, v)
    there = manifold.frames(x)
    torch.testing.assert_close(manifold.embed(x), plain.embed(there))
    step, vector = plain.tangent(there, 0.1 * z), plain.tangent(there, matrix(manifold, 2))
    target, carried = plain.retr_transp(there, step, vector)
    torch.testing.assert_close(manifold.embed(y), plain.embed(target), atol=1e-13, rtol=0)
    torch.testing.assert_close(velocity(manifold, y, moved), velocity(plain, target, carried))


def test_gradients_keep_their_digits_at_ill_conditioned_points():
    """Condition 1e4 in float32: of the Gram matrices beyond the bonds it is 1e8, and their factors lose a digit."""
    manifold = STTP(((2, 2, 3, 3), (3, 3, 2, 2)), 4)
    x = draw(manifold, 3)
    x = (*x[:4], torch.logspace(0, -4, 4, dtype=torch.float64), *x[5:])
    z = matrix(manifold, 1)
    exact = manifold.tangent(x, z)
    single = manifold.tangent(tuple(t.float() for t in x), z.float())
    norm = manifold.norm(x, exact)
    error = manifold.norm(x, tuple(a.double() - b for a, b in zip(single, exact, strict=True)))
    assert error <= 8e-6 * norm


def test_bonds_of_lower_rank_have_gradients_where_they_have_rank():
    """At zero singular values nothing blows up: the missing directions have no velocity."""
    manifold = STTP(((2, 3, 2), (2, 3, 2)), 3)
    x = draw(manifold)
    x = (*x[:3], torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), *x[4:])
    z = matrix(manifold, 1)
    u = manifold.tangent(x, z)
    assert all(bool((t.abs() < 1e3).all()) for t in u)
    basis = tangent_space(manifold, x)
    inside = velocity(manifold, x, u).flatten()
    torch.testing.assert_close(basis @ (basis.mT @ inside), inside)
    y, moved = manifold.retr_transp(x, u, u)
    assert manifold.check_point_on_manifold(y, atol=1e-12, explain=True) == (True, None)
    assert manifold.check_vector_on_tangent(y, moved, atol=1e-9, explain=True) == (True, None)


# ---------------------------------------------------------------------------------------------------------- gauge


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("shape", "ranks"), SIZES)
def test_gauge_and_canonical_form(shape, ranks, spectrum):
    manifold = STTP(shape, ranks, spectrum)
    x = draw(manifold)
    z = manifold.act(x, element(manifold, torch.Generator().manual_seed(5)))
    torch.testing.assert_close(manifold.embed(z), manifold.embed(x), atol=1e-13, rtol=0)
    form = manifold.canonical(x)
    torch.testing.assert_close(manifold.embed(form), manifold.embed(x), atol=1e-13, rtol=0)
    torch.testing.assert_close(manifold.canonical(z), form, atol=1e-9, rtol=0)
    torch.testing.assert_close(manifold.canonical(form), form, atol=1e-9, rtol=0)
    assert manifold.check_point_on_manifold(form, atol=1e-12, explain=True) == (True, None)
    middle = len(shape[0])
    for core in (*form[: middle - 1], *form[middle + 1 : -1]):
        block = core[: core.shape[1]]
        assert torch.equal(block, block.triu())
        assert bool((block.diagonal() >= 0).all())
        if len(core) == len(block):
            torch.testing.assert_close(core, torch.eye(len(core)).to(core), atol=1e-12, rtol=0)
    last = form[middle - 1]
    if spectrum == "identity":
        block = last[: last.shape[1]]
        torch.testing.assert_close(block, block.triu(), atol=1e-12, rtol=0)
        assert bool((block.diagonal() >= 0).all())
    else:
        assert bool((form[middle].diff() <= 0).all())
        assert bool((last.gather(0, last.abs().argmax(0, keepdim=True)) > 0).all())


# ---------------------------------------------------------------------------------------------- points and matrices


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


# ------------------------------------------------------------------------------------------------------ optimizers


def parameters(x):
    return [torch.nn.Parameter(t.clone()) for t in x]


@pytest.mark.parametrize("spectrum", ["free", "identity", Lipschitz(2.0), Bounded(0.2, 2.0)])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_finds_a_matrix_of_the_manifold(spectrum, momentum):
    manifold = STTP(((2, 3, 2), (2, 2, 3)), 3, spectrum)
    target = manifold.embed(draw(manifold, 1))
    x = parameters(manifold.project(target + 0.02 * matrix(manifold, 2)))
    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.5, momentum=momentum)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (manifold.embed(tuple(x)) - target).square().sum() / 2
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) <= 1e-16
    assert manifold.check_point_on_manifold(tuple(x), atol=1e-12, explain=True) == (True, None)


def test_gradient_descent_with_a_line_search():
    manifold = STTP(((2, 3, 2), (2, 2, 3)), 3)
    target = matrix(manifold, 1)
    x = parameters(manifold.origin(dtype=torch.float64))
    optimizer = RiemannianGD([{"params": x, "manifold": manifold}], line_search="armijo")

    def closure():
        optimizer.zero_grad()
        loss = (manifold.embed(tuple(x)) - target).square().sum() / 2
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(100)]
    assert all(b <= a for a, b in pairwise(losses))
    closure()
    gradient = manifold.egrad2rgrad(tuple(t.detach() for t in x), tuple(t.grad for t in x))
    assert manifold.norm(tuple(t.detach() for t in x), gradient) <= 1e-2 * losses[0]
    best = (manifold.embed(manifold.project(target)) - target).square().sum() / 2
    assert losses[-1] <= 1.5 * float(best)


def test_state_dicts_round_trip():
    manifold = STTP(((2, 3), (2, 2, 2)), 3, Lipschitz(2.0))
    target = matrix(manifold, 0)

    def train(x, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (manifold.embed(tuple(x)) - target).square().sum().backward()
            optimizer.step()

    x = parameters(draw(manifold))
    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.01, momentum=0.9)
    train(x, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = parameters([t.detach() for t in x])
    resumed = RiemannianSGD([{"params": twin, "manifold": STTP(**manifold.arguments)}], lr=0.5, momentum=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(x, optimizer, 3)
    train(twin, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(x, twin, strict=True))
    other = RiemannianSGD([{"params": twin, "manifold": STTP(((2, 3), (2, 2, 2)), 3)}], lr=0.5)
    with pytest.raises(ValueError, match="was saved on manifold"):
        other.load_state_dict(optimizer.state_dict())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


def test_a_matrix_of_a_million_rows_and_columns_takes_steps():
    """Rank 4: nothing larger than a core's neighbourhood is made, neither the matrix nor its frames."""
    manifold = STTP((prime_modes(2**20), prime_modes(2**20)), 4)
    goal = draw(manifold)
    away = manifold.proju(goal, ambient(manifold, 1))
    away = tuple(0.3 / manifold.norm(goal, away) * t for t in away)
    x = parameters(manifold.retr(goal, away))

    def overlap(a, b):
        """``<A, B>`` of two trains, from the outside to the middle."""
        ends = []
        for side in (slice(0, 20), slice(21, 41)):
            seen = torch.ones(1, 1, dtype=torch.float64)
            for p, q in zip(a[side], b[side], strict=True):
                seen = p.mT @ (seen @ q.view(len(seen), -1)).view(-1, q.shape[1])
            ends.append(seen)
        return ((a[20].unsqueeze(1) * ends[0] * b[20]) * ends[1]).sum()

    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.5, momentum=0.1)
    losses = []
    with Largest() as seen:
        for _ in range(5):
            optimizer.zero_grad()
            loss = (overlap(x, x) - 2 * overlap(x, goal) + overlap(goal, goal)) / 2
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert seen.elements <= 128
    assert losses[0] > 0.03
    assert all(b < 0.5 * a for a, b in pairwise(losses))
    assert manifold.check_point_on_manifold(tuple(x), atol=1e-12, explain=True) == (True, None)


# ---------------------------------------------------------------------------------------------------- what is refused


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
