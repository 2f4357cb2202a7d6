"""Sets of singular values: projection, velocities, coordinates."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.manifolds.spectrum import Bounded, Free, Identity, Lipschitz, Spectrum, as_spectrum

SPECTRA = [Identity(), Free(), Lipschitz(), Lipschitz(2.5), Bounded(), Bounded(0.5, 3.0)]
spectra = pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
values = st.lists(st.floats(0, 4, allow_subnormal=False), min_size=1, max_size=6)


def allowed(spectrum: Spectrum, r: int, generator: torch.Generator) -> torch.Tensor:
    """Random values of the set, by its definition."""
    s = torch.rand(r, dtype=torch.float64, generator=generator)
    if isinstance(spectrum, Identity):
        return torch.ones_like(s)
    if isinstance(spectrum, Bounded):
        return spectrum.low + (spectrum.high - spectrum.low) * s
    if isinstance(spectrum, Lipschitz):
        return spectrum.c * s / s.max()
    return 4 * s


@spectra
@settings(max_examples=30, deadline=None)
@given(entries=values, seed=st.integers(0, 2**31))
def test_projection_is_the_nearest_point(spectrum, entries, seed):
    s = torch.tensor(entries, dtype=torch.float64)
    nearest = spectrum.project(s)
    assert spectrum.contains(nearest, atol=0) == (True, None)
    assert torch.equal(spectrum.project(nearest), nearest)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = allowed(spectrum, len(entries), generator)
        assert (s - nearest).norm() <= (s - other).norm() + 1e-12


@spectra
@settings(max_examples=20, deadline=None)
@given(r=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_constrained_velocities_stay_to_first_order_and_span_the_dimension(spectrum, r, seed):
    generator = torch.Generator().manual_seed(seed)
    s = spectrum.project(spectrum.spread(r, dtype=torch.float64)[torch.randperm(r, generator=generator)])
    basis = torch.stack([spectrum.constrain(s, e) for e in torch.eye(r, dtype=torch.float64)])
    torch.testing.assert_close(basis @ basis, basis)
    torch.testing.assert_close(basis, basis.mT)
    assert round(float(basis.trace())) == spectrum.dimension(r)
    moved = s + 1e-6 * spectrum.constrain(s, torch.randn(r, dtype=torch.float64, generator=generator))
    assert (spectrum.project(moved) - moved).abs().max() <= 1e-12


@spectra
@settings(max_examples=20, deadline=None)
@given(r=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_coordinates_invert_values(spectrum, r, seed):
    generator = torch.Generator().manual_seed(seed)
    s = allowed(spectrum, r, generator)
    signed = torch.tensor(spectrum.signed(r))
    s = torch.where(signed & (torch.rand(r, generator=generator) < 0.5), -s, s)
    if isinstance(spectrum, Lipschitz):
        s = s[s.abs().argsort(descending=True)]
        s[0] = spectrum.c
    theta = spectrum.coordinates(s)
    assert theta.shape == (spectrum.dimension(r),)
    torch.testing.assert_close(spectrum.values(theta, r), s, rtol=0, atol=4e-15)


def test_which_values_are_signed():
    assert Identity().signed(3) == Bounded().signed(3) == (False, False, False)
    assert Free().signed(3) == (True, True, True)
    assert Lipschitz().signed(3) == (False, True, True)


@spectra
@pytest.mark.parametrize("r", [1, 4])
def test_values_of_any_coordinates_are_allowed_and_differentiable(spectrum, r):
    theta = 5 * torch.randn(3, spectrum.dimension(r), dtype=torch.float64, generator=torch.Generator().manual_seed(r))
    s = spectrum.values(theta, r)
    assert s.shape == (3, r)
    assert spectrum.contains(s.abs(), atol=1e-15) == (True, None)
    assert bool((s >= 0)[:, ~torch.tensor(spectrum.signed(r))].all())
    if spectrum.dimension(r):
        assert torch.autograd.gradcheck(lambda t: spectrum.values(t, r), theta.requires_grad_())


@spectra
@pytest.mark.parametrize("r", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spread_is_inside_distinct_and_has_full_rank(spectrum, r, dtype):
    s = spectrum.spread(r, dtype=dtype)
    assert s.shape == (r,) and s.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert spectrum.contains(s, atol=8 * eps) == (True, None)
    if dtype == torch.bfloat16 or isinstance(spectrum, Identity):
        return
    assert bool((s.diff() < 0).all())
    theta = spectrum.coordinates(s)
    jacobian = torch.autograd.functional.jacobian(lambda t: spectrum.values(t, r), theta)
    assert torch.linalg.matrix_rank(jacobian.double(), rtol=1e-2) == spectrum.dimension(r)
    if isinstance(spectrum, Bounded):
        assert spectrum.low < s.min() and s.max() < spectrum.high


@pytest.mark.parametrize("spectrum", [Lipschitz(2.0), Bounded()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_at_the_bound_can_leave_it(spectrum, dtype):
    s = spectrum.project(torch.full((3,), 10.0, dtype=dtype))
    theta = spectrum.coordinates(s).requires_grad_()
    moved = spectrum.values(theta, 3)
    assert (moved - s).abs().max() <= 4 * torch.finfo(dtype).eps
    moved.sum().backward()
    assert theta.grad.abs().min() > 0.1 * torch.finfo(dtype).eps ** 0.5


def test_lipschitz_raises_the_first_largest_value_and_clamps_the_others():
    spectrum = Lipschitz(1.0)
    s = torch.tensor([[0.2, 0.7, 0.7], [2.0, 0.5, 3.0]])
    assert torch.equal(spectrum.project(s), torch.tensor([[0.2, 1.0, 0.7], [1.0, 0.5, 1.0]]))
    assert torch.equal(spectrum.constrain(s, torch.ones_like(s)), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))


@pytest.mark.parametrize(
    ("spectrum", "s", "reason"),
    [
        (Identity(), [1.0, 1.1], "0.1 from Identity"),
        (Free(), [1.0, -0.1], "0.1 from Free"),
        (Lipschitz(), [0.9, 0.5], "0.1 from Lipschitz"),
        (Lipschitz(), [1.1, 0.5], "0.1 from Lipschitz"),
        (Lipschitz(), [1.0, -0.1], "0.1 from Lipschitz"),
        (Bounded(), [1.1, 0.5], "0.1 from Bounded"),
        (Bounded(0.2), [1.0, 0.1], "0.1 from Bounded"),
        (Free(), [1.0, math.nan], "NaN or infinite"),
        (Free(), [1.0, math.inf], "NaN or infinite"),
        (Lipschitz(), [1.0, math.nan], "NaN or infinite"),
        (Bounded(), [1.0, math.nan], "NaN or infinite"),
    ],
)
def test_contains_says_what_is_wrong(spectrum, s, reason):
    ok, why = spectrum.contains(torch.tensor(s))
    assert not ok
    assert reason in why
    assert spectrum.contains(torch.tensor(s), atol=0.11)[0] == math.isfinite(sum(s))


@spectra
def test_leading_dimensions_are_a_batch(spectrum):
    s = 2 * torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ds = torch.randn(2, 3, 4, dtype=torch.float64)
    projected, constrained = spectrum.project(s), spectrum.constrain(s, ds)
    for i in range(2):
        for j in range(3):
            assert torch.equal(projected[i, j], spectrum.project(s[i, j]))
            assert torch.equal(constrained[i, j], spectrum.constrain(s[i, j], ds[i, j]))
    theta = torch.randn(2, 3, spectrum.dimension(4))
    assert spectrum.values(theta, 4).shape == (2, 3, 4)
    assert spectrum.values(theta, 4).dtype == theta.dtype


@spectra
def test_names_and_plain_values_rebuild_it(spectrum):
    described = {"name": spectrum.name, "arguments": spectrum.arguments}
    assert as_spectrum(described) == spectrum == as_spectrum(spectrum) == copy.deepcopy(spectrum)
    assert as_spectrum(spectrum.name) == type(spectrum)()
    assert eval(repr(spectrum)) == spectrum
    assert len({spectrum, copy.deepcopy(spectrum)}) == 1


def test_spectra_differ_by_their_arguments():
    assert Lipschitz(1.0) != Lipschitz(2.0)
    assert Lipschitz() != Lipschitz(of="operator")
    assert Bounded(0.1, 1.0) != Bounded(0.2, 1.0)
    assert Free() != Identity()


@pytest.mark.parametrize("c", [0, -1, math.inf, math.nan])
def test_bad_constants(c):
    with pytest.raises(ValueError, match="c must be finite and > 0, got"):
        Lipschitz(c)


@pytest.mark.parametrize("bounds", [(0, 1), (-1, 1), (1, 1), (2, 1), (0.1, math.inf), (math.nan, 1)])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match="low and high must be finite with 0 < low < high, got"):
        Bounded(*bounds)


def test_bad_arguments():
    with pytest.raises(ValueError, match="of must be 'matrix' or 'operator', got 'conv'"):
        Lipschitz(of="conv")
    with pytest.raises(ValueError, match="identity, free, lipschitz, bounded or a Spectrum, got 'unit'"):
        as_spectrum("unit")
    with pytest.raises(ValueError, match="identity, free, lipschitz, bounded"):
        as_spectrum({"c": 1.0})
    with pytest.raises(TypeError, match="name or a Spectrum, got int"):
        as_spectrum(3)
    with pytest.raises(ValueError, match=r"theta must have 2 coordinates for 3 values of Lipschitz.*got shape \(3,\)"):
        Lipschitz().values(torch.zeros(3), 3)
