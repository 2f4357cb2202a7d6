"""Kernels, and the explicit matrices of their convolutions."""

import itertools
import math

import torch
from hypothesis import strategies as st
from torch.nn import functional

from retract.nets.spectral import conv_norm

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


def kernel(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def impulses(channels, size):
    count = channels * math.prod(size)
    return torch.eye(count, dtype=torch.float64).reshape(count, channels, *size)


def circular_matrix(weight, size, stride):
    """Shifts of the input, tap by tap."""
    x = impulses(weight.shape[1], size)
    dims = tuple(range(2, x.ndim))
    y = 0
    for tap in itertools.product(*map(range, weight.shape[2:])):
        shifted = torch.roll(x, [-t for t in tap], dims)
        y = y + torch.einsum("oi,bi...->bo...", weight[(..., *tap)], shifted)
    return y[(..., *(slice(None, None, s) for s in stride))].flatten(1)


def zero_padded_matrix(weight, size, padding=0, stride=1, dilation=1):
    x = impulses(weight.shape[1], size)
    return CONV[len(size)](x, weight, padding=padding, stride=stride, dilation=dilation).flatten(1)


def sup_norm(weight):
    """The norm over all frequencies but 1 %: over many, and from below."""
    count = (64, 32, 8)[weight.ndim - 3]
    return float(conv_norm(weight, [count if k > 1 else 1 for k in weight.shape[2:]]))


def matrix_bound(weight):
    return math.sqrt(math.prod(weight.shape[2:])) * norm(weight.flatten(1))


def frames(out, fan_in, *kernel_shape, seed=0):
    """A kernel of orthonormal rows."""
    return torch.linalg.qr(kernel(fan_in * math.prod(kernel_shape), out, seed=seed))[0].mT.reshape(
        out, fan_in, *kernel_shape
    )


sizes_and_kernels = st.integers(1, 3).flatmap(
    lambda d: st.tuples(
        st.tuples(*[st.integers(1, (5, 4, 3)[d - 1])] * d),
        st.tuples(*[st.integers(1, (8, 3, 2)[d - 1])] * d),
        st.tuples(*[st.integers(1, 3)] * d),
    )
)
channels = st.tuples(st.integers(1, 3), st.integers(1, 3))
