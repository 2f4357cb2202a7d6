"""What becomes of a run when its folder cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["RunFolderError", "writing_to"]


class RunFolderError(ValueError):
    """A run folder cannot be written: the disk is full, or the folder is read-only or gone."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what a full disk, or a folder without permission to write, raises into a `RunFolderError`.

    Only writing belongs in the block: torch.save raises a plain RuntimeError, which others raise as well.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise RunFolderError(f"{folder} cannot be written: {reason}. Its last checkpoint, if any, is whole") from error
