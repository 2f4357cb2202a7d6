"""Tensor trains for the tests of STTP: sizes, random points and vectors, the tangent space without its formulas."""

import torch
from hypothesis import strategies as st

from retract.manifolds import Stiefel

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


def parameters(x):
    return [torch.nn.Parameter(t.clone()) for t in x]
