"""Norms of circular convolutions, against explicit matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retract.nets.spectral import conv_norm, conv_norm_bound
from tests.nets.convolutions import channels, circular_matrix, impulses, kernel, norm, sizes_and_kernels


@settings(max_examples=60, deadline=None)
@given(shapes=sizes_and_kernels, channels=channels, strided=st.booleans(), seed=st.integers(0, 2**31))
def test_is_the_norm_of_the_circular_matrix(shapes, channels, strided, seed):
    taps, blocks, stride = shapes
    stride = stride if strided else (1,) * len(taps)
    size = tuple(b * s for b, s in zip(blocks, stride, strict=True))
    weight = kernel(*channels, *taps, seed=seed)
    expected = norm(circular_matrix(weight, size, stride))
    assert float(conv_norm(weight, size, stride)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [(7, 6), (2, 9)])
def test_kernels_go_around_small_signals(size):
    weight = kernel(2, 3, 3, 11)
    expected = norm(circular_matrix(weight, size, (1, 1)))
    assert float(conv_norm(weight, size)) == pytest.approx(expected, rel=1e-12)


def test_is_the_norm_of_torchs_circular_layer():
    layer = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", stride=2, bias=False, dtype=torch.float64)
    layer.requires_grad_(False)
    matrix = layer(impulses(3, (6, 8))).flatten(1)
    assert float(conv_norm(layer.weight, (6, 8), stride=2)) == pytest.approx(norm(matrix), rel=1e-12)


def test_an_int_stands_for_all_dimensions():
    weight = kernel(3, 2, 3, 2)
    assert torch.equal(conv_norm(weight, 6, 2), conv_norm(weight, (6, 6), (2, 2)))


def test_derivatives_of_the_norm():
    weight = kernel(3, 4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: conv_norm(w, (5, 4)), weight)
    assert torch.autograd.gradcheck(lambda w: conv_norm(w, 4, 2), weight)
    assert torch.autograd.gradgradcheck(lambda w: conv_norm(w, (5, 4)), weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conv_norm_bound(torch.ones(2, 2)), ValueError, r"weight must be a non-empty kernel .* \(2, 2\)"),
        (lambda: conv_norm_bound(torch.ones(2, 0, 3)), ValueError, r"weight must be a non-empty kernel .* \(2, 0, 3\)"),
        (lambda: conv_norm(torch.ones(2, 2, 3, dtype=torch.int64), 4), TypeError, "dtype torch.int64"),
        (lambda: conv_norm_bound(torch.ones(2, 2, 3), oversampling=1), ValueError, "oversampling must be .* got 1"),
        (lambda: conv_norm(torch.ones(2, 2, 3, 3), (4, 4, 4)), ValueError, r"size must be one or 2 .* \(4, 4, 4\)"),
        (lambda: conv_norm(torch.ones(2, 2, 3), 0), ValueError, "size must be .* got 0"),
        (lambda: conv_norm(torch.ones(2, 2, 3), 4, (1, 1)), ValueError, "stride must be one or 1 positive"),
        (lambda: conv_norm(torch.ones(2, 2, 3), 5, 2), ValueError, r"stride must divide size, got size \(5,\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
