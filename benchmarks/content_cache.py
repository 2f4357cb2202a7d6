"""Results that depend on their inputs' content alone, kept in the user's cache folder under a hash of that content."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Dataset
from .data.download import cache_folder

__all__ = ["content_hash", "data_hash", "load_or_compute", "state_hash"]

DIGEST_BYTES = hashlib.sha256().digest_size


def content_hash(*parts: Tensor | str) -> str:
    """SHA-256, in hexadecimal, of strings and of tensors with their shapes and dtypes, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype} {tuple(part.shape)};".encode())
            total.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            encoded = part.encode()
            total.update(f"text {len(encoded)};".encode())
            total.update(encoded)
    return total.hexdigest()


def data_hash(data: Dataset) -> str:
    """The hash of all images and labels, of the classes, and of how images are normalized and mirrored."""
    described = repr((data.classes, data.mean, data.std, data.flip))
    return content_hash(described, data.train_images, data.train_labels, data.test_images, data.test_labels)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """The hash of a network's state dict: the same weights have the same hash, however they were saved."""
    return content_hash(*(part for name, tensor in state.items() for part in (name, tensor)))


def load_or_compute(kind: str, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``compute`` returns, from the cache when it was computed before.

    A file counts only if it is whole (it begins with its own SHA-256) and was made for the same key; any other is
    computed anew and replaced at once, never half. When processes compute the same at the same time, the first to
    end decides and the others take its result, so that all of them compare with the same numbers.

    Args:
        kind: a folder in the cache folder (see `retract.benchmarks.data`).
        key: the hash of everything that decides the result.
        compute: returns tensors on the CPU and plain values.

    A cache folder that cannot be written is a warning.
    """
    path = cache_folder() / kind / f"{key[:32]}.pt"
    if (found := _read(path, key)) is not None:
        return found
    computed = compute()
    if (found := _read(path, key)) is not None:
        return found
    try:
        _write(path, key, computed)
    except OSError as error:
        warnings.warn(f"{path} cannot be written, so it will be computed again next time: {error}", stacklevel=2)
    return computed


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """The contents for this key; None when there are none that can be trusted."""
    try:
        content = path.read_bytes()
        digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            return None
        saved = torch.load(io.BytesIO(body), weights_only=True)
        contents: dict[str, Any] = saved["contents"]
        return contents if saved["key"] == key else None
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError):
        return None


def _write(path: Path, key: str, contents: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"key": key, "contents": contents}, buffer)
    body = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(hashlib.sha256(body).digest() + body)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
