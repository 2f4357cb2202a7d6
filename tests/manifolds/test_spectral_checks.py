"""What SVDSpectral's checks say is wrong, and which arguments it refuses."""

import copy

import pytest
import torch

from retract.manifolds.spectral import SVDSpectral
from tests.manifolds.spectral_points import SPECTRA, random_like, retractions, rng, scaled


@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
@retractions
def test_arguments_rebuild_it(spectrum, retraction):
    manifold = SVDSpectral(3, spectrum, retraction=retraction)
    rebuilt = SVDSpectral(**manifold.arguments)
    assert (str(rebuilt), rebuilt.spectrum, rebuilt.retraction) == (str(manifold), spectrum, retraction)
    assert copy.deepcopy(manifold).arguments == manifold.arguments
    assert str(SVDSpectral(3)) == "SVDSpectral(3, Free())"


def test_checks_say_what_is_wrong():
    manifold = SVDSpectral(3, "lipschitz")
    u, s, v = x = manifold.random(6, 5, dtype=torch.float64, generator=rng())
    nan = torch.full_like(u, torch.nan)
    for wrong, reason in (
        ((2 * u, s, v), "UᵀU - I reaches 3"),
        ((u, s, v + 1), "VᵀV - I reaches"),
        ((u, 2 * s, v), "s is 1 from Lipschitz"),
        ((u, s * torch.tensor([1, 1, -1]), v), "s is 0.5 from Lipschitz"),
        ((nan, s, v), "UᵀU - I reaches nan"),
        ((u, s * torch.nan, v), "NaN or infinite"),
        ((u, s[:2], v), r"shapes (m, 3), (3,), (n, 3), got ((6, 3), (2,), (5, 3))"),
        ((u[:, :2], s, v), "got ((6, 2), (3,), (5, 3))"),
        ((u[:2], s, v), "rank 3 exceeds min(m, n) of a matrix of shape (2, 5)"),
        ((u, s), "tuple of three tensors (U, s, V), got ((6, 3), (3,))"),
        (u, "got one tensor of shape (6, 3)"),
        (tuple(t.long() for t in x), "got dtype torch.int64"),
    ):
        ok, why = manifold.check_point_on_manifold(wrong, explain=True)
        assert not ok and reason in why, why
        assert manifold.check_point_on_manifold(wrong) is False
    tangent = manifold.proju(x, random_like(x))
    assert manifold.check_vector_on_tangent(x, scaled(1e6, tangent))
    for wrong, reason in (
        ((tangent[0] + 1e-3 * u, *tangent[1:]), "dU is"),
        ((tangent[0], tangent[1] + 1e-3, tangent[2]), "ds is 0.001 off the normal form"),
        ((*tangent[:2], tangent[2] + 1e-3 * v), "off the normal form"),
        ((tangent[0] * torch.nan, *tangent[1:]), "dU is nan"),
        ((tangent[0], tangent[1][:2], tangent[2]), "they must agree"),
    ):
        ok, why = manifold.check_vector_on_tangent(x, wrong, explain=True)
        assert not ok and reason in why, why


def test_bad_arguments():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        SVDSpectral(0)
    for rank in (2.0, True, "2"):
        with pytest.raises(TypeError, match="rank must be an int, got"):
            SVDSpectral(rank)
    with pytest.raises(ValueError, match="retraction must be 'svd' or 'qr', got 'polar'"):
        SVDSpectral(2, retraction="polar")
    with pytest.raises(ValueError, match="spectrum must be one of identity, free, lipschitz, bounded"):
        SVDSpectral(2, "unit")
    manifold = SVDSpectral(4)
    for call in (
        lambda: manifold.random(3, 9),
        lambda: manifold.origin(9, 3),
        lambda: manifold.dimension((3, 9)),
        lambda: manifold.project(torch.zeros(9, 3)),
    ):
        with pytest.raises(ValueError, match=r"rank 4 exceeds min\(m, n\) of a matrix of shape"):
            call()
    with pytest.raises(ValueError, match=r"two or more dimensions, got shape \(5,\)"):
        manifold.project(torch.zeros(5))
    x = manifold.random(6, 5)
    for ambient in (torch.zeros(5, 6), (torch.zeros(6, 2), torch.zeros(6, 2))):
        with pytest.raises(ValueError, match=r"ambient must have shape \(6, 5\), got \((5, 6|6, 6)\)"):
            manifold.tangent(x, ambient)
    with pytest.raises(ValueError, match=r"vector has shapes .* they must agree"):
        manifold.retr(x, manifold.random(7, 5))


@retractions
def test_nan_never_passes(retraction):
    manifold = SVDSpectral(3, retraction=retraction)
    for x in (manifold.random(6, 5), manifold.random(6, 5, dtype=torch.float64)):
        nan = tuple(t * torch.nan for t in x)
        with pytest.raises(ValueError, match="NaN or infinite entries have no projection"):
            manifold.projx(nan)
        with pytest.raises(ValueError, match="NaN or infinite entries has no projection"):
            manifold.project(manifold.embed(nan))
        for step in (nan, (x[0] * torch.nan, 0 * x[1], 0 * x[2])):
            with pytest.raises(torch.linalg.LinAlgError):
                manifold.retr(x, step)


@pytest.mark.parametrize("verb", ["dist", "expmap", "logmap"])
def test_what_is_not_offered_names_what_is(verb):
    x = SVDSpectral(2).origin(3, 3)
    with pytest.raises(NotImplementedError, match="it offers"):
        getattr(SVDSpectral(2), verb)(x, x)
