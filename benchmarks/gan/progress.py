"""What `retract gan` shows on the terminal: a live bar, and one line per record that stays."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..progress import LiveBar
from .training import GANTrainer

__all__ = ["GANProgress"]


class GANProgress(LiveBar):
    """A context in which ``step`` and ``record`` are the callbacks of `GANTrainer.fit`."""

    def __init__(self, trainer: GANTrainer, console: Console) -> None:
        last = TextColumn("{task.fields[last]}")
        super().__init__(console, TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), last)
        self._steps = trainer.steps
        self._task = self._bar.add_task("", total=trainer.steps, completed=trainer.step, last="")

    def step(self, trainer: GANTrainer) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=trainer.step)

    def record(self, record: dict[str, Any]) -> None:
        """Print the line of a record: losses, scores, spectra, and metrics if it has them."""
        layers = record["spectra"].values()
        largest, least = (pick(layer[name] for layer in layers) for pick, name in ((max, "largest"), (min, "least")))
        line = (
            f"step {record['step']:>{len(str(self._steps))}}/{self._steps}  "
            f"losses D {record['discriminator_loss']:.3f} G {record['generator_loss']:.3f}  "
            f"singular values {least:.3g} to {largest:.4g}  Lipschitz bound {record['lipschitz_bound']:.3g}"
        )
        if metrics := record.get("metrics"):
            line += (
                f"  Fréchet {metrics['frechet_distance']:.3g}  precision {metrics['precision']:.2f}"
                f"  recall {metrics['recall']:.2f}  modes {metrics['mode_coverage']:.0%}"
            )
        self._console.print(f"{line}  ({record['seconds']:.1f} s)", highlight=False, soft_wrap=True)
        self._bar.update(self._task, last=f"D {record['discriminator_loss']:.3f} G {record['generator_loss']:.3f}")
