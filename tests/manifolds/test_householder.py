import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from retract.manifolds.householder import householder_coordinates, householder_frame, num_coordinates

#: (n, p): tall, square, one column, one entry, hardly tall, wider than a panel of the elimination
SHAPES = [(7, 3), (4, 4), (5, 1), (1, 1), (6, 5), (80, 37)]
CHARTS = [False, True]
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda s: (max(s), min(s)))
batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)
seeds = st.integers(0, 2**31)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_coordinates(n, p, reduced=False, batch=(), seed=0, dtype=torch.float64):
    return normal(*batch, num_coordinates(n, p, reduced=reduced), seed=seed, dtype=dtype)


def random_frame(n, p, batch=(), seed=0, dtype=torch.float64):
    """Haar: so that no chart had a hand in it."""
    q, r = torch.linalg.qr(normal(*batch, n, p, seed=seed))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(dtype)


def reflectors(coordinates, n, p, reduced=False):
    """The matrix of the reflectors, entry by entry as the documentation lays out the coordinates."""
    entries = iter(coordinates)
    below = {(i, j): next(entries) for i, j in itertools.product(range(p, n), range(p))}
    if not reduced:
        below |= {(i, j): next(entries) for i in range(p) for j in range(i)}
    one, zero = torch.ones_like(coordinates.sum()), torch.zeros_like(coordinates.sum())
    rows = [torch.stack([one if i == j else below.get((i, j), zero) for j in range(p)]) for i in range(n)]
    assert next(entries, None) is None
    return torch.stack(rows)


def sequential(coordinates, n, p, reduced=False):
    """The product of reflections by its definition."""
    h = reflectors(coordinates, n, p, reduced)
    frame = torch.eye(n, p, dtype=h.dtype)
    for i in reversed(range(p)):
        frame = frame - 2 * torch.outer(h[:, i], h[:, i] @ frame) / h[:, i].square().sum()
    return frame


def lapack(h):
    """The same by torch.linalg, with an independent gradient."""
    return torch.linalg.householder_product(h, 2 / (1 + h.tril(-1).square().sum(-2)))


def gradient_of(function, coordinates, weight):
    coordinates = coordinates.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(coordinates), coordinates, weight)
    return gradient


def orthonormality(frame):
    frame = frame.detach().double()
    return float((frame.mT @ frame - torch.eye(frame.shape[-1], dtype=torch.float64)).abs().max())


def squared_lengths(coordinates, n, p, reduced=False):
    return reflectors(coordinates, n, p, reduced).square().sum(0)


def assert_close(actual, expected, atol=1e-13):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------------- the frame


@settings(max_examples=40, deadline=None)
@given(shape=shapes, reduced=st.booleans(), batch=batches, seed=seeds, scale=st.floats(-3, 4).map(lambda e: 10**e))
def test_is_the_product_of_reflections(shape, reduced, batch, seed, scale):
    n, p = shape
    coordinates = scale * random_coordinates(n, p, reduced, batch, seed)
    frame = householder_frame(coordinates, n, p, reduced=reduced)
    assert frame.shape == (*batch, n, p)
    assert frame.is_contiguous()
    assert orthonormality(frame) <= 1e-13
    for index in itertools.product(*map(range, batch)):
        assert_close(frame[index], sequential(coordinates[index], n, p, reduced))


@pytest.mark.parametrize("reduced", CHARTS)
def test_large_float32_frames_are_orthonormal(reduced):
    for seed, scale in ((0, 0.015), (1, 1.0)):
        coordinates = scale * random_coordinates(4608, 128, reduced, seed=seed, dtype=torch.float32)
        assert orthonormality(householder_frame(coordinates, 4608, 128, reduced=reduced)) <= 5e-6


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("reduced", CHARTS)
def test_zero_is_minus_the_identity(n, p, reduced):
    zero = torch.zeros(num_coordinates(n, p, reduced=reduced))
    assert torch.equal(householder_frame(zero, n, p, reduced=reduced), -torch.eye(n, p))


def test_square_frames_have_one_determinant():
    for p, seed in itertools.product((1, 2, 5), range(4)):
        frame = householder_frame(random_coordinates(p, p, seed=seed), p, p)
        assert_close(torch.linalg.det(frame), torch.tensor((-1.0) ** p, dtype=torch.float64))


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_reduced_frames_have_a_triangular_leading_block(n, p):
    frame = householder_frame(random_coordinates(n, p, True), n, p, reduced=True)
    assert torch.equal(frame[:p].tril(-1), torch.zeros(p, p, dtype=torch.float64))


@settings(max_examples=15, deadline=None)
@given(shape=shapes, reduced=st.booleans(), seed=seeds)
def test_as_many_coordinates_as_dimensions(shape, reduced, seed):
    """The Jacobian has full rank; so the count is the dimension of the Stiefel manifold, or the Grassmann manifold."""
    n, p = shape
    coordinates = random_coordinates(n, p, reduced, seed=seed)
    assume(coordinates.numel() > 0)
    assert coordinates.numel() == (p * (n - p) if reduced else n * p - p * (p + 1) // 2)
    jacobian = torch.func.jacrev(lambda c: householder_frame(c, n, p, reduced=reduced))(coordinates)
    assert torch.linalg.matrix_rank(jacobian.reshape(n * p, -1), rtol=1e-10) == coordinates.numel()


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


@pytest.mark.parametrize("reduced", CHARTS)
@pytest.mark.parametrize(("n", "p", "batch"), [(5, 3, ()), (3, 3, ()), (4, 1, ()), (4, 2, (2,)), (3, 2, (2, 1))])
def test_first_and_second_derivatives(n, p, batch, reduced):
    coordinates = random_coordinates(n, p, reduced, batch).requires_grad_()
    if coordinates.numel() == 0:
        return

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


@pytest.mark.parametrize("reduced", CHARTS)
@pytest.mark.parametrize(("n", "p"), [(6, 3), (4, 1), (3, 3)])
def test_functional_derivatives_agree(n, p, reduced):
    coordinates = random_coordinates(n, p, reduced)
    if coordinates.numel() == 0:
        return

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


# ------------------------------------------------------------------------------------------------ precision, memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduced", CHARTS)
def test_half_precision_is_float32_rounded(dtype, reduced):
    coordinates = random_coordinates(20, 6, reduced, dtype=dtype)
    frame = householder_frame(coordinates, 20, 6, reduced=reduced)
    assert frame.dtype == dtype
    assert torch.equal(frame, householder_frame(coordinates.float(), 20, 6, reduced=reduced).to(dtype))
    assert gradient_of(lambda c: householder_frame(c, 20, 6, reduced=reduced), coordinates, frame).dtype == dtype
    if not reduced:
        back, signs = householder_coordinates(frame)
        assert back.dtype == signs.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(householder_frame(back, 20, 6) * signs, frame, atol=4 * eps, rtol=0)


@pytest.mark.parametrize("reduced", CHARTS)
def test_autocast_changes_nothing(reduced):
    coordinates = random_coordinates(30, 8, reduced, dtype=torch.float32).requires_grad_()
    weight = normal(30, 8, seed=1, dtype=torch.float32)

    def both(create_graph):
        frame = householder_frame(coordinates, 30, 8, reduced=reduced)
        return frame, *torch.autograd.grad(frame, coordinates, weight, create_graph=create_graph)

    for create_graph in (False, True):
        expected = both(create_graph)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = both(create_graph)
            coordinates_of_frame, _ = householder_coordinates(expected[0], reduced=reduced)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        assert coordinates_of_frame.dtype == torch.float32


def peak_memory(function):
    """Bytes that are allocated at once while it runs, temporaries within torch's operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del result
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("reduced", CHARTS)
def test_no_temporaries_of_the_frame_s_size(reduced):
    n, p = 4608, 64
    coordinates = random_coordinates(n, p, reduced, dtype=torch.float32).requires_grad_()
    weight, size = normal(n, p, seed=1, dtype=torch.float32), n * p * 4
    frame = householder_frame(coordinates, n, p, reduced=reduced)

    def backward(create_graph=False):
        return torch.autograd.grad(frame, coordinates, weight, retain_graph=True, create_graph=create_graph)

    assert size <= peak_memory(lambda: householder_frame(coordinates, n, p, reduced=reduced)) <= 1.2 * size
    assert 0.9 * size <= peak_memory(backward) <= 1.2 * size
    assert peak_memory(lambda: backward(create_graph=True)) <= 6 * size


# --------------------------------------------------------------------------------------------------------- inverse


@settings(max_examples=40, deadline=None)
@given(shape=shapes, batch=batches, seed=seeds, scheme=st.sampled_from(["lapack", "free"]))
def test_inverse_of_any_frame(shape, batch, seed, scheme):
    n, p = shape
    target = random_frame(n, p, batch, seed)
    coordinates, signs = householder_coordinates(target, signs=None if scheme == "lapack" else torch.zeros(p))
    assert coordinates.shape == (*batch, num_coordinates(n, p))
    assert signs.shape == (*batch, p)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert_close(householder_frame(coordinates, n, p) * signs.unsqueeze(-2), target)
    for flat in coordinates.flatten(0, -2) if batch else (coordinates,):
        assert squared_lengths(flat, n, p).max() <= 2 + 1e-9


@settings(max_examples=40, deadline=None)
@given(shape=shapes, reduced=st.booleans(), batch=batches, seed=seeds)
def test_a_chart_has_one_set_of_coordinates_for_each_frame(shape, reduced, batch, seed):
    """Forced signs return the coordinates that made the frame; free ones, others that make it up to the signs."""
    n, p = shape
    coordinates = random_coordinates(n, p, reduced, batch, seed)
    frame = householder_frame(coordinates, n, p, reduced=reduced)
    back, signs = householder_coordinates(frame, reduced=reduced, signs=torch.ones(p))
    assert torch.equal(signs, torch.ones_like(signs))
    assert_close(back, coordinates, atol=1e-9)
    assert_close(householder_frame(back, n, p, reduced=reduced), frame)
    turned = frame * (-1.0) ** torch.arange(p)
    back, signs = householder_coordinates(turned, reduced=reduced)
    assert_close(householder_frame(back, n, p, reduced=reduced) * signs.unsqueeze(-2), turned)
    for flat in back.flatten(0, -2) if batch else (back,):
        assert squared_lengths(flat, n, p, reduced).max() <= 2 + 1e-9


@pytest.mark.parametrize(("n", "p"), SHAPES)
@pytest.mark.parametrize("reduced", CHARTS)
def test_panels_of_columns_are_eliminated_as_single_ones(n, p, reduced):
    """LAPACK and the elimination with free signs choose the same signs, so the same coordinates."""
    target = householder_frame(random_coordinates(n, p, reduced, seed=3), n, p, reduced=reduced)
    for a, b in zip(
        householder_coordinates(target, reduced=reduced),
        householder_coordinates(target, reduced=reduced, signs=torch.zeros(p)),
        strict=True,
    ):
        assert_close(a, b, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("n", "p"), [(3, 3), (6, 4), (40, 35)])
def test_inverse_of_signed_permutations(n, p, sign):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.arange(p), torch.arange(p).flip(0), *(torch.randperm(n, generator=generator)[:p] for _ in range(8))]
    for chosen in rows:
        target = sign * torch.eye(n, dtype=torch.float64)[:, chosen]
        for wanted in (None, torch.zeros(p)):
            coordinates, signs = householder_coordinates(target, signs=wanted)
            assert_close(householder_frame(coordinates, n, p) * signs, target, atol=1e-12)
            assert squared_lengths(coordinates, n, p).max() <= 2 + 1e-9


@pytest.mark.parametrize("reduced", CHARTS)
def test_columns_that_only_the_other_sign_makes(reduced):
    target = torch.eye(5, 3, dtype=torch.float64)
    coordinates, signs = householder_coordinates(target, reduced=reduced)
    assert signs.tolist() == [-1, -1, -1]
    assert_close(householder_frame(coordinates, 5, 3, reduced=reduced) * signs, target)
    forced = torch.tensor([0, -1, 1])
    with pytest.raises(ValueError, match=r"column 2 takes the sign \+1; -1 can be taken"):
        householder_coordinates(target, reduced=reduced, signs=forced)
    with pytest.raises(ValueError, match=r"column 1 takes the sign -1; \+1 can be taken"):
        householder_coordinates(-target, reduced=reduced, signs=forced)
    # in the second frame of a batch, in the second panel of columns
    batch = torch.stack((-torch.eye(50, 40), -torch.eye(50, 40)))
    batch[1, 34, 34] = 1
    with pytest.raises(ValueError, match=r"column 34 takes the sign \+1"):
        householder_coordinates(batch, reduced=reduced, signs=torch.ones(40))


@pytest.mark.parametrize("p", [1, 2, 5, 33])
def test_square_frames_of_the_wrong_determinant(p):
    target = householder_frame(random_coordinates(p, p), p, p)
    target[:, -1] *= -1
    with pytest.raises(ValueError, match=rf"column {p - 1} takes the sign \+1; -1 can be taken"):
        householder_coordinates(target, signs=torch.ones(p))
    only_last_free = torch.ones(p)
    only_last_free[-1] = 0
    coordinates, signs = householder_coordinates(target, signs=only_last_free)
    assert signs.tolist() == [1.0] * (p - 1) + [-1.0]
    assert_close(householder_frame(coordinates, p, p) * signs, target)


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("reduced", CHARTS)
def test_forced_signs_near_the_edge_of_the_chart(distance, reduced):
    """Columns close to +e_i need long reflectors, |h|² = 2 / (1 - x), and are reproduced to rounding nevertheless."""
    n, p = 40, 12
    noise = distance * normal(n, p)
    if reduced:
        noise[:p] = 0
    target, r = torch.linalg.qr(torch.eye(n, p, dtype=torch.float64) + noise)
    target = target * r.diagonal().sign()
    if reduced:  # rounding is no reason to reflect along the entries that the chart has not
        target[:p] = target[:p].triu() + 1e-16 * normal(p, p, seed=1).tril(-1)
    coordinates, signs = householder_coordinates(target, reduced=reduced, signs=torch.ones(p))
    assert torch.equal(signs, torch.ones(p, dtype=torch.float64))
    assert_close(householder_frame(coordinates, n, p, reduced=reduced), target)
    first = squared_lengths(coordinates, n, p, reduced)[0]
    tail = target[p if reduced else 1 :, 0].square().sum()
    torch.testing.assert_close(first, 2 * (1 + target[0, 0]) / tail, rtol=1e-9, atol=0)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_mixed_signs(shape, seed):
    n, p = shape
    target = random_frame(n, p, (2,), seed)
    wanted = torch.randint(-1, 2, (2, p), generator=torch.Generator().manual_seed(seed))
    wanted[..., -1] = 0  # of a square frame the last sign is given
    coordinates, signs = householder_coordinates(target, signs=wanted)
    assert torch.equal(torch.where(wanted == 0, signs, wanted.to(signs)), signs)
    assert_close(householder_frame(coordinates, n, p) * signs.unsqueeze(-2), target, atol=1e-12)


def test_inverse_of_large_float32_frames():
    target = random_frame(1152, 128, dtype=torch.float32)
    for wanted in (None, torch.ones(128)):
        coordinates, signs = householder_coordinates(target, signs=wanted)
        assert coordinates.dtype == torch.float32
        assert_close(householder_frame(coordinates, 1152, 128) * signs, target, atol=5e-6)


def test_inverse_leaves_its_argument_alone():
    target = random_frame(6, 3).requires_grad_()
    before = target.detach().clone()
    for wanted in (None, torch.ones(3)):
        coordinates, _ = householder_coordinates(target, signs=wanted)
        assert not coordinates.requires_grad
    assert torch.equal(target.detach(), before)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("n", "p"), [(3, 4), (3, 0), (0, 0)])
def test_shapes_that_are_no_frame(n, p):
    with pytest.raises(ValueError, match=f"1 <= p <= n, got n={n}, p={p}"):
        num_coordinates(n, p)
    with pytest.raises(ValueError, match=f"1 <= p <= n, got n={n}, p={p}"):
        householder_frame(torch.zeros(3), n, p)


def test_coordinates_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 9\) for the full chart of 5 x 3 frames, got \(6,\)"):
        householder_frame(torch.zeros(6), 5, 3)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 6\) for the reduced chart of 5 x 3 frames, got \(2, 9\)"):
        householder_frame(torch.zeros(2, 9), 5, 3, reduced=True)
    with pytest.raises(ValueError, match=r"got \(\)"):
        householder_frame(torch.tensor(0.0), 1, 1)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=f"real floating-point numbers, got dtype {dtype}"):
            householder_frame(torch.zeros(9, dtype=dtype), 5, 3)


def test_matrices_that_are_no_frame():
    with pytest.raises(ValueError, match=r"1 <= p <= n, got \(3, 5\)"):
        householder_coordinates(torch.eye(3, 5))
    with pytest.raises(ValueError, match=r"1 <= p <= n, got \(3,\)"):
        householder_coordinates(torch.ones(3))
    with pytest.raises(ValueError, match="orthonormal columns: UᵀU - I reaches 3"):
        householder_coordinates(2 * torch.eye(5, 3))
    with pytest.raises(ValueError, match="orthonormal columns: UᵀU - I reaches nan"):
        householder_coordinates(torch.full((5, 3), torch.nan))
    with pytest.raises(ValueError, match="upper triangular leading block: below its diagonal frame reaches 1"):
        householder_coordinates(torch.eye(5)[:, [1, 0, 2]], reduced=True)
    with pytest.raises(TypeError, match=r"got dtype torch\.int64"):
        householder_coordinates(torch.eye(5, 3, dtype=torch.int64))


def test_signs_that_are_none():
    with pytest.raises(ValueError, match=r"signs must be \+1, -1, or 0 for either, got \[0\.5, 1\.0\]"):
        householder_coordinates(torch.eye(5, 3), signs=torch.tensor([1, 0.5, 1]))
    with pytest.raises(ValueError, match=r"signs must broadcast to shape \(3,\), got \(2,\)"):
        householder_coordinates(torch.eye(5, 3), signs=torch.ones(2))


def test_nan_passes_through():
    coordinates = torch.zeros(num_coordinates(5, 3))
    coordinates[0] = torch.nan
    assert householder_frame(coordinates, 5, 3).isnan().any()
