"""Points of SVDSpectral for its tests: spectra, sizes, random points and vectors, and velocities as matrices."""

import pytest
import torch
from hypothesis import strategies as st

from retract.manifolds.spectrum import Bounded, Free, Identity, Lipschitz

# Bounded is wide enough for the unit steps of the diagnostics to stay inside.
SPECTRA = [Identity(), Free(), Lipschitz(1.5), Bounded(0.05, 30.0)]
spectra = pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
retractions = pytest.mark.parametrize("retraction", ["svd", "qr"])
SHAPES = [(6, 5, 3), (5, 9, 5), (9, 5, 2), (4, 4, 4), (7, 4, 1), (1, 5, 1), (1, 1, 1)]
shapes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)).map(lambda t: (*t[:2], min(t)))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def random_like(x, seed=0, scale=1.0):
    generator = rng(seed)
    return tuple(scale * torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype) for t in x)


def scaled(a, u):
    return tuple(a * t for t in u)


def dense(manifold, x, u):
    """dW, by forward differentiation of `embed`."""
    return torch.func.jvp(manifold.embed, (x,), (u,))[1]


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
