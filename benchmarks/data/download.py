"""Fetching a data set's official files, each with its published checksum."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .dataset import DataError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["OFFICIAL", "RemoteFile", "cache_folder", "download"]


CHUNK = 2**17  # bytes at a time
TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class RemoteFile:
    """A file, its MD5 as its publisher states it, and the addresses of folders that hold it, best first."""

    name: str
    md5: str
    addresses: tuple[str, ...]


_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
_CIFAR = ("https://www.cs.toronto.edu/~kriz/",)
_SVHN = ("http://ufldl.stanford.edu/housenumbers/",)

OFFICIAL: dict[str, tuple[RemoteFile, ...]] = {
    "mnist": (
        RemoteFile("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", _MNIST),
        RemoteFile("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", _MNIST),
        RemoteFile("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", _MNIST),
        RemoteFile("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", _MNIST),
    ),
    "cifar10": (RemoteFile("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", _CIFAR),),
    "svhn": (
        RemoteFile("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", _SVHN),
        RemoteFile("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", _SVHN),
    ),
}


def cache_folder() -> Path:
    """Where downloads and decoded images are kept: ``$RETRACT_CACHE_DIR``, or the user's own cache folder."""
    import pooch

    return Path(os.environ.get("RETRACT_CACHE_DIR") or pooch.os_cache("retract"))


def download(name: str, advice: str) -> Path:
    """The folder of the cache that holds the official files of data set ``name``, downloaded when they are
    missing.

    A file that is already there is checked again and, when damaged, fetched again. ``advice`` ends the error
    message of a failed download.
    """
    folder = cache_folder() / name
    for file in OFFICIAL[name]:
        failures = []
        for address in file.addresses:
            if (failure := _retrieve(file, address, folder)) is None:
                break
            failures.append(failure)
        else:
            raise DataError(f"cannot download {file.name}: {'; '.join(failures)}.\n{advice}")
    return folder


class _Bar:
    """What pooch asks of a progress bar, drawn by rich."""

    def __init__(self, progress: Progress) -> None:
        self.total: int | None = None
        self._progress = progress
        self._task: TaskID | None = None

    def update(self, size: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("", total=self.total)
        self._progress.update(self._task, advance=size)

    def reset(self) -> None:
        if self._task is not None:
            self._progress.reset(self._task)

    def close(self) -> None:
        pass


def _retrieve(file: RemoteFile, address: str, folder: Path) -> str | None:
    """Why the file could not be had from this address; None when it was."""
    import pooch
    from requests.exceptions import RequestException
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(file.name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    url, checksum = address + file.name, f"md5:{file.md5}"
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            downloader = pooch.HTTPDownloader(progressbar=_Bar(progress), chunk_size=CHUNK, timeout=TIMEOUT)
            pooch.retrieve(url, checksum, fname=file.name, path=folder, downloader=downloader)
    except RequestException as error:
        return f"{address} cannot be reached ({type(error).__name__})"
    except ValueError:
        return f"what {address} sent has a wrong checksum (expected MD5 {file.md5})"
    except OSError as error:
        return f"{folder} cannot be written ({error})"
    return None
