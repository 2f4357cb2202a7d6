"""Operator norms of convolutions: exact for circular padding, and a bound for both paddings and every size.

A convolution of stride 1 multiplies each frequency w of its input by the matrix

    F(w) = sum_k W_k exp(-i <k, w>),    (out, in),  k over the taps of the kernel.

On a circle of N points its norm is the largest singular value of F at the multiples of 2 pi / N (Sedghi, Gupta,
Long, "The singular values of convolutional layers", ICLR 2019). On the whole line it is the supremum over all w. That
also bounds each restriction to finitely many inputs and outputs: zero padding of any width, any size, any stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["circular_excess", "conv_norm", "conv_norm_bound"]

_HALF = (torch.float16, torch.bfloat16)
# Doublings of the Chebyshev degree: three bound the largest of 128 singular values to 2 % in random kernels, and to
# 7 % (of 512, to 10 %) where many others are about half as large.
_DOUBLINGS = 3
# Frequency responses of more entries than this are not held at once: about what a cache holds.
_ENTRIES = 2**18


def conv_norm(weight: Tensor, size: int | Sequence[int], stride: int | Sequence[int] = 1) -> Tensor:
    """Spectral norm of the convolution of a circular signal, exactly: max ||y|| / ||x|| over inputs x.

    Differentiable where the largest singular value is simple. It takes the singular values of an (out, in) matrix
    for every second position: for measurement rather than for every training step, which has `conv_norm_bound`.

    Args:
        weight: kernel (out, in, k...) with one to three spatial dimensions. It may be larger than the signal, which it
            then goes around more than once. A transposed convolution is the adjoint of the convolution with the same
            weight: pass it as it is. Of a grouped convolution, pass the groups one by one: its norm is the largest.
        size: positions of the input per spatial dimension; an int stands for all dimensions.
        stride: divides ``size``; an int stands for all dimensions.

    Returns:
        A scalar in the dtype of ``weight`` (half precision is computed in float32). A weight with NaN raises
        LinAlgError.

    Raises:
        TypeError: a weight that is not real floating-point.
        ValueError: a weight with no or more than three spatial dimensions; ``size`` or ``stride`` of another length,
            not positive, or not dividing.
    """
    kernel = _checked(weight)
    sizes, strides = _per_dimension("size", size, kernel), _per_dimension("stride", stride, kernel)
    if any(n % s for n, s in zip(sizes, strides, strict=True)):
        raise ValueError(f"stride must divide size, got size {sizes} and stride {strides}")
    # Subsampling adds up the frequencies that it cannot tell apart: base + alias, for every alias.
    aliases = _grid(strides, [2 * math.pi / s for s in strides], kernel.device)
    counts = [n // s for n, s in zip(sizes, strides, strict=True)]
    counts[-1] = counts[-1] // 2 + 1  # conjugate frequencies have equal norms
    base = _grid(counts, [2 * math.pi / n for n in sizes], kernel.device)

    def norms(frequencies: Tensor) -> Tensor:
        real, imaginary = _response(kernel, (frequencies.unsqueeze(1) + aliases).flatten(0, 1))
        response = torch.complex(real, imaginary).unflatten(0, (len(frequencies), len(aliases)))
        largest: Tensor = torch.linalg.matrix_norm(response.movedim(1, -2).flatten(-2), 2)
        return largest / math.sqrt(len(aliases))

    with torch.autocast(kernel.device.type, enabled=False):
        return _largest(norms, base, kernel[..., 0].numel() * len(aliases)).to(weight.dtype)


def conv_norm_bound(weight: Tensor, *, oversampling: int = 4, matrix_norm: Tensor | float | None = None) -> Tensor:
    r"""Bound the spectral norm of a convolution: for every input size, padded by zeros or circularly.

    The smaller of two bounds, both valid up to rounding:

    - The largest norm of F(w) on a grid of ``oversampling * (k - 1)`` points per dimension of k taps, over
      ``cos(pi / (2 oversampling))`` per dimension: 1.17 times it in two dimensions. Let u, v be singular vectors at the
      supremum. Along one dimension ``Re(u* F(w) v)`` is, but for the phase of the middle of the kernel, a trigonometric
      polynomial of degree (k - 1) / 2, and such a polynomial stays above the cosine of its degree around its maximum
      (M. Riesz 1914); the nearest point of the grid is at most half of a step away. Dimensions follow one by one. The
      norms on the grid are bounded themselves, by Chebyshev polynomials of degree 8 of the Gram matrices of F(w): the
      powers of Gram iteration (Delattre et al., ICML 2023, AISTATS 2024) take as many products for twice the slack.
    - ``sqrt(k1 k2 ...)`` times the spectral norm of the kernel as a matrix (out, in k1 k2 ...), by Cauchy-Schwarz.

    It holds for dilated, strided and transposed convolutions too, not for reflected or replicated padding, nor for
    circular padding by more than the kernel takes away, which computes some outputs twice. It is 1.15
    to 1.2 times the norm of random 3 x 3 kernels, and at most 1.25 times that of any with min(out, in) = 128.

    With c = min(out, in), c' the other and 3 x 3 taps it takes ``130 c^2 c' + 400 c^3`` operations, in matrix products
    alone if ``matrix_norm`` is given, and hardly more for the gradient, which is taken at one frequency. That is little
    for the kernel (rank, in, k...) of a layer of low rank. Of a full kernel, out = in = c, it is c / 17 % of what a
    training step of its layer takes for 64 images of 16 x 16.

    Args:
        weight: kernel (out, in, k...) with one to three spatial dimensions; transposed and grouped convolutions
            as in `conv_norm`.
        oversampling: two or more. Six times brings the 1.17 down to 1.07, at 9 / 4 of the cost.
        matrix_norm: the spectral norm of ``weight.flatten(1)``, a scalar, if it is known. Otherwise it is taken from
            `torch.linalg.eigvalsh`, for which a GPU stops.

    Returns:
        A scalar in the dtype of ``weight`` (half precision is computed in float32, and rounded up). Differentiable
        where the largest frequency and the smaller bound are unique; the gradient at a zero kernel is zero. A weight
        with NaN gives NaN or raises LinAlgError.

    Raises:
        TypeError: a weight that is not real floating-point.
        ValueError: a weight with no or more than three spatial dimensions; ``oversampling`` below two.
    """
    if not isinstance(oversampling, int) or oversampling < 2:
        raise ValueError(f"oversampling must be an integer of 2 or more, got {oversampling!r}")
    kernel = _checked(weight)
    taps = kernel.shape[2:]
    # The norm is homogeneous, and of a kernel of largest entry 1 no product overflows. A zero kernel counts as ones.
    scale = kernel.detach().abs().amax()
    zero = (scale == 0).to(kernel.dtype)
    kernel = kernel / (scale + zero) + zero
    with torch.autocast(kernel.device.type, enabled=False):
        bound = math.sqrt(math.prod(taps)) * _known_or_computed(matrix_norm, kernel, scale)
        if math.prod(taps) > 1:
            bound = torch.minimum(bound, scale * _frequency_bound(kernel, oversampling))
    return (bound * (1 + torch.finfo(weight.dtype).eps) if weight.dtype in _HALF else bound).to(weight.dtype)


def circular_excess(layer: Any) -> tuple[int, ...]:
    """How many outputs a circularly padded convolution of stride 1 has more than inputs, per dimension; these repeat
    others.
    """
    taken = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer.padding, str):
        added = taken if layer.padding == "same" else [0] * len(taken)
    else:
        added = [2 * amount for amount in layer.padding]
    return tuple(a - t for a, t in zip(added, taken, strict=True))


def _frequency_bound(kernel: Tensor, oversampling: int) -> Tensor:
    """The first bound."""
    taps = kernel.shape[2:]
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.transpose(0, 1)

    def norms(frequencies: Tensor) -> Tensor:
        return _eigenvalue_bound(_gram(*_response(kernel, frequencies))).sqrt()

    largest = _largest(norms, _samples(taps, oversampling, kernel.device), kernel.shape[0] * kernel.shape[1])
    return largest / math.cos(math.pi / (2 * oversampling)) ** sum(k > 1 for k in taps)


def _checked(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a real floating-point tensor, got dtype {weight.dtype}")
    if not 3 <= weight.ndim <= 5 or 0 in weight.shape:
        raise ValueError(
            f"weight must be a non-empty kernel (out, in, k...) of one to three spatial dimensions, "
            f"got shape {tuple(weight.shape)}"
        )
    return weight.float() if weight.dtype in _HALF else weight


def _per_dimension(name: str, value: int | Sequence[int], kernel: Tensor) -> tuple[int, ...]:
    values = (value,) * (kernel.ndim - 2) if isinstance(value, int) else tuple(value)
    if len(values) != kernel.ndim - 2 or any(v < 1 for v in values):
        raise ValueError(f"{name} must be one or {kernel.ndim - 2} positive integers, got {value!r}")
    return values


def _grid(counts: Sequence[int], steps: Sequence[float], device: torch.device, start: float = 0.0) -> Tensor:
    """Points ``(start + i) * step``, i = 0 ... count - 1 in each dimension: (points, dimensions), in float64."""
    axes = [
        (torch.arange(n, dtype=torch.float64, device=device) + start) * step
        for n, step in zip(counts, steps, strict=True)
    ]
    return torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).flatten(0, -2)


def _samples(taps: Sequence[int], oversampling: int, device: torch.device) -> Tensor:
    """The grid of frequencies, one of each conjugate pair, (count, dimensions).

    It stands half of a step off zero, so that the halves of a dimension are conjugate.
    """
    counts = [max(1, oversampling * (k - 1)) for k in taps]
    steps = [2 * math.pi / n for n in counts]
    halved = max(range(len(taps)), key=taps.__getitem__)
    counts[halved] = -(-counts[halved] // 2)
    return _grid(counts, steps, device, start=0.5)


def _response(kernel: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of F at frequencies (count, dimensions): (count, out, in)."""
    taps = _grid(kernel.shape[2:], [1.0] * (kernel.ndim - 2), kernel.device)
    angles = frequencies @ taps.mT
    phases = torch.cat((angles.cos(), -angles.sin())).to(kernel.dtype)
    real, imaginary = torch.tensordot(phases, kernel.flatten(2), dims=([1], [2])).chunk(2)
    return real, imaginary


def _gram(real: Tensor, imaginary: Tensor) -> Tensor:
    """F F* = A + i B, as the real matrix A + B: see `_eigenvalue_bound`."""
    return real @ (real - imaginary).mT + imaginary @ (imaginary + real).mT


def _eigenvalue_bound(hermitian: Tensor) -> Tensor:
    """Bound the largest eigenvalue of positive semidefinite Hermitian matrices from above: (count, r, r) to (count,).

    The bounds below eps are not sharp: the matrices of a kernel of largest entry 1 have an eigenvalue of 1 or more.

    G = A + i B comes as the real matrix M = A + B, of which A is the symmetric and B the skew part. Traces and
    Frobenius norms of G and M are the same, and G^2 belongs to ``M^T M + (M - M^T)(M + M^T) / 2``: two real products,
    where complex numbers take four.

    b = tr(G^2) / tr(G) is at most the largest eigenvalue, so that the largest of X = 2 G / b - 1 is 1 or more. There
    Chebyshev polynomials increase, and everywhere else on its spectrum they are smaller; so T(X) has its largest
    eigenvalue where X has. Mean and variance of all eigenvalues bound it (Wolkowicz, Styan, Linear Algebra Appl.
    1980). T has degree 8, being T_2(x) = 2 x^2 - 1 three times, which is then undone on the bound.
    """
    r = hermitian.shape[-1]
    identity = torch.eye(r, dtype=hermitian.dtype, device=hermitian.device)
    eps = torch.finfo(hermitian.dtype).eps
    b = (hermitian.square().sum((-2, -1)) / _trace(hermitian).clamp(min=eps)).clamp(min=eps)
    m = (2 / b)[:, None, None] * hermitian - identity
    for _ in range(_DOUBLINGS):
        m = torch.baddbmm(torch.baddbmm(identity, m.mT, m, beta=-1, alpha=2), m - m.mT, m + m.mT)
    mean = _trace(m) / r
    deviation: Tensor = torch.linalg.vector_norm((m - mean[:, None, None] * identity).flatten(1), dim=-1)
    bound = (mean + math.sqrt((r - 1) / r) * deviation).clamp(min=1)
    for _ in range(_DOUBLINGS):
        bound = ((1 + bound) / 2).sqrt()
    return b * (1 + bound) / 2


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _known_or_computed(matrix_norm: Tensor | float | None, kernel: Tensor, scale: Tensor) -> Tensor:
    """Spectral norm of ``scale * kernel`` as a matrix: as given, or from the smaller Gram matrix."""
    if isinstance(matrix_norm, Tensor):
        return matrix_norm
    if matrix_norm is not None:
        return scale.new_full((), matrix_norm)
    matrix = kernel.flatten(1)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return scale * eigenvalues[-1].sqrt()


def _largest(norms: Callable[[Tensor], Tensor], frequencies: Tensor, entries: int) -> Tensor:
    """The largest of the norms, recorded for the gradient at its own frequency alone."""
    with torch.no_grad():
        parts = frequencies.split(max(1, _ENTRIES // entries))
        index = torch.cat([norms(part) for part in parts]).argmax(0, keepdim=True)
    return norms(frequencies[index]).squeeze(0)
