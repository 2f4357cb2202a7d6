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
from torch.autograd.graph import increment_version

from ._scale import ScaledParameter, row_shape

__all__ = ["available", "psisgd"]

_SOURCE = Path(__file__).with_name("_psisgd.c")
_FLAGS = ("-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off")
_SYMBOLS = {torch.float32: "psisgd_float", torch.float64: "psisgd_double"}
_NO_MEMORY, _NOT_FINITE = 1, 2  # as in the kernel
_ARGUMENTS = [ctypes.c_int64, *[ctypes.c_void_p] * 6, *[ctypes.c_double] * 3, *[ctypes.c_int] * 4]


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
    library = ctypes.CDLL(str(path))
    for symbol in _SYMBOLS.values():
        getattr(library, symbol).argtypes = _ARGUMENTS
    return library


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
    batches: dict[torch.dtype, list[tuple[int | None, ...]]] = {}
    for parameter in parameters:
        weight, dtype = parameter.weight, parameter.weight.dtype
        if not weight.is_cpu:
            raise RuntimeError(f"fused=True runs on the CPU, got a weight on {weight.device}; use foreach=True")
        rows = row_shape(parameter.manifold, weight.shape)
        tensors = [x for x in (weight, parameter.grad, parameter.momentum, parameter.carry) if x is not None]
        dense = weight.numel() and all(x.is_contiguous() and x.dtype == dtype for x in tensors)
        if rows is None or not dense or dtype not in _SYMBOLS:
            rest.append(parameter)
            continue
        addresses = [x.data_ptr() for x in tensors] + [None] * (4 - len(tensors))
        batches.setdefault(dtype, []).append((*addresses, *rows))
        increment_version(weight)  # torch does not see the kernel write: autograd's check must know
    for dtype, batch in batches.items():
        columns = zip(*batch, strict=True)
        pointers = [(ctypes.c_void_p * len(batch))(*next(columns)) for _ in range(4)]
        sizes = [(ctypes.c_int64 * len(batch))(*column) for column in columns]
        flags = (nesterov, transport, check_finite, torch.get_num_threads())
        kernel = getattr(library, _SYMBOLS[dtype])
        status = kernel(len(batch), *pointers, *sizes, lr, momentum, dampening, *flags)
        if status == _NO_MEMORY:
            raise MemoryError("fused=True found no memory for its workspace")
        if status == _NOT_FINITE:
            raise FloatingPointError
    return rest
