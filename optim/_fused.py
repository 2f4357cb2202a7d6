"""The C kernel behind ``fused=True``: found or compiled once, then called with all weights of a step at once."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._scale import ScaledParameter, row_shape

__all__ = ["available", "psisgd"]

_SOURCE = Path(__file__).with_name("_psisgd.c")
_FLAGS = ("-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off")
_SYMBOLS = {torch.float32: "psisgd_float", torch.float64: "psisgd_double"}


@cache
def available() -> bool:
    """Whether the kernel can be used here: it is compiled already, or a C compiler is at hand."""
    try:
        _library()
    except RuntimeError:
        return False
    return True


@cache
def _library() -> ctypes.CDLL:
    """Load the kernel from the user's cache, compiling it first if it is not there."""
    compiler = _compiler()
    key = "\0".join([_SOURCE.read_text(), *compiler, *_FLAGS, sysconfig.get_platform()])
    folder = _cache_folder()
    path = folder / f"psisgd-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(built), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(
                    f"fused=True could not compile its kernel: {' '.join(command)}\n{result.stderr.strip()}\n"
                    "Install a C compiler with OpenMP, set CC, or use fused=False"
                )
            os.replace(built, path)  # atomic: two processes may build at once
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    named = os.environ.get("CC")
    if named:
        return named.split()
    found = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if found is None:
        raise RuntimeError("fused=True needs a C compiler (cc, gcc, clang, or the one that CC names); use fused=False")
    return [found]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "retract"


def psisgd(
    parameters: Sequence[ScaledParameter],
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    transport: int,
    check_finite: bool,
) -> list[ScaledParameter]:
    """Step every parameter that the kernel takes; return those that it does not (layout, half precision).

    Raises:
        RuntimeError: a weight is not on the CPU, or there is no kernel and no compiler.
        FloatingPointError: a scale group met a value that is not finite; its weight was not moved.
    """
    library = _library()
    rest: list[ScaledParameter] = []
    batches: dict[torch.dtype, list[tuple[ScaledParameter, tuple[int, int]]]] = {}
    for parameter in parameters:
        if parameter.weight.device.type != "cpu":
            raise RuntimeError(
                f"fused=True runs on the CPU, got a weight on {parameter.weight.device}; use foreach=True"
            )
        rows = row_shape(parameter.manifold, parameter.weight.shape)
        tensors = (parameter.weight, parameter.grad, parameter.momentum, parameter.carry)
        dense = all(x is None or (x.is_contiguous() and x.dtype == parameter.weight.dtype) for x in tensors)
        if rows is None or not dense or parameter.weight.dtype not in _SYMBOLS:
            rest.append(parameter)
        else:
            batches.setdefault(parameter.weight.dtype, []).append((parameter, rows))
    for dtype, batch in batches.items():
        flags = (nesterov, transport, check_finite, torch.get_num_threads())
        _call(getattr(library, _SYMBOLS[dtype]), batch, (lr, momentum, dampening), flags)
    return rest


def _call(
    function: ctypes._NamedFuncPointer,
    batch: list[tuple[ScaledParameter, tuple[int, int]]],
    numbers: tuple[float, float, float],
    flags: tuple[bool, int, bool, int],
) -> None:
    count = len(batch)

    def pointers(tensors: list[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * count)(*[None if x is None else x.data_ptr() for x in tensors])

    status = function(
        ctypes.c_int64(count),
        pointers([p.weight for p, _ in batch]),
        pointers([p.grad for p, _ in batch]),
        pointers([p.momentum for p, _ in batch]),
        pointers([p.carry for p, _ in batch]),
        (ctypes.c_int64 * count)(*[rows for _, (rows, _) in batch]),
        (ctypes.c_int64 * count)(*[columns for _, (_, columns) in batch]),
        *[ctypes.c_double(x) for x in numbers],
        *[ctypes.c_int(x) for x in flags],
    )
    for p, _ in batch:  # torch did not see these writes: let autograd's version check know of them
        torch._C._increment_version([p.weight])
    if status == 1:
        raise MemoryError("fused=True found no memory for its workspace")
    if status == 2:
        raise FloatingPointError
