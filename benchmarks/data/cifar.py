"""CIFAR-10 [Krizhevsky09] from its binary and its python batches, in a folder or in an archive.

One record of a binary batch is a label byte and 3072 pixel bytes: 32 rows of red, then of green, then of
blue. A python batch is a pickled dict of ``data`` (N, 3072), in the same order, and a list ``labels``.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, Dataset, make_dataset
from .files import member_label, read_members
from .pickles import PlainArray, load_plain

__all__ = ["CLASSES", "parse_binary", "parse_python", "read", "wanted"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def wanted(path: PurePosixPath) -> bool:
    """Whether it is named like a binary or a python batch."""
    return path.name.removesuffix(".bin") in BATCHES


def read(source: Path) -> Dataset:
    """CIFAR-10 from the six batches of one form in a folder or archive; binary batches go first when both are
    there.
    """
    files = {path.name: (member_label(source, path), content) for path, content in read_members(source, wanted)}
    suffix = ".bin" if any(name.endswith(".bin") for name in files) else ""
    if missing := [batch + suffix for batch in BATCHES if batch + suffix not in files]:
        raise DataError(f"{source} holds a part of CIFAR-10; missing: {', '.join(missing)}")
    parse = parse_binary if suffix else parse_python
    *train, test = [parse(content, file) for file, content in (files[batch + suffix] for batch in BATCHES)]
    images, labels = (torch.cat(tensors) for tensors in zip(*train, strict=True))
    return make_dataset("cifar10", (images, labels), test, CLASSES, flip=True)


def parse_binary(content: bytes, file: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) of a binary batch; ``file`` is its name in error messages."""
    if not content or len(content) % (1 + PIXELS):
        raise DataError(f"{file} is damaged or truncated: {len(content)} bytes are not records of {1 + PIXELS} bytes")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + PIXELS)
    images = records[:, 1:].reshape(-1, *SHAPE)
    return images, _check_labels(records[:, 0].long(), file)


def parse_python(content: bytes, file: str) -> tuple[Tensor, Tensor]:
    """The same of a python batch. Nothing in the pickle is executed (see :func:`.pickles.load_plain`)."""
    try:
        batch = load_plain(content)
    except pickle.UnpicklingError as error:
        raise DataError(f"{file} is no CIFAR-10 python batch: {error}") from error
    try:
        data, labels = (batch[key] if key in batch else batch[key.decode()] for key in (b"data", b"labels"))
        pixels = data.numpy() if isinstance(data, PlainArray) else np.asarray(data, np.uint8)
        images = torch.from_numpy(pixels.reshape(-1, PIXELS).copy()).view(-1, *SHAPE)
        targets = torch.tensor([int(label) for label in labels])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise DataError(f"{file} is no CIFAR-10 python batch: {type(error).__name__}: {error}") from error
    if len(images) != len(targets):
        raise DataError(f"{file} is damaged: it holds {len(images)} images and {len(targets)} labels")
    return images, _check_labels(targets, file)


def _check_labels(labels: Tensor, file: str) -> Tensor:
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        bad = labels[(labels < 0) | (labels >= len(CLASSES))][0].item()
        raise DataError(f"{file} is damaged: it holds the label {bad}, outside 0 to {len(CLASSES) - 1}")
    return labels
