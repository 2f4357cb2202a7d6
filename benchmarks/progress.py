"""What a training run shows on the terminal: a live bar, and one line per epoch that stays (also in a log
file).
"""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from .training import Trainer

__all__ = ["LiveBar", "TrainingProgress"]

SECONDS_BETWEEN_UPDATES = 0.25  # reading the loss waits for a GPU, so it is done seldom


class LiveBar:
    """A context with a bar that is drawn on terminals only and leaves nothing behind."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self._console = console
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


class TrainingProgress(LiveBar):
    """A context in which ``step`` and ``epoch`` are the callbacks of :meth:`Trainer.fit`."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        epoch, loss = TextColumn("epoch {task.fields[epoch]}"), TextColumn("loss {task.fields[loss]:.4f}")
        super().__init__(console, epoch, BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        self._epochs = trainer.epochs
        self._updated = 0.0
        total = trainer.epochs * trainer.steps_per_epoch
        self._task = self._bar.add_task("", total=total, epoch=f"{trainer.epoch + 1}/{self._epochs}", loss=math.nan)

    def step(self, trainer: Trainer) -> None:
        """Move the bar, a few times a second."""
        now = time.monotonic()
        if self._bar.disable or now - self._updated < SECONDS_BETWEEN_UPDATES:
            return
        self._updated = now
        self._bar.update(
            self._task,
            completed=trainer.epoch * trainer.steps_per_epoch + trainer.step,
            epoch=f"{trainer.epoch + 1}/{self._epochs}",
            loss=trainer.losses[trainer.step - 1].item(),
        )

    def epoch(self, record: dict[str, Any]) -> None:
        """Print the line of a finished epoch."""
        self._console.print(
            f"epoch {record['epoch']:>{len(str(self._epochs))}}/{self._epochs}  "
            f"train loss {record['train_loss']:.4f}  test loss {record['test_loss']:.4f}  "
            f"test accuracy {100 * record['test_accuracy']:.2f} %  ({record['seconds']:.1f} s)",
            highlight=False,
        )
