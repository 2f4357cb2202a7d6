"""SVHN, cropped digits [Netzer11], from ``train_32x32.mat`` and ``test_32x32.mat``.

Each holds ``X`` (32, 32, 3, N) and ``y`` (N, 1) with labels 1 to 10, where 10 is the digit 0.
"""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, Dataset, make_dataset
from .files import member_label, read_members

__all__ = ["CLASSES", "parse_mat", "read", "wanted"]

CLASSES = tuple("0123456789")
FILES = ("train_32x32.mat", "test_32x32.mat")


def wanted(path: PurePosixPath) -> bool:
    """Whether it is one of the two files of cropped digits."""
    return path.name in FILES


def read(source: Path) -> Dataset:
    """SVHN from its two files in a folder or archive."""
    files = {path.name: (member_label(source, path), content) for path, content in read_members(source, wanted)}
    if missing := [name for name in FILES if name not in files]:
        raise DataError(f"{source} holds a part of SVHN; missing: {', '.join(missing)}")
    train, test = (parse_mat(content, file) for file, content in (files[name] for name in FILES))
    return make_dataset("svhn", train, test, CLASSES)


def parse_mat(content: bytes, file: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) of a .mat file; ``file`` is its name in error messages."""
    from scipy.io import loadmat

    try:
        variables = loadmat(io.BytesIO(content), variable_names=["X", "y"])
    except Exception as error:  # scipy raises a dozen kinds, from zlib.error to NotImplementedError, on damaged files
        raise DataError(f"{file} is damaged or no .mat file: {type(error).__name__}: {error}") from error
    images, labels = variables.get("X"), variables.get("y")
    if images is None or labels is None:
        raise DataError(f"{file} lacks the variable {'X' if images is None else 'y'}")
    if images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3) or images.ndim not in (3, 4):
        raise DataError(f"{file}: X should be uint8 of shape (32, 32, 3, N), is {images.dtype} of {images.shape}")
    images = images.reshape(32, 32, 3, -1)  # MATLAB drops the last dimension when N is 1
    labels = labels.reshape(-1)
    if len(labels) != images.shape[-1]:
        raise DataError(f"{file} is damaged: it holds {images.shape[-1]} images and {len(labels)} labels")
    if not np.isin(labels, np.arange(1, 11)).all():
        raise DataError(f"{file}: labels should be whole numbers 1 to 10, they are {labels.min()} to {labels.max()}")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return pixels, torch.from_numpy(labels.astype(np.int64) % 10)
