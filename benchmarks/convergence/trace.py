"""What a run that descends is watched by: its loss, its gradient's norms, and the least of them so far."""

from __future__ import annotations

import math
import time
from typing import Any

from .problems import Problem

__all__ = ["Trace"]

POINTS_A_DECADE = 20  # of a curve
RESULTS = (
    "loss",
    "min_gradient_squared",
    "min_euclidean_gradient_squared",
    "mean_gradient_squared",
)


class Trace:
    """Looks at a problem whose weights hold the gradient of the whole loss.

    Args:
        problem: its weights change between looks.
        keep_curves: whether results have curves, at steps that are dense in the logarithm.

    Attributes:
        diverged: whether a loss or a gradient was not finite.
        first_loss: at the first look.
    """

    def __init__(self, problem: Problem, *, keep_curves: bool) -> None:
        self.problem, self.keep_curves = problem, keep_curves
        self.diverged, self.first_loss = False, math.nan
        self._begin = time.perf_counter()
        self._looks, self._total, self._next = 0, 0.0, 1.0
        self._least = [math.inf, math.inf]
        self._step = self._noted = -1
        self._last: dict[str, float] = {}
        self._curves: dict[str, list[list[float]]] = {}

    def look(self, step: int, loss: float) -> bool:
        """Note the loss and the gradient after ``step`` steps; whether both are finite."""
        gradient = self.problem.gradient()
        if not (math.isfinite(loss) and math.isfinite(gradient.metric) and math.isfinite(gradient.euclidean)):
            self.diverged = True
            return False
        if self._looks == 0:
            self.first_loss = loss
        self._looks += 1
        self._total += gradient.metric
        self._least = [min(self._least[0], gradient.metric), min(self._least[1], gradient.euclidean)]
        self._last = {
            "loss": loss,
            "gradient_squared": gradient.metric,
            "euclidean_gradient_squared": gradient.euclidean,
            "min_gradient_squared": self._least[0],
            "min_euclidean_gradient_squared": self._least[1],
            "mean_gradient_squared": self._total / self._looks,
        }
        self._step = step
        if self.keep_curves and step + 1 >= self._next:
            self._next = max(step + 2, self._next * 10 ** (1 / POINTS_A_DECADE))
            self._note()
        return True

    def _note(self) -> None:
        self._noted = self._step
        for name, value in {**self._last, "mean_square_norm": self.problem.mean_square_norm()}.items():
            self.add(name, self._step, value)

    def add(self, name: str, step: int, value: float) -> None:
        """A point of a curve: after ``step`` steps, gradients at ``step + 1`` points are known."""
        self._curves.setdefault(name, []).append([step + 1, value, time.perf_counter() - self._begin])

    def results(self) -> dict[str, Any]:
        """What is known at the end.

        Returns:
            ``status``, "finished" or "diverged"; ``seconds``; and, None each of one that diverged: ``loss``, the last;
            over the looks ``min_gradient_squared`` in the PSI metric, ``min_euclidean_gradient_squared`` with respect
            to the weights as they are, and ``mean_gradient_squared`` in the metric, which is what the proofs bound;
            ``mean_square_norm`` of the filters. If they are kept ``curves``: of each of these, and of
            ``gradient_squared`` and ``euclidean_gradient_squared``, a list of [T, value, seconds], T the number of
            gradients computed.
        """
        if self.keep_curves and self._step > self._noted:
            self._note()
        found: dict[str, Any] = {
            "status": "diverged" if self.diverged else "finished",
            "seconds": time.perf_counter() - self._begin,
            **{name: None if self.diverged else self._last[name] for name in RESULTS},
            "mean_square_norm": None if self.diverged else self.problem.mean_square_norm(),
        }
        return {**found, "curves": self._curves} if self.keep_curves else found
