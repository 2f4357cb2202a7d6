import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retract.manifolds.spectrum import Bounded, Free, Identity, Lipschitz
from retract.nets.parametrizations import STTP, SVDP

KINDS = (SVDP, STTP)
SPECTRA = (Identity(), Free(), Lipschitz(), Lipschitz(2.5), Bounded(0.2, 0.7))
FORMS = ("householder", "stiefel")
SHAPES = [(8, 4, 3, 3), (5, 6), (7, 7), (1, 6), (6, 1), (4, 3, 2), (3, 2, 2, 2, 2), (11, 13), (16, 8)]
# the order of modes of the published code: the kernel is one mode, and the outermost
KERNEL_OUTSIDE = ((2, 2, 2), (9, 2, 2))

kinds = st.sampled_from(KINDS)
spectra = st.sampled_from(SPECTRA)
forms = st.sampled_from(FORMS)


@st.composite
def parametrizations(draw, form=forms):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    transposed = draw(st.booleans())
    out = shape[1] if transposed else shape[0]
    rank = draw(st.integers(1, min(out, math.prod(shape) // out)))
    assume(math.prod(shape) > 1)  # a 1 x 1 matrix may have no degree of freedom
    return draw(kinds)(shape, rank, draw(spectra), form=draw(form), transposed=transposed)


def fitted(parametrization, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(parametrization.layout.weight_shape, dtype=torch.float64, generator=generator)
    return parametrization.right_inverse(weight.to(dtype))


def generic(parametrization, seed=0, dtype=torch.float64):
    """Random coordinates, or a random point."""
    originals = fitted(parametrization, seed, dtype)
    if parametrization.form == "stiefel":
        return originals
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype) for t in originals)


def matrix_of(parametrization, originals):
    return parametrization.layout.matrix(parametrization(*originals))


def jacobian_rank(parametrization, originals, tolerance=1e-9):
    """Singular values above the tolerance, relative to the largest."""
    every = tuple(range(len(originals)))
    jacobians = torch.func.jacrev(lambda *t: parametrization(*t).flatten(), argnums=every)(*originals)
    values = torch.linalg.svdvals(torch.cat([j.flatten(1) for j in jacobians], dim=1))
    return int((values > tolerance * values[0]).sum())


def unfolding_ranks(matrix, modes):
    """Ranks of the matrices that separate the first modes from the others, at every bond."""
    sizes = (*modes[0], *reversed(modes[1]))
    tensor = matrix.reshape(*modes[0], *modes[1])
    tensor = tensor.permute(*range(len(modes[0])), *reversed(range(len(modes[0]), len(sizes))))
    unfoldings = (tensor.reshape(math.prod(sizes[:k]), -1) for k in range(1, len(sizes)))
    return tuple(int(torch.linalg.matrix_rank(unfolding, rtol=1e-10)) for unfolding in unfoldings)


@settings(max_examples=60, deadline=None)
@given(parametrization=parametrizations(), seed=st.integers(0, 2**31))
def test_frames_are_orthonormal_and_values_are_the_spectrum_of_the_weight(parametrization, seed):
    originals = generic(parametrization, seed)
    u, s, v = parametrization.factors(*originals)
    rank = parametrization.rank
    for frame in (u, v):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(rank, dtype=frame.dtype), atol=1e-13, rtol=0)
    values = torch.linalg.svdvals(matrix_of(parametrization, originals))
    scale = max(1.0, float(values[0]))
    torch.testing.assert_close(values[:rank], s.abs().sort(descending=True).values, atol=1e-13 * scale, rtol=0)
    assert (values[rank:] <= 1e-13 * scale).all()
    assert parametrization.spectrum.contains(s.abs(), atol=1e-13) == (True, None)
    torch.testing.assert_close(parametrization.singular_values(*originals), s.abs())


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_good_as_float32_can_be(kind):
    parametrization = kind((64, 64, 3, 3), 32, "lipschitz")
    originals = generic(parametrization, dtype=torch.float32)
    u, s, v = parametrization.factors(*originals)
    for frame in (u.double(), v.double()):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(32, dtype=torch.float64), atol=5e-6, rtol=0)
    values = torch.linalg.svdvals(matrix_of(parametrization, originals).double())
    torch.testing.assert_close(values[:32], s.double().abs().sort(descending=True).values, atol=2e-6, rtol=0)
    assert (values[32:] <= 2e-6).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "rank", "modes"),
    [
        ((8, 4, 3, 3), 3, None),
        ((16, 8, 3, 3), 4, None),
        ((8, 12), (2, 3, 4, 5, 2), ((2, 2, 2), (2, 3, 2))),
        ((12, 6), 4, ((3, 4), (6,))),
        ((7, 11), 3, None),
        ((8, 8), 3, ((2, 1, 4), (1, 8))),
    ],
)
def test_tensor_train_ranks_are_attained(shape, rank, modes, form):
    parametrization = STTP(shape, rank, modes=modes, form=form)
    matrix = matrix_of(parametrization, generic(parametrization))
    assert unfolding_ranks(matrix, parametrization.modes) == parametrization.ranks


@pytest.mark.parametrize("shape", SHAPES)
def test_modes_are_prime_factors(shape):
    parametrization = STTP(shape, 1)
    out, fan_in = parametrization.modes
    assert (math.prod(out), math.prod(fan_in)) == parametrization.matrix_shape
    assert "modes=" in repr(parametrization)
    assert STTP((1, 12, 3, 1), 1).modes == ((1,), (2, 2, 3, 3))
    assert STTP((12, 6, 5), 1, transposed=True).modes == ((2, 3), (2, 2, 3, 5))


TABLE = [  # degrees of freedom of a free, and of an identity spectrum
    (SVDP, (8, 4, 3, 3), 3, None, 123, 117),
    (STTP, (8, 4, 3, 3), 3, KERNEL_OUTSIDE, 57, 51),
    (SVDP, (8, 4, 3, 3), 8, None, 288, 252),
    (STTP, (8, 4, 3, 3), 8, KERNEL_OUTSIDE, 200, 164),
    (SVDP, (16, 8), 4, None, 80, 70),
    (STTP, (16, 8), 4, None, 64, 54),
    (SVDP, (12, 6), 4, None, 56, 46),
    (STTP, (12, 6), 4, None, 56, 46),
    (STTP, (8, 4, 3, 3), 3, None, 60, 54),
    (SVDP, (7, 5), 1, None, 11, 10),
    (SVDP, (5, 5), 5, None, 25, 10),
    (STTP, (6, 6), (2, 6, 2), None, 36, 15),
    (STTP, (4, 8), (2, 3, 4, 2), ((2, 2), (2, 2, 2)), 27, 21),
]


@pytest.mark.parametrize("spectrum", [Identity(), Free(), Lipschitz(2.5), Bounded()])
@pytest.mark.parametrize(("kind", "shape", "rank", "modes", "free", "identity"), TABLE)
def test_every_stored_element_is_a_degree_of_freedom(kind, shape, rank, modes, free, identity, spectrum):
    options = {} if modes is None else {"modes": modes}
    parametrization = kind(shape, rank, spectrum, **options)
    expected = {"identity": identity, "free": free, "lipschitz": free - 1, "bounded": free}[spectrum.name]
    originals = generic(parametrization)
    assert parametrization.degrees_of_freedom == expected
    assert sum(t.numel() for t in originals) == expected
    assert jacobian_rank(parametrization, originals) == expected
    assert not list(parametrization.buffers())
    assert not list(parametrization.parameters())
    arguments = () if kind is STTP else (parametrization.matrix_shape,)
    assert parametrization.manifold.dimension(*arguments) == expected


@pytest.mark.parametrize("form", FORMS)
def test_full_ranks_make_a_tensor_train_a_singular_value_decomposition(form):
    train, plain = STTP((12, 6), 4, form=form), SVDP((12, 6), 4, form=form)
    assert train.degrees_of_freedom == plain.degrees_of_freedom == 56
    for one, other in ((train, plain), (plain, train)):
        weight = one(*generic(one))
        torch.testing.assert_close(other(*other.right_inverse(weight)), weight, atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, spectrum, form):
    parametrization = kind((4, 3, 2), 3, spectrum, form=form)
    originals = tuple(t.requires_grad_() for t in generic(parametrization))
    assert torch.autograd.gradcheck(parametrization, originals, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    parametrization = kind((4, 2), 2, "lipschitz")
    originals = tuple(t.requires_grad_() for t in generic(parametrization))
    assert torch.autograd.gradgradcheck(parametrization, originals)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_reflections_one_by_one(kind):
    """An independent path: every core a sequence of reflections, every frame one einsum."""
    parametrization = kind((8, 4, 3), 3)
    assert kind is SVDP or [chart.rows for chart in parametrization.charts] == [
        4,
        6,
        4,
        9,
    ]  # the first three in a batch
    originals = [t.requires_grad_() for t in generic(parametrization)]
    direction = torch.randn(8, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((parametrization(*originals) * direction).sum(), originals)
    cores = iter(
        _reflected(flat, chart.rows, chart.columns, chart.reduced)
        for chart, flat in zip(parametrization.charts, parametrization.coordinates(originals), strict=True)
    )
    frames = []
    for chain, modes in zip((parametrization.left, parametrization.right), parametrization.modes, strict=True):
        frame = torch.ones(1, 1, dtype=torch.float64)
        for chart, mode in zip(chain.cores, modes, strict=True):
            core = next(cores) if chart.size else torch.eye(chart.rows, dtype=torch.float64)
            frame = torch.einsum("ia,anb->inb", frame, core.view(-1, mode, chart.columns)).flatten(0, 1)
        frames.append(frame)
    s = originals[len(parametrization.left.live)]
    weight = torch.einsum("ia,a,ja->ij", frames[0], s, frames[1]).view(8, 4, 3)
    theirs = torch.autograd.grad((weight * direction).sum(), originals)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def _reflected(flat, n, p, reduced):
    reflectors = torch.eye(n, p, dtype=flat.dtype)
    below = torch.zeros_like(reflectors)
    bottom = flat[: (n - p) * p].view(n - p, p)
    rows, columns = torch.tril_indices(p, p, -1)
    top = torch.zeros(p, p, dtype=flat.dtype)
    if not reduced:
        top = top.index_put((rows, columns), flat[(n - p) * p :])
    reflectors = reflectors + below + torch.cat((top, bottom))
    frame = torch.eye(n, p, dtype=flat.dtype)
    for h in reversed(reflectors.unbind(1)):
        frame = frame - 2 * torch.outer(h, h @ frame) / (h @ h)
    return frame


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gradients(kind):
    parametrization = kind((16, 8, 3, 3), 8, "bounded")
    wide = [t.requires_grad_() for t in generic(parametrization)]
    narrow = [t.detach().float().requires_grad_() for t in wide]
    direction = torch.randn(16, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((parametrization(*wide) * direction).sum(), wide)
    result = torch.autograd.grad((parametrization(*narrow) * direction.float()).sum(), narrow)
    for a, b in zip(result, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-4 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gauge_transformed_cores_make_the_same_weight(kind, form):
    """Proposition 2, and coordinates that do not depend on the gauge of the point they are fitted to."""
    parametrization = kind((8, 6), 3, form=form)
    point = parametrization.nearest(torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    signs = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    if kind is STTP:
        middle = len(parametrization.modes[0]) - 1
        turns = [
            signs if k == middle else torch.linalg.qr(torch.randn(r, r, dtype=torch.float64, generator=generator))[0]
            for k, r in enumerate(parametrization.ranks)
        ]
        turned = parametrization.manifold.act(point, turns)
    else:
        turned = parametrization.manifold.act(point, signs)
    u, s, v = parametrization.contract(point)
    u2, s2, v2 = parametrization.contract(turned)
    torch.testing.assert_close((u * s) @ v.mT, (u2 * s2) @ v2.mT, atol=1e-13, rtol=0)
    if form == "householder":
        originals = (parametrization.originals(p, torch.float64) for p in (point, turned))
        for a, b in zip(*originals, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=0)
