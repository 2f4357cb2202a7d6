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

__all__ = ["ADAM", "ANGULAR", "SGD", "Options", "available", "turn", "wanted"]

_SOURCE = Path(__file__).with_name("_turn.c")
_FLAGS = ("-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off")
_SYMBOLS = {torch.float32: "turn_float", torch.float64: "turn_double"}
# As in the kernel: what it returns, its rules, its options.
_NO_MEMORY, _NOT_FINITE = 1, 2
SGD, ANGULAR, ADAM = range(3)


class Options(ctypes.Structure):
    """The numbers of a step, the same for all weights."""

    threads: int
    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "second", "eps", "correction")),
        *((name, ctypes.c_int) for name in ("rule", "nesterov", "transport", "check_finite", "threads")),
    )


@cache
def available() -> bool:
    """Whether the kernel can be used here: it is compiled already, or a C compiler is at hand."""
    try:
        _library()
    except (RuntimeError, OSError):  # no compiler; or a cache folder that cannot be written to
        return False
    return True


@cache
def _library() -> ctypes.CDLL:
    """Load the kernel from the user's cache, compiling it first if it is not there."""
    compiler = _compiler()
    key = "\0".join([_SOURCE.read_text(), *compiler, *_FLAGS, sysconfig.get_platform()])
    folder = _cache_folder()
    path = folder / f"turn-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
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
        getattr(library, symbol).argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 8]
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


def wanted(parameters: Sequence[ScaledParameter], foreach: bool | None, fused: bool | None) -> bool:
    """Whether the kernel is to step these: asked for, or nothing was and it can be had."""
    if fused is None and foreach is None:
        return all(p.weight.is_cpu for p in parameters) and available()
    return bool(fused)


def turn(parameters: Sequence[ScaledParameter], options: Options) -> list[ScaledParameter]:
    """Step every parameter that the kernel takes; return those that it does not (layout, half precision).

    Raises:
        RuntimeError: a weight is not on the CPU, or there is no kernel and no compiler.
        FloatingPointError: a scale group met a value that is not finite; its weight was not moved.
    """
    library = _library()
    options.threads = torch.get_num_threads()
    rest: list[ScaledParameter] = []
    batches: dict[torch.dtype, list[tuple[int | None, ...]]] = {}
    for parameter in parameters:
        weight, dtype = parameter.weight, parameter.weight.dtype
        if not weight.is_cpu:
            raise RuntimeError(f"fused=True runs on the CPU, got a weight on {weight.device}; use foreach=True")
        rows = row_shape(parameter.manifold, weight.shape)
        tensors = (weight, parameter.grad, parameter.momentum, parameter.carry, parameter.square)
        dense = weight.numel() and all(x is None or (x.is_contiguous() and x.dtype == dtype) for x in tensors)
        if rows is None or not dense or dtype not in _SYMBOLS:
            rest.append(parameter)
            continue
        batches.setdefault(dtype, []).append((*(None if x is None else x.data_ptr() for x in tensors), *rows))
        increment_version(weight)  # torch does not see the kernel write: autograd's check must know
    for dtype, batch in batches.items():
        columns = zip(*batch, strict=True)
        pointers = [(ctypes.c_void_p * len(batch))(*next(columns)) for _ in range(5)]
        sizes = [(ctypes.c_int64 * len(batch))(*column) for column in columns]
        status = getattr(library, _SYMBOLS[dtype])(len(batch), *pointers, *sizes, ctypes.byref(options))
        if status == _NO_MEMORY:
            raise MemoryError("fused=True found no memory for its workspace")
        if status == _NOT_FINITE:
            raise FloatingPointError
    return rest
