"""Run folders: what was asked (config.json), what came out (metrics.jsonl), and how to go on (checkpoint.pt).

A run that stops at any moment, by Ctrl-C or by a power cut, goes on from its last checkpoint and writes the
same metrics that it would have written without the stop, to the bit.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

__all__ = ["Interrupted", "Run", "Stop", "stop_on_signal"]

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"


class Run:
    """One run's folder. ``config`` holds plain values and stays as it was when the run was created."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = dict(config)
        self._metrics_path = folder / METRICS
        self._lines = len(self.metrics()) if self._metrics_path.exists() else 0

    @staticmethod
    def require_free(folder: Path, *, overwrite: bool = False) -> None:
        """Raise a ValueError when the folder cannot take a new run."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; a run needs a folder")
        if (folder / CONFIG).exists() and not overwrite:
            raise ValueError(f"{folder} already holds a run: use --resume {folder}, --overwrite, or another --out")

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, Any], *, overwrite: bool = False) -> Run:
        """Begin a run. ``overwrite`` removes the files of the run that was there, and no others.

        Raises:
            ValueError: as :meth:`require_free`.
        """
        folder = Path(folder)
        cls.require_free(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, METRICS, CONFIG):
            (folder / name).unlink(missing_ok=True)
        text = json.dumps(dict(config), indent=2, allow_nan=False) + "\n"
        with _replacing(folder / CONFIG) as partial:
            partial.write_text(text, encoding="utf-8")
        return cls(folder, config)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run that a folder holds.

        Raises:
            ValueError: there is none, or its config.json is damaged.
        """
        path = Path(folder) / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no run: there is no {path}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return cls(Path(folder), config)

    @classmethod
    def open_or_create(cls, folder: str | Path, config: Mapping[str, Any]) -> Run:
        """The run of these options in a folder, begun now if the folder holds none.

        Raises:
            ValueError: it holds a run of other options, or a damaged one.
        """
        if not (Path(folder) / CONFIG).exists():
            return cls.create(folder, config)
        run = cls.open(folder)
        run.require_same(config)
        return run

    def require_same(self, options: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the first option that differs from the run's own.

        An option younger than the run counts as one that was not given.
        """
        for name, value in options.items():
            if (own := self.config.get(name)) != value:
                raise ValueError(
                    f"{self.folder} was run with {name} = {own!r}, not {value!r}: a resumed run keeps its options"
                )

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of metrics, on disk when this returns."""
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines += 1

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics so far."""
        if not self._metrics_path.exists():
            return []
        lines = self._metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise ValueError(f"{self._metrics_path} is damaged: {error}") from error

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by ``state`` (tensors and plain values): the old one or the new one, never a
        half.
        """
        with _replacing(self.folder / CHECKPOINT) as partial:
            torch.save({"state": dict(state), "metrics_lines": self._lines}, partial)

    def remove_checkpoint(self) -> None:
        """Give back the room of a checkpoint that nobody will need."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, None before the first; metrics written after it are removed.

        Raises:
            ValueError: the checkpoint is damaged, or lines of the metrics are missing.
        """
        path = self.folder / CHECKPOINT
        checkpoint: dict[str, Any] = {"state": None, "metrics_lines": 0}
        if path.exists():
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                checkpoint["state"], checkpoint["metrics_lines"]
            except (
                OSError,
                RuntimeError,
                EOFError,
                KeyError,
                TypeError,
                ValueError,
                pickle.UnpicklingError,
            ) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        self._truncate_metrics(checkpoint["metrics_lines"])
        state: dict[str, Any] | None = checkpoint["state"]
        return state

    def _truncate_metrics(self, lines: int) -> None:
        records = self.metrics()
        if len(records) < lines:
            raise ValueError(f"{self._metrics_path} holds {len(records)} lines; its checkpoint came after {lines}")
        if self._metrics_path.exists():
            whole = self._metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
            with _replacing(self._metrics_path) as partial:
                partial.write_text("".join(whole[:lines]), encoding="utf-8")
        self._lines = lines


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write instead of ``path``, which it replaces at the end, all at once and flushed to disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Interrupted(Exception):  # noqa: N818 (no error: the user's wish)
    """The user asked to stop (Ctrl-C, or SIGTERM); ``signum`` says how."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Stop:
    """Whether a signal to stop has come. ``check`` is called where stopping is safe."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def check(self) -> None:
        """Raise :class:`Interrupted` when a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within the block, the first Ctrl-C or SIGTERM only sets the flag; a second one acts at once, as it did
    before.

    Python takes signals in the main thread alone; in any other the flag is never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def receive(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        restore()

    for signum in previous:
        signal.signal(signum, receive)
    try:
        yield stop
    finally:
        restore()
