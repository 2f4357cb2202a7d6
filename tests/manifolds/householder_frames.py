"""Householder frames for their tests: random coordinates, and the product of reflections by its definition."""

import itertools

import torch
from hypothesis import strategies as st

from retract.manifolds.householder import num_coordinates

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


def gradient_of(function, coordinates, weight):
    coordinates = coordinates.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(coordinates), coordinates, weight)
    return gradient


def orthonormality(frame):
    frame = frame.detach().double()
    return float((frame.mT @ frame - torch.eye(frame.shape[-1], dtype=torch.float64)).abs().max())


def assert_close(actual, expected, atol=1e-13):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
