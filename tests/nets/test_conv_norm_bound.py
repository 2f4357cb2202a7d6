"""The bound of the norm of a convolution: valid, tight, differentiable, and cheap."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from retract.nets.spectral import conv_norm, conv_norm_bound
from tests.nets.convolutions import (
    TRANSPOSED,
    channels,
    circular_matrix,
    frames,
    impulses,
    kernel,
    matrix_bound,
    norm,
    sizes_and_kernels,
    sup_norm,
    zero_padded_matrix,
)


def adversarial():
    """Kernels by what is hard about them."""
    spread = torch.diag(torch.cat((torch.ones(1), torch.full((35,), 1 / 6)))).double()
    alternating = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    return {
        "ones": torch.ones(4, 3, 3, 3, dtype=torch.float64),
        "one_tap": torch.zeros(4, 3, 3, 3, dtype=torch.float64).index_put(
            (*torch.tensor([[0], [0], [1], [2]]),), torch.tensor(2.0).double()
        ),
        "same_taps": kernel(4, 3, 1, 1).expand(4, 3, 3, 3).contiguous(),
        "alternating": torch.einsum("oi,h,w->oihw", kernel(4, 3), alternating, alternating),
        "separable": torch.einsum("oi,h,w->oihw", kernel(4, 3), kernel(3, seed=1), kernel(2, seed=2)),
        "rank_one": torch.einsum("o,ihw->oihw", kernel(5), kernel(4, 3, 3)),
        "isometry": torch.eye(6, dtype=torch.float64).reshape(6, 6, 1, 1) * torch.eye(3).double()[1].outer(alternating),
        "official_init": torch.eye(12, 108, dtype=torch.float64).reshape(12, 12, 3, 3),
        "half_the_values": torch.diag(torch.arange(8) % 2).double().reshape(8, 8, 1).expand(8, 8, 3).contiguous(),
        "one_large_value": spread.reshape(36, 36, 1).repeat(1, 1, 2),
        "tiny": kernel(4, 3, 3, 3) * 1e-200,
        "huge": kernel(4, 3, 3, 3) * 1e150,
        "first_and_last_tap": torch.tensor([1.0, 0, 0, 0, 1], dtype=torch.float64).reshape(1, 1, 5),
    }


@settings(max_examples=120, deadline=None)
@given(shapes=sizes_and_kernels, channels=channels, seed=st.integers(0, 2**31))
def test_bounds_zero_padded_and_circular_convolutions(shapes, channels, seed):
    taps, size, stride = shapes
    weight = kernel(*channels, *taps, seed=seed)
    bound = float(conv_norm_bound(weight)) * (1 + 1e-12)
    size = tuple(n + k - 1 for n, k in zip(size, taps, strict=True))
    for padding in {(0,) * len(taps), tuple(k // 2 for k in taps), tuple(k - 1 for k in taps)}:
        assert norm(zero_padded_matrix(weight, size, padding)) <= bound
        assert norm(zero_padded_matrix(weight, size, padding, stride)) <= bound
    assert norm(circular_matrix(weight, size, (1,) * len(taps))) <= bound
    assert sup_norm(weight) <= bound <= matrix_bound(weight) * (1 + 1e-10)


@pytest.mark.parametrize("name", adversarial())
@pytest.mark.parametrize("oversampling", [2, 3, 4])
def test_bounds_what_is_hard_to_bound(name, oversampling):
    weight = adversarial()[name]
    bound = float(conv_norm_bound(weight, oversampling=oversampling)) * (1 + 1e-12)
    largest = sup_norm(weight)
    for size in (3, 7, 12):
        size = (size,) * (weight.ndim - 2)
        if weight[0].numel() * math.prod(size) <= 1500:
            largest = max(largest, norm(zero_padded_matrix(weight, size, weight.shape[-1] // 2)))
    assert largest <= bound <= matrix_bound(weight) * (1 + 1e-10)


@pytest.mark.parametrize(
    ("taps", "slack"), [((3,), 1.1), ((5, 5), 1.2), ((3, 3), 1.2), ((3, 3, 3), 1.3), ((1, 3), 1.1)]
)
@pytest.mark.parametrize("make", [kernel, frames])
def test_is_tight_for_random_kernels(make, taps, slack):
    """The matrix bound is 1.4 to 2.8 times too large here."""
    weight = make(12, 9, *taps)
    assert float(conv_norm_bound(weight)) <= slack * sup_norm(weight)
    assert float(conv_norm_bound(weight, oversampling=12)) <= 1.08 * sup_norm(weight)


def test_hundred_random_kernels_and_the_published_start():
    """The bound by the matrix holds, is attained at frames of the identity, and is never exceeded by ours."""
    for seed in range(100):
        weight = kernel(6, 5, 3, 3, seed=seed)
        assert float(conv_norm(weight, 8)) <= float(conv_norm_bound(weight)) <= matrix_bound(weight)
    start = adversarial()["official_init"]
    assert float(conv_norm(start, 8)) == pytest.approx(3, rel=1e-12)
    assert float(conv_norm_bound(start)) == pytest.approx(3, rel=1e-12)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_correction_is_attained(k):
    """|1 + exp(i (k - 1) w)| falls off its maximum at 0 as fast as can be: no smaller correction would be one."""
    line = torch.zeros(k, dtype=torch.float64)
    line[[0, -1]] = 1
    for oversampling in (2, 4, 5):
        bound = float(conv_norm_bound(line.reshape(1, 1, k), oversampling=oversampling))
        assert bound == pytest.approx(2, rel=1e-12)
        if k > 2:  # of two taps, the matrix bound is as good
            square = float(conv_norm_bound(line.outer(line).reshape(1, 1, k, k), oversampling=oversampling))
            assert square == pytest.approx(4, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    r=st.integers(1, 40),
    power=st.floats(0.1, 20),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_bounds_matrices_of_every_spectrum(r, power, seed, dtype):
    """A kernel with one tap that counts has its norm at every frequency: only the eigenvalue bound is left."""
    values = torch.rand(r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** power
    weight = torch.zeros(r, r, 2, dtype=torch.float64)
    weight[..., 0] = frames(r, r, seed=seed) * values @ frames(r, r, seed=seed + 1)
    correction = 1 / math.cos(math.pi / 16)
    known = conv_norm_bound(weight.to(dtype), oversampling=8, matrix_norm=1e9)
    ratio = float(known) / (correction * float(values.amax()))
    assert 1 - 4 * torch.finfo(dtype).eps <= ratio <= 1.05


def test_few_large_values_do_not_overflow():
    """The Chebyshev polynomial of a matrix with one large eigenvalue and many of 1 / sqrt(r) of it."""
    r = 400
    weight = torch.zeros(r, r, 2)
    weight[..., 0] = torch.diag(torch.cat((torch.ones(1), torch.full((r - 1,), r**-0.25))))
    bound = conv_norm_bound(weight.requires_grad_(), matrix_norm=10.0)
    (gradient,) = torch.autograd.grad(bound, weight)
    assert float(bound.detach()) == pytest.approx(1 / math.cos(math.pi / 8), rel=1e-4)
    assert bool(torch.isfinite(gradient).all())


def test_bounds_dilated_and_transposed_convolutions():
    weight = kernel(3, 4, 3, 2)
    bound = float(conv_norm_bound(weight))
    assert bound == pytest.approx(float(conv_norm_bound(weight.transpose(0, 1), matrix_norm=norm(weight.flatten(1)))))
    assert norm(zero_padded_matrix(weight, (9, 8), padding=(2, 3), dilation=(2, 3))) <= bound
    for stride in (1, 2):
        transposed = TRANSPOSED[2](impulses(3, (4, 5)), weight, stride=stride, padding=1, output_padding=stride - 1)
        assert norm(transposed.flatten(1)) <= bound


def test_kernels_of_one_tap_are_matrices():
    weight = kernel(5, 3, 1, 1)
    assert float(conv_norm_bound(weight)) == pytest.approx(norm(weight.flatten(1)), rel=1e-12)


def test_a_known_matrix_norm_is_used():
    weight = kernel(4, 3, 3, 3)
    value = norm(weight.flatten(1))
    known = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(conv_norm_bound(weight, matrix_norm=known), conv_norm_bound(weight), rtol=1e-12)
    small = conv_norm_bound(weight, matrix_norm=known / 100)
    small.backward()
    assert float(small.detach()) == pytest.approx(0.03 * value, rel=1e-12)
    assert float(known.grad) == pytest.approx(0.03, rel=1e-12)
    assert float(conv_norm_bound(weight, matrix_norm=0.01)) == pytest.approx(0.03, rel=1e-12)


# ----------------------------------------------------------------------------------------------- gradient, dtypes


@pytest.mark.parametrize("shape", [(3, 4, 3, 2), (4, 3, 4), (2, 2, 2, 1, 3), (4, 3, 1, 1)])
def test_derivatives_of_the_bound(shape):
    weight = kernel(*shape).requires_grad_()
    assert torch.autograd.gradcheck(conv_norm_bound, weight)
    assert torch.autograd.gradgradcheck(conv_norm_bound, weight)


def test_derivatives_where_the_matrix_bound_is_smaller():
    weight = (torch.ones(3, 2, 3, 3) + 0.01 * kernel(3, 2, 3, 3)).double().requires_grad_()
    assert float(conv_norm_bound(weight.detach())) == pytest.approx(matrix_bound(weight.detach()), rel=1e-12)
    assert torch.autograd.gradcheck(conv_norm_bound, weight)


def test_a_step_against_the_gradient_lowers_the_norm():
    """The frequency whose gradient is taken is that of the largest norm."""
    weight = kernel(8, 6, 3, 3).requires_grad_()
    bound = conv_norm_bound(weight)
    (gradient,) = torch.autograd.grad(bound, weight)
    assert float((gradient * weight).sum().detach()) == pytest.approx(
        float(bound.detach()), rel=1e-10
    )  # Euler: homogeneous
    assert sup_norm((weight - 0.1 * gradient).detach()) < sup_norm(weight.detach())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_float32_at_every_scale(scale):
    exact = kernel(16, 12, 3, 3).requires_grad_()
    rounded = (exact.detach() * scale).float().requires_grad_()
    bounds = conv_norm_bound(exact), conv_norm_bound(rounded)
    assert float(bounds[1].detach()) == pytest.approx(float(bounds[0].detach()) * scale, rel=1e-6)
    assert float(conv_norm(rounded.detach(), 5)) == pytest.approx(float(conv_norm(exact.detach(), 5)) * scale, rel=1e-6)
    gradients = [torch.autograd.grad(b, w)[0] for b, w in zip(bounds, (exact, rounded), strict=True)]
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_up(dtype):
    for seed in range(20):
        weight = kernel(6, 5, 3, 3, seed=seed, dtype=dtype)
        bound, exact = conv_norm_bound(weight), float(conv_norm_bound(weight.float()))
        assert bound.dtype == conv_norm(weight, 4).dtype == dtype
        assert exact <= float(bound) <= exact * (1 + 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("norm", [conv_norm_bound, lambda w: conv_norm(w, 5)])
def test_zero_kernel(norm):
    weight = torch.zeros(4, 3, 3, 3, requires_grad=True)
    value = norm(weight)
    value.backward()
    assert float(value.detach()) == 0
    assert bool(torch.isfinite(weight.grad).all())


@pytest.mark.parametrize("norm", [conv_norm_bound, lambda w: conv_norm(w, 5)])
def test_autocast_does_not_lower_precision(norm):
    weight = kernel(8, 6, 3, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(weight), value := norm(weight))
    assert torch.equal(norm(weight), value)


# --------------------------------------------------------------------------------------------- execution, bad input


def test_bound_reads_no_value_on_the_host():
    """No step of training waits for a GPU; a fake tensor has no values to read."""
    with FakeTensorMode():
        weight = torch.empty(8, 6, 3, 3, requires_grad=True)
        conv_norm_bound(weight, matrix_norm=1.0).backward()
        assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("shape", [(32, 48, 3, 3), (48, 32, 3, 3)])
def test_work_is_as_documented(shape):
    """Of the smaller side, and with a gradient that is taken at one frequency of 32."""
    weight = kernel(*shape, dtype=torch.float32).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        bound = conv_norm_bound(weight, matrix_norm=100.0)
    with FlopCounterMode(display=False) as backward:
        bound.backward()
    assert forward.get_total_flops() <= 1.2 * (130 * 32**2 * 48 + 400 * 32**3)
    assert backward.get_total_flops() <= 0.1 * forward.get_total_flops()


def test_bound_compiles_without_graph_breaks():
    weight = kernel(8, 6, 3, 3)
    compiled = torch.compile(conv_norm_bound, backend="eager", fullgraph=True)
    assert torch.equal(compiled(weight), conv_norm_bound(weight))


def test_many_frequencies_are_taken_in_parts(monkeypatch):
    weight = kernel(6, 5, 3, 3)
    expected = conv_norm_bound(weight), conv_norm(weight, 9)
    monkeypatch.setattr("retract.nets._conv_norm._ENTRIES", 64)
    torch.testing.assert_close((conv_norm_bound(weight), conv_norm(weight, 9)), expected, rtol=1e-13, atol=0)


def test_nan_is_not_hidden():
    weight = kernel(4, 3, 3, 3)
    weight[0, 0, 0, 0] = torch.nan
    assert math.isnan(conv_norm_bound(weight, matrix_norm=1.0))
    with pytest.raises(torch.linalg.LinAlgError):
        conv_norm(weight, 4)
