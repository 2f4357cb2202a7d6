"""Implementations of PSI optimizers agree: single, multi and fused, blocks, layouts, precisions; what they allocate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSISGD, PSIAdam, PSIAngular
from retract.optim.psi import TRANSPORTS
from tests.optim.psi_runs import FAMILY, train


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    scale=st.integers(-8, 8),
    nesterov=st.booleans(),
    dampening=st.sampled_from([0.0, 0.4]),
    transport=st.sampled_from(TRANSPORTS),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_single_multi_and_fused_agree(
    rows: int, columns: int, scale: int, nesterov: bool, dampening: float, transport: str, maximize: bool, seed: int
) -> None:
    options = {
        "lr": 0.2,
        "momentum": 0.9,
        "nesterov": nesterov,
        "dampening": 0 if nesterov else dampening,
        "transport": transport,
        "maximize": maximize,
    }

    def train(**kind: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Tensor:
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

        weights = [nn.Parameter(draw() * 10.0**scale) for _ in range(3)]
        optimizer = PSISGD([{"params": weights, "manifold": PSI()}], **options, **kind)  # type: ignore[arg-type]
        for _ in range(4):
            for w in weights:
                w.grad = draw() * 10.0**-scale
            optimizer.step()
        return torch.stack([w.detach() for w in weights]) * 10.0**-scale

    single = train(foreach=False)
    torch.testing.assert_close(train(foreach=True), single, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(train(fused=True), single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", [PSISGD, PSIAngular, PSIAdam])
def test_blocks_cover_large_weights_and_stacks_small_ones(
    optimizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into blocks of three rows, stacked in pairs, or whole: the same step."""
    shapes = [(16, 10), (4, 10), (4, 10), (5, 10), (6, 7)]

    def train(foreach: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        options = {"momentum": 0.9} if optimizer is PSISGD else {}
        run = optimizer([{"params": weights, "manifold": PSI()}], lr=0.1, foreach=foreach, **options)
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            run.step()
        return [w.detach() for w in weights]

    whole = train(False)
    monkeypatch.setattr("retract.optim._scale._CUT_ENTRIES", 30)
    monkeypatch.setattr("retract.optim._scale._STACK_ENTRIES", {"cpu": 90})
    for foreach in (True, False):
        for a, b in zip(train(foreach), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [PSISGD, PSIAngular, PSIAdam])
def test_kernel_shares_out_every_row_of_large_weights(optimizer: Callable[..., Any]) -> None:
    """Its threads take some 65,000 entries at a time: many rows, one row, or part of the weights each."""
    shapes = [(1500, 64), (5, 20000), (70000, 1), (5, 7)]

    def train(**kind: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        options = {"momentum": 0.9} if optimizer is PSISGD else {}
        run = optimizer([{"params": weights, "manifold": PSI()}], lr=0.1, **options, **kind)
        for _ in range(2):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            run.step()
        return [w.detach() for w in weights]

    for a, b in zip(train(fused=True), train(foreach=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}], ids=str)
def test_memory_layout_does_not_matter(layout: str, kind: dict[str, bool]) -> None:
    def train(arrange: Callable[[Tensor], Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(arrange(torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64)))
        optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9, **kind)  # type: ignore[arg-type]
        for _ in range(4):
            w.grad = arrange(torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64))
            optimizer.step()
        return w.detach()

    def channels_last(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last)

    def transposed(x: Tensor) -> Tensor:
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    arrange = channels_last if layout == "channels_last" else transposed
    assert not arrange(torch.zeros(6, 4, 3, 3)).is_contiguous()
    torch.testing.assert_close(train(arrange), train(lambda x: x), rtol=1e-12, atol=1e-12)


def test_float32_stays_with_float64_for_ten_steps() -> None:
    """Check 19, first half; beyond some thirty steps float32 runs part ways by chaos."""
    wide, narrow = (train(FAMILY["parallel"], dtype, 10)[1] for dtype in (torch.float64, torch.float32))
    assert (wide - narrow).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("optimizer", [PSISGD, PSIAngular, PSIAdam])
def test_half_precision_weights_are_stepped_in_float32(
    dtype: torch.dtype, scale: float, optimizer: Callable[..., Any]
) -> None:
    """Check 19, second half: |w|^2 overflows float16 beyond 255 and underflows at 1e-4."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter((torch.randn(4, 16, generator=generator) * scale / 4).to(dtype))
    before = w.detach().float()
    run = (
        optimizer([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9)
        if optimizer is PSISGD
        else optimizer([{"params": [w], "manifold": PSI()}], lr=0.1)
    )
    for _ in range(3):
        w.grad = (torch.randn(4, 16, generator=generator) / scale).to(dtype)
        run.step()
    after = w.detach().float()
    assert after.isfinite().all()
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=2e-2, atol=0)
    assert PSI().angles(before, after).min() > 0.05


def test_no_step_allocates_a_temporary_of_model_size() -> None:
    """One buffer a weight is what the optimizer keeps; while it steps, blocks are all that it holds beside."""
    shape = (512, 512, 3, 3)  # 9.4 MB: three blocks
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    for w in weights:
        w.grad = torch.randn(shape)
    for kind in ({"fused": True}, {"foreach": True}):
        optimizer = PSISGD([{"params": weights, "manifold": PSI()}], lr=0.1, momentum=0.9, **kind)  # type: ignore[arg-type]
        optimizer.step()
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
            optimizer.step()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert largest <= 4 * 2**20 + 2**16
        kept = sum(t.numel() for state in optimizer.state.values() for t in state.values())
        assert kept == sum(w.numel() + 512 for w in weights)
