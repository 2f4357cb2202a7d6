"""Reading the files of a folder or of a tar archive alike, without ever unpacking one."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .dataset import DataError

__all__ = ["Wanted", "is_tar", "list_files", "member_label", "read_members"]

Wanted = Callable[[PurePosixPath], bool]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")


def is_tar(path: Path) -> bool:
    """Whether the name is that of a tar archive that Python reads."""
    return path.name.lower().endswith(TAR_SUFFIXES) and path.is_file()


def member_label(source: Path, name: PurePosixPath) -> str:
    """How error messages name a file of a folder or of an archive."""
    return f"{source / name}" if source.is_dir() else f"{name} in {source}"


def list_files(source: Path) -> Iterator[PurePosixPath]:
    """Relative paths of an archive's files, or of those files of a folder that a data set can be made of: the
    files in the folder itself, then ``train/*/*`` and ``test/*/*``.
    """
    if not source.is_dir():
        with _open_tar(source) as tar:
            yield from (PurePosixPath(member.name) for member in tar if member.isfile())
        return
    for pattern in ("*", "train/*/*", "test/*/*"):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                yield PurePosixPath(path.relative_to(source).as_posix())


def read_members(source: Path, wanted: Wanted) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(relative path, content) of each wanted file of a folder or of a tar archive.

    Nothing is written: an archive is read as a stream. In an archive, a wanted name that is absolute, climbs
    out by ``..`` or is no plain file (a link, a device) raises a :class:`DataError`.
    """
    if not source.is_dir():
        yield from _read_archive(source, wanted)
        return
    for name in filter(wanted, list_files(source)):
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise DataError(f"{source / name} cannot be read: {error}") from error
        yield name, content


def _read_archive(archive: Path, wanted: Wanted) -> Iterator[tuple[PurePosixPath, bytes]]:
    with _open_tar(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if member.isdir() or not wanted(name):
                continue
            if name.is_absolute() or ".." in name.parts or not member.isfile():
                raise DataError(f"{archive} holds {member.name!r}, which is no plain file inside the archive")
            content = tar.extractfile(member)
            assert content is not None  # it is, for what is no file
            yield name, content.read()


@contextmanager
def _open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        # "r|*" is a stream: seeking in an xz archive would decompress it again from its beginning.
        with tarfile.open(archive, "r|*") as tar:
            yield tar
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive} is damaged or truncated: {error}") from error
