"""MNIST in its own IDX format [LeCun98]: a big-endian header, then one unsigned byte a pixel or label."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from .dataset import DataError, Dataset, make_dataset
from .files import member_label, read_members

__all__ = ["CLASSES", "parse_idx", "read", "wanted"]

CLASSES = tuple("0123456789")
UNSIGNED_BYTE = 0x08
FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))


def wanted(path: PurePosixPath) -> bool:
    """Whether it is named like one of the four files, gzipped or not (some copies write ``images.idx3``)."""
    return _official(path) in FILES


def _official(path: PurePosixPath) -> str:
    return path.name.removesuffix(".gz").replace(".idx", "-idx")


def read(source: Path) -> Dataset:
    """MNIST from the four IDX files in a folder or archive."""
    files = {_official(path): (member_label(source, path), content) for path, content in read_members(source, wanted)}
    if missing := [name for name in FILES if name not in files]:
        raise DataError(f"{source} holds a part of MNIST; missing: {', '.join(missing)} (or the same with .gz)")
    return make_dataset("mnist", _read_part(files, "train"), _read_part(files, "t10k"), CLASSES)


def _read_part(files: Mapping[str, tuple[str, bytes]], part: str) -> tuple[Tensor, Tensor]:
    image_file, content = files[f"{part}-images-idx3-ubyte"]
    images = parse_idx(content, image_file, dimensions=3)
    label_file, content = files[f"{part}-labels-idx1-ubyte"]
    labels = parse_idx(content, label_file, dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{image_file} holds {len(images)} images, but {label_file} holds {len(labels)} labels")
    if labels.max() >= len(CLASSES):
        raise DataError(f"{label_file} holds the label {labels.max().item()}, outside 0 to {len(CLASSES) - 1}")
    return images.unsqueeze(1), labels.long()


def parse_idx(content: bytes, file: str, *, dimensions: int) -> Tensor:
    """The uint8 tensor that an IDX file holds, gzipped or not; ``file`` is its name in error messages."""
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file} is damaged or truncated: {error}") from error
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        begins = f"it begins with {content[:4].hex() or 'nothing'} instead of {magic.hex()}"
        raise DataError(f"{file} is no IDX file of {dimensions}-dimensional bytes: {begins}")
    header, data = content[4 : 4 + 4 * dimensions], content[4 + 4 * dimensions :]
    shape = [int.from_bytes(header[i : i + 4], "big") for i in range(0, 4 * dimensions, 4)]
    if len(data) != math.prod(shape) or not data:
        sizes = f"{len(data)} bytes of data, not {' x '.join(map(str, shape))} = {math.prod(shape)}"
        raise DataError(f"{file} is damaged or truncated: it holds {sizes}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
