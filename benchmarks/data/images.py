"""Images by class: ``train/<class>/*.png`` and ``test/<class>/*.png``, in a folder or in a tar archive.

Decoding 60,000 small JPEG files takes half a minute, so the decoded tensors are kept in the user's cache
folder, under a key made of every file's name, size and time of change. The data folder itself is never
written to.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, Dataset, make_dataset
from .download import cache_folder
from .files import list_files, member_label, read_members

__all__ = ["read", "wanted"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
PARTS = ("train", "test")
MODES = {1: "L", 3: "RGB"}


def wanted(path: PurePosixPath) -> bool:
    """Whether it is named like an image of a class of the training or the test part."""
    hidden = path.name.startswith(".")  # such as the ._NAME that macOS leaves in archives
    return not hidden and path.suffix.lower() in SUFFIXES and len(path.parts) >= 3 and path.parts[-3] in PARTS


def read(source: Path, *, name: str, channels: int, num_classes: int, flip: bool) -> Dataset:
    """The data set ``name`` from a folder or archive of images; classes are numbered in the order of their
    names.
    """
    cached = cache_folder() / "decoded" / f"{name}-{_key(source, channels)}.pt"
    content = _load_cache(cached)
    if content is None:
        content = _decode(source, channels, num_classes)
        _save_cache(content, cached)
    train, test = ((content[f"{part}_images"], content[f"{part}_labels"]) for part in PARTS)
    return make_dataset(name, train, test, content["classes"], flip=flip)


def _decode(source: Path, channels: int, num_classes: int) -> dict[str, Any]:
    images: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    names: dict[str, list[str]] = {part: [] for part in PARTS}
    shape: torch.Size | None = None
    for path, encoded in read_members(source, wanted):
        image = _decode_image(encoded, member_label(source, path), channels)
        shape = shape or image.shape
        if image.shape != shape:
            sizes = f"{image.shape[2]}x{image.shape[1]} pixels, those before it {shape[2]}x{shape[1]}"
            raise DataError(f"{member_label(source, path)} has {sizes}: all images must have one size")
        part, class_name = path.parts[-3:-1]
        images[part].append(image)
        names[part].append(class_name)
    classes = sorted(set(names["train"]))
    if sorted(set(names["test"])) != classes or len(classes) != num_classes:
        found = " and ".join(f"{len(set(names[part]))} classes under {part}/" for part in PARTS)
        raise DataError(f"{source} holds {found}; it should hold the same {num_classes} under both")
    index = {class_name: i for i, class_name in enumerate(classes)}
    content: dict[str, Any] = {"classes": classes}
    for part in PARTS:
        content[f"{part}_images"] = torch.stack(images[part])
        content[f"{part}_labels"] = torch.tensor([index[class_name] for class_name in names[part]])
    return content


def _decode_image(encoded: bytes, file: str, channels: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.array(image.convert(MODES[channels]))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is damaged or no image: {error}") from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)


def _key(source: Path, channels: int) -> str:
    """A hash that changes whenever a file is added, removed or written."""
    files = [source] if source.is_file() else [source / name for name in list_files(source) if wanted(name)]
    key = hashlib.sha256(str(channels).encode())
    for file in files:
        status = os.stat(file)
        key.update(f"\0{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return key.hexdigest()[:24]


def _load_cache(path: Path) -> dict[str, Any] | None:
    """The decoded images; None when they are not there, or damaged, which only costs decoding them again."""
    try:
        return dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None


def _save_cache(content: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError):  # a full or read-only disk costs the cache, not the run
        with suppress(OSError):
            partial.unlink(missing_ok=True)
