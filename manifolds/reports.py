"""What a numerical check found: figures, their bounds, and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Findings", "ManifoldReport", "Report"]

_SLOPE_MARGIN = 0.1


@dataclass(frozen=True)
class Report:
    """Outcome of one check; true when it holds.

    Attributes:
        check: what was checked.
        ok: whether every figure is within its bound; True also when there was nothing to check.
        figures: measured errors, slopes, ranks.
        failures: the names of the figures out of bound.
        note: what was left out, and why.
    """

    check: str
    ok: bool
    figures: dict[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    note: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        shown = [f"{name} {value:.3g}{' (!)' * (name in self.failures)}" for name, value in self.figures.items()]
        verdict = "ok  " if self.ok else "FAIL"
        return f"{verdict} {self.check}: {', '.join(shown + [self.note] * bool(self.note))}"


@dataclass(frozen=True)
class ManifoldReport:
    """Outcome of all checks; true when every one holds. ``report["retraction"]`` is one of them."""

    manifold: str
    reports: tuple[Report, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(self.reports)

    def __bool__(self) -> bool:
        return self.ok

    def __getitem__(self, check: str) -> Report:
        return {report.check: report for report in self.reports}[check]

    def __str__(self) -> str:
        return "\n".join([self.manifold, *(f"  {report}" for report in self.reports)])


class Findings:
    """Collects the figures of one check. A figure that is NaN is out of any bound."""

    def __init__(self, check: str) -> None:
        self.check = check
        self.note = ""
        self._figures: dict[str, float] = {}
        self._failures: list[str] = []

    def add(self, name: str, value: float, ok: bool) -> None:
        """Record a figure and whether it is within its bound."""
        self._figures[name] = value
        if not ok:
            self._failures.append(name)

    def error(self, name: str, value: float, bound: float) -> None:
        """Record an error that must not exceed ``bound``."""
        self.add(name, value, value <= bound)

    def slope(self, name: str, value: float, order: int) -> None:
        """Record a slope that must reach ``order``; infinity (no error above rounding) does."""
        self.add(name, value, not math.isnan(value) and value > order - _SLOPE_MARGIN)

    def done(self) -> Report:
        """The verdict."""
        return Report(self.check, not self._failures, self._figures, tuple(self._failures), self.note)

    def skipped(self, why: str) -> Report:
        """Nothing to check."""
        return Report(self.check, True, note=why)
