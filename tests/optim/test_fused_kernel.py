"""The C kernel of fused steps: built once, done without where no compiler is, the same on any number of threads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retract.manifolds import PSI
from retract.optim import PSISGD, _fused


@pytest.fixture
def forget_kernel() -> Iterator[None]:
    for cached in (_fused.available, _fused._library):
        cached.cache_clear()
    yield
    for cached in (_fused.available, _fused._library):
        cached.cache_clear()


@pytest.mark.usefixtures("forget_kernel")
def test_kernel_is_built_once_into_the_users_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _fused.available()
    (built,) = (tmp_path / "retract").iterdir()
    stamp = built.stat().st_mtime_ns
    _fused._library.cache_clear()
    _fused._library()
    assert built.stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("forget_kernel")
@pytest.mark.parametrize("compiler", ["false", None])
def test_without_a_compiler_fused_says_so_and_the_default_goes_on(
    compiler: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler:
        monkeypatch.setenv("CC", shutil.which(compiler) or compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(shutil, "which", lambda _: None)
    w = nn.Parameter(torch.randn(3, 3))
    w.grad = torch.randn(3, 3)
    with pytest.raises(RuntimeError, match="C compiler"):
        PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, fused=True).step()
    before = w.detach().clone()
    PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1).step()
    assert not torch.equal(before, w)


def test_kernel_gives_the_same_bits_on_any_number_of_threads() -> None:
    def train(threads: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(64, 32, 3, 3, generator=generator))
        w.grad = torch.randn(w.shape, generator=generator)
        optimizer = PSISGD([{"params": [w], "manifold": PSI()}], lr=0.1, momentum=0.9, fused=True)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimizer.step()
            optimizer.step()
        finally:
            torch.set_num_threads(before)
        return w.detach()

    assert torch.equal(train(1), train(2))
