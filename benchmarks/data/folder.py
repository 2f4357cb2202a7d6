"""Any folder of images, to learn to generate their like: no form is asked for but one size after cropping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, Dataset, make_dataset
from .images import MODES, SUFFIXES

__all__ = ["read_folder"]

EVERY = 10  # one image in so many is a test image


def read_folder(folder: Path, size: int, channels: int = 3) -> Dataset:
    """The images of a folder and of all folders in it, cropped to their middle square and resized.

    A class is the folder that directly holds an image. Every tenth image of a class, from its first, is a test image.
    Files are taken in the order of their paths; hidden ones, and those that are not named like images, are left out.

    Args:
        folder: where to look; never written to.
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        DataError: there is no such folder, fewer than two images, or a file that is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    classes: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            classes.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path)
    parts: dict[bool, tuple[list[Tensor], list[int]]] = {False: ([], []), True: ([], [])}
    for label, paths in enumerate(classes.values()):
        for i, path in enumerate(paths):
            images, labels = parts[i % EVERY == 0]
            images.append(_decode(path, size, channels))
            labels.append(label)
    train, test = parts[False], parts[True]
    if not train[0]:
        found = sum(map(len, classes.values()))
        raise DataError(f"{folder} holds {found} images in {len(classes)} classes; a class should hold two or more")
    return make_dataset(
        "folder",
        (torch.stack(train[0]), torch.tensor(train[1])),
        (torch.stack(test[0]), torch.tensor(test[1])),
        tuple(classes),
    )


def _decode(path: Path, size: int, channels: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged or no image: {error}") from error
    return torch.from_numpy(np.array(fitted)).view(size, size, channels).permute(2, 0, 1)
