"""Coordinates of given frames: one set for each, signs of columns free or forced, the edge of the chart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds.householder import householder_coordinates, householder_frame, num_coordinates
from tests.manifolds.householder_frames import (
    CHARTS,
    SHAPES,
    assert_close,
    batches,
    normal,
    random_coordinates,
    reflectors,
    seeds,
    shapes,
)


def random_frame(n, p, batch=(), seed=0, dtype=torch.float64):
    """Haar: so that no chart had a hand in it."""
    q, r = torch.linalg.qr(normal(*batch, n, p, seed=seed))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(dtype)


def squared_lengths(coordinates, n, p, reduced=False):
    return reflectors(coordinates, n, p, reduced).square().sum(0)


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
