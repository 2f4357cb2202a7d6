"""One function for every data set: find its files, whatever their form, or fetch them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import cifar, digits, images, mnist, svhn
from .dataset import DataError, Dataset
from .download import OFFICIAL, download
from .files import Wanted, is_tar, list_files

__all__ = ["DATASETS", "load"]


@dataclass(frozen=True)
class Form:
    """A form that a data set's files come in: which files are of it, and how to read a folder or archive of
    them.
    """

    wanted: Wanted
    read: Callable[[Path], Dataset]


def _images(name: str, channels: int, flip: bool = False) -> Form:
    return Form(images.wanted, partial(images.read, name=name, channels=channels, num_classes=10, flip=flip))


FORMS: dict[str, tuple[Form, ...]] = {
    "digits": (_images("digits", channels=1),),
    "mnist": (Form(mnist.wanted, mnist.read), _images("mnist", channels=1)),
    "cifar10": (Form(cifar.wanted, cifar.read), _images("cifar10", channels=3, flip=True)),
    "svhn": (Form(svhn.wanted, svhn.read), _images("svhn", channels=3)),
}
DATASETS = tuple(FORMS)


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    subset: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Dataset:
    """A data set as tensors.

    ``digits`` comes with scikit-learn. The others are looked for in ``data_dir``: their official files, or
    images by class (``train/<class>/*.jpg``, ``test/<class>/*.jpg``), in the folder itself, in a subfolder or
    tar archive in it whose name begins with the data set's, or in the archive that ``data_dir`` names. When
    they are not there, the official files are downloaded into the user's cache folder (or
    ``$RETRACT_CACHE_DIR``); ``data_dir`` is never written to.

    Args:
        name: "digits", "mnist", "cifar10" or "svhn".
        data_dir: a folder or a tar archive.
        subset: train on this many images, classes balanced (see :meth:`Dataset.subset`).
        seed: of the subset.
        image_size: resize to this many pixels in height and width.

    Raises:
        DataError: a file is missing, damaged or not what it should be.
        ValueError: an unknown name, or a subset or image size out of range.
    """
    if name not in FORMS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    dataset = _load(name, None if data_dir is None else Path(data_dir).expanduser())
    if image_size is not None:
        dataset = dataset.resized(image_size)
    return dataset if subset is None else dataset.subset(subset, seed)


def _load(name: str, place: Path | None) -> Dataset:
    if place is not None and not place.exists():
        raise DataError(f"there is no folder or archive {place}")
    if place is not None and (found := _find(name, place)) is not None:
        form, source = found
        return form.read(source)
    if name == "digits":
        return digits.read()
    return FORMS[name][0].read(download(name, _advice(name, place)))


def _find(name: str, place: Path) -> tuple[Form, Path] | None:
    for source in _sources(name, place):
        for path in list_files(source):
            for form in FORMS[name]:
                if form.wanted(path):
                    return form, source
    if place.is_file():
        raise DataError(f"{place} holds no files of {name}")
    return None


def _sources(name: str, place: Path) -> Iterator[Path]:
    if place.is_file() and not is_tar(place):
        raise DataError(f"{place} is neither a folder nor a tar archive")
    yield place
    if place.is_file():
        return
    # "CIFAR-10", "cifar10-images.tar.xz", "cifar-10-batches-py", but not "cifar100"
    named = re.compile(rf"{name}(?!\d)")
    for child in sorted(place.iterdir()):
        if named.match(re.sub("[-_ ]", "", child.name.lower())) and (child.is_dir() or is_tar(child)):
            yield child
            if (raw := child / "raw").is_dir():
                yield raw


def _advice(name: str, place: Path | None) -> str:
    where = "a folder named by --data-dir" if place is None else f"{place}, which holds none of {name} yet"
    files = "\n".join(f"  {file.addresses[0]}{file.name}" for file in OFFICIAL[name])
    return f"Put these files into {where}:\n{files}\nor images by class: train/<class>/*.png, test/<class>/*.png"
