"""`retract bench completion`: ill-conditioned low-rank matrices, on the manifold of fixed rank and by two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer

from .completion_methods import GROWTH_STEPS, METHODS, Factors, Problem, Watch, grown_start, random_start
from .figures import show_figures
from .options import FiguresFile, Processes
from .provenance import provenance
from .report import SERIES, Figure, Section, Table, figure_style, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["SETTINGS", "Run", "Setting", "completion_command", "measure", "tables"]

SHAPE, RANK = (120, 100), 5
SOLVED = 1e-6  # relative error in the Frobenius norm, of all entries
END = 1e-10  # where runs end, so that the rate is that of the neighbourhood


@dataclass(frozen=True)
class Setting:
    """Which entries are observed, and where every method starts."""

    name: str
    oversampling: float | None  # observed entries a degree of freedom; None: all entries
    grown: bool  # start grown rank by rank, else random


SETTINGS = (
    Setting("all entries, random start", None, False),
    Setting("4 entries a degree of freedom, grown start", 4, True),
    Setting("2.5 entries a degree of freedom, grown start", 2.5, True),
    Setting("4 entries a degree of freedom, random start", 4, False),
)


@dataclass(frozen=True)
class Run:
    """One method on one problem."""

    setting: str
    condition: float
    method: str
    seed: int
    errors: list[float]  # relative, of every iterate
    iterations: int | None  # to SOLVED
    seconds: float | None
    rate: float  # factor of the error from one iterate to the next, fitted to the later half of the run


def measure(conditions: Sequence[float], *, seeds: int, iterations: int, processes: int = 1) -> list[Run]:
    """Every method that is installed, on every setting, condition and seed; from one start for all methods."""
    jobs = list(product(SETTINGS, conditions, range(seeds), [iterations]))
    if processes == 1:
        return [run for job in jobs for run in _compare(*job)]
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [run for runs in pool.map(_compare, *zip(*jobs, strict=True)) for run in runs]


def _compare(setting: Setting, condition: float, seed: int, iterations: int) -> list[Run]:
    generator = torch.Generator().manual_seed(seed)
    problem = Problem.draw(SHAPE, RANK, condition, setting.oversampling, generator)
    start = grown_start(problem) if setting.grown else random_start(problem, generator)
    return [_run(setting, condition, seed, method, problem, start, iterations) for method in METHODS if _has(method)]


def _has(method: str) -> bool:
    return not method.startswith("pymanopt") or find_spec("pymanopt") is not None


def _run(
    setting: Setting, condition: float, seed: int, method: str, problem: Problem, start: Factors, iterations: int
) -> Run:
    watch = Watch(problem, END)
    METHODS[method](problem, start, iterations, watch)
    solved = next((i for i, error in enumerate(watch.errors) if error <= SOLVED), None)
    seconds = None if solved is None else watch.seconds[solved]
    return Run(setting.name, condition, method, seed, watch.errors, solved, seconds, fitted_rate(watch.errors))


def fitted_rate(errors: Sequence[float]) -> float:
    """The factor per iterate, from a least-squares line through log(error) over the later half (two at least)."""
    tail = np.log(errors[min(len(errors) // 2, len(errors) - 2) :])
    return math.exp(np.polyfit(np.arange(len(tail)), tail, 1)[0])


# --------------------------------------------------------------------------------------------------- reporting


def tables(runs: Sequence[Run], iterations: int) -> list[Table]:
    """One for each setting: three rows for each method, a column for each condition."""
    conditions = sorted({run.condition for run in runs})
    header = ("method", "", *(f"condition {condition:g}" for condition in conditions), "slow-down")
    result = []
    for setting in SETTINGS:
        rows = []
        for method in METHODS:
            some = [run for run in runs if (run.setting, run.method) == (setting.name, method)]
            groups = [[run for run in some if run.condition == condition] for condition in conditions]
            rows += _lines(method, groups, iterations) if some else [[method, MISSING, *["–"] * (len(conditions) + 1)]]
        result.append(Table(header, rows, f"{setting.name}. {_CAPTION.format(iterations=iterations)}"))
    return result


MISSING = "not installed"
_CAPTION = (
    f"Iterations and seconds to relative error {SOLVED:g}, or the error after {{iterations}} iterations. Rate: error "
    "of an iterate over that of the one before, in the later half of the run. Ranges over seeds. Slow-down: "
    "iterations a digit, by the median rate, at the last condition over those at the first."
)


def _lines(method: str, by_condition: list[list[Run]], limit: int) -> list[list[str]]:
    return [
        [method, "iterations", *(_iterations(runs, limit) for runs in by_condition), ""],
        ["", "seconds", *(_seconds(runs) for runs in by_condition), ""],
        ["", "rate", *(_range([run.rate for run in runs], ".4f") for runs in by_condition), _slow_down(by_condition)],
    ]


def _iterations(runs: list[Run], limit: int) -> str:
    solved = [float(run.iterations) for run in runs if run.iterations is not None]
    if not solved:
        return f"> {limit} ({median(run.errors[-1] for run in runs):.0e})"
    return _range(solved, ".0f") + ("" if len(solved) == len(runs) else f" ({len(solved)} of {len(runs)})")


def _seconds(runs: list[Run]) -> str:
    seconds = [run.seconds for run in runs if run.seconds is not None]
    return _range(seconds, ".2g") if len(seconds) == len(runs) else "–"


def _range(values: list[float], style: str) -> str:
    low, high = f"{min(values):{style}}", f"{max(values):{style}}"
    return low if low == high else f"{low}–{high}"


def _slow_down(by_condition: list[list[Run]]) -> str:
    first, last = (-math.log(median(run.rate for run in runs)) for runs in (by_condition[0], by_condition[-1]))
    if last <= 1e-9:
        return "∞"
    return f"{first / last:.1f}×" if first < 10 * last else f"{first / last:.0f}×"


def _curves(runs: Sequence[Run], setting: Setting) -> MatplotlibFigure:
    """Errors of the first seed, a panel for each condition."""
    from matplotlib import pyplot

    conditions = sorted({run.condition for run in runs})
    with figure_style():
        figure, axes = pyplot.subplots(
            1, len(conditions), figsize=(9.2, 3.2), sharey=True, layout="constrained", squeeze=False
        )
        for ax, condition in zip(axes[0], conditions, strict=True):
            for method, colour in zip(METHODS, SERIES, strict=False):
                for run in runs:
                    if (run.setting, run.condition, run.method, run.seed) == (setting.name, condition, method, 0):
                        ax.loglog(range(1, len(run.errors) + 1), run.errors, color=colour, label=method)
            ax.set(title=f"condition {condition:g}", xlabel="iteration")
        axes[0, 0].set_ylabel("relative error")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    pyplot.close(figure)
    return figure


_TEXT = f"""
Find a {SHAPE[0]} x {SHAPE[1]} matrix of rank {RANK} whose singular values fall geometrically from 1 to
1 / condition, from all its entries or from a uniform sample of them. All methods start from one point; the two
factors take the square roots of its singular values each, so that they are balanced. RiemannianGD searches its
step by Armijo's rule, on the manifold and on the factors alike; pymanopt's search is its own, with the same
first step.

A random start knows nothing. A grown start comes from {GROWTH_STEPS} Riemannian steps at each lower rank, a
singular pair of the gradient joining each time; it looks at observed entries alone.
"""


def _write_page(path: Path, runs: Sequence[Run], iterations: int, facts: dict[str, str]) -> None:
    curves = [Figure(_curves(runs, setting), f"{setting.name}, seed 0.") for setting in SETTINGS]
    sections = [Section("What was done", _TEXT), Section("Errors", items=curves)]
    sections.append(Section("Tables", items=tables(runs, iterations)))
    write_report(path, title="Ill-conditioned low-rank matrices", summary="", sections=sections, facts=facts)


def completion_command(
    conditions: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Condition numbers of the targets, comma-separated.")
    ] = "10,100,1000,10000",
    seeds: Annotated[int, typer.Option(min=1, help="Problems for each setting and condition.")] = 3,
    iterations: Annotated[int, typer.Option(min=2, help="Iterations after which a method is stopped.")] = 1000,
    processes: Processes = 2,
    out: FiguresFile = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write tables and curves to an HTML file.", show_default=False)
    ] = None,
) -> None:
    """Find ill-conditioned low-rank matrices: RiemannianGD on SVDSpectral, descent on two factors, and pymanopt.

    Targets are 120 x 100, of rank 5, float64; from all entries, or from 4 or 2.5 entries a degree of freedom.
    """
    runs = measure(_numbers(conditions), seeds=seeds, iterations=iterations, processes=processes)
    rows = [{**asdict(run), "errors": [run.errors[0], run.errors[-1]]} for run in runs]
    facts = {"seeds": f"0 to {seeds - 1}", "runs_at_a_time": f"{processes}, one thread each"}
    show_figures(tables(runs, iterations), rows, out, **facts)
    if page is not None:
        _write_page(page, runs, iterations, provenance(**facts))


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number < math.inf for number in numbers):
        raise ValueError(f"--conditions must be finite numbers from 1 on, comma-separated, got {text!r}")
    return numbers
