"""What the report of `retract bench convergence` says of rates: gradient norms over T, beside the theorems'."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..report import Figure, Section, Table
from .descent import PROTOCOLS
from .export import Results
from .figures import Band, two_panels
from .rates import WINDOW, RateFit, fit_rate
from .statistics import PairedTest, compare_pairs
from .summary import (
    AT_EDGE,
    SETTINGS,
    band,
    by_method,
    by_seed,
    converged,
    curve_band,
    grouped,
    number,
    seeds,
    spread,
    tuned,
)

__all__ = ["CURVES", "rate_sections"]

METRIC, EUCLIDEAN = "min_gradient_squared", "min_euclidean_gradient_squared"
SMOOTHNESS = "smoothness"
CURVES = (METRIC, EUCLIDEAN, SMOOTHNESS)
"""What the tables are made of."""
PAIR = ("GD", "PSIGD")  # of which the theory says how much one is ahead

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A protocol's title, what was done, and the exponent of T in the theorem's bound."""

    title: str
    text: str
    exponent: float


PARTS = {
    "toy": Part(
        "Gradient norm: toy regression, full batch",
        "1000 points of ten features, 100 hidden units with BatchNorm and ELU, squared loss. "
        "The least squared gradient norm of T iterations, in the metric in which scales of filters do not count; "
        "theorems bound it by a constant over T, for the methods without momentum.",
        -1.0,
    ),
    "descent": Part(
        "Gradient norm: digits, full batch",
        "A perceptron with two hidden layers and BatchNorm, all training images at every step. "
        "The least squared gradient norm of T iterations; the bound is a constant over T.",
        -1.0,
    ),
    "stochastic": Part(
        "Gradient norm: digits, in batches",
        "The same perceptron on batches, learning rates in proportion to one over the root of T, a run for every T. "
        "The least squared norm of the full gradient, looked at equally often in every run; the bound is a constant "
        "over the root of T.",
        -0.5,
    ),
}


def rate_sections(results: Results) -> list[Section]:
    """A section for each of the three protocols that has finished cells."""
    records = results.metrics()
    found = []
    for protocol, part in PARTS.items():
        own = [record for record in records if record["protocol"] == protocol]
        final, theorem = ([r for r in own if r["stage"] == stage] for stage in ("final", "theorem"))
        items: list[Figure | Table] = []
        if final:
            items += [*_figure(results, part, final), _exponents(results, part, final)]
        if theorem:
            items.append(_theorem(results, theorem))
        gains = _gains({"at tuned step sizes": final, "at the theorem's step sizes": theorem})
        if gains:
            items.append(_gain_table(gains))
        if items:
            found.append(Section(part.title, "\n\n".join([part.text, *_gain_words(gains)]), items))
    return found


# ------------------------------------------------------------------------------------------------------ exponents


def _figure(results: Results, part: Part, records: Sequence[Record]) -> list[Figure]:
    bands = {method: _band(results, runs) for method, runs in by_method(records).items()}
    known = {method: found for method, found in bands.items() if found is not None}
    if not known:
        return []
    figure = two_panels(
        known,
        known,
        xlabel="T, gradients",
        ylabel="least squared gradient norm",
        xscale="log",
        yscale="log",
        slope=part.exponent,
    )
    return [Figure(figure, f"Median over seeds and its 95 % bootstrap interval. Dotted: T to the {part.exponent:g}.")]


def _band(results: Results, runs: Sequence[Record]) -> Band | None:
    if not _in_runs(runs):
        return curve_band(results, runs, METRIC)
    curves = [curve for curve in _curves(results, runs, METRIC).values() if len(curve) == _lengths(runs)]
    return (
        band([point[0] for point in curves[0]], [[point[1] for point in curve] for curve in curves]) if curves else None
    )


def _exponents(results: Results, part: Part, records: Sequence[Record]) -> Table:
    rows, protocol = [], PROTOCOLS[records[0]["protocol"]]
    for method, runs in by_method(records).items():
        longest = max(run["steps"] for run in runs)
        last = [run for run in runs if run["steps"] == longest]
        metric, euclidean = (_fit(results, runs, name, part.exponent) for name in (METRIC, EUCLIDEAN))
        least = spread(by_seed(last, METRIC).values(), ".2g")
        beside = "–" if metric is None else metric.worded()
        own = tuned(last, protocol.methods[method], protocol.rate_factor(longest))
        rows.append([method, *own, seeds(runs), least, _fit_text(metric), beside, _fit_text(euclidean)])
    header = ("method", *SETTINGS, "runs", "least squared norm", "exponent", "beside the bound", "exponent, Euclidean")
    window = "all T" if part.exponent == -0.5 else f"the last T, from their end over {WINDOW:g}"
    caption = (
        "Learning rates and least norm of the longest runs: median [95 % bootstrap interval] over seeds. Exponent of "
        f"T, fitted over {window}: mean [95 % interval] over seeds. Euclidean: of the gradient with respect to the "
        f"weights as they are. Runs: converged of all. {AT_EDGE}"
    )
    return Table(header, rows, caption)


def _fit(results: Results, runs: Sequence[Record], name: str, exponent: float) -> RateFit | None:
    if not converged(runs):
        return None
    return fit_rate(_curves(results, runs, name), theory=exponent, window=None if _in_runs(runs) else WINDOW)


def _fit_text(fit: RateFit | None) -> str:
    return "–" if fit is None else f"{fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}]"


def _in_runs(runs: Sequence[Record]) -> bool:
    """Whether every T has a run of its own."""
    return _lengths(runs) > 1


def _lengths(runs: Sequence[Record]) -> int:
    return len({run["steps"] for run in runs})


def _curves(results: Results, runs: Sequence[Record], name: str) -> dict[int, list[Sequence[Any]]]:
    """By seed: the curve of its run, or a point for each of its runs where every T has one."""
    if not _in_runs(runs):
        return {run["seed"]: list(results.curve(run, name)) for run in converged(runs)}
    own = grouped(sorted(converged(runs), key=lambda run: run["steps"]), lambda run: int(run["seed"]))
    return {seed: [(run["steps"], run[name]) for run in group] for seed, group in own.items()}


# ---------------------------------------------------------------------------------------------- the theory's gain


def _theorem(results: Results, records: Sequence[Record]) -> Table:
    """Runs by the theorem's step sizes, beside its bound."""
    rows = []
    for method, runs in by_method(records).items():
        good = converged(runs)
        largest = [_largest(results, run) / run[SMOOTHNESS] for run in good]
        of_bound = [run[METRIC] / run["bound"] for run in good]
        steps = [spread(by_seed(good, name).values(), ".2g") for name in ("step", "euclidean_step")]
        least = spread(by_seed(good, METRIC).values(), ".2g")
        norms = spread(by_seed(good, "mean_square_norm").values())
        rows.append([method, *steps, seeds(runs), least, spread(of_bound, ".1e"), spread(largest), norms])
    header = ("method", "step", "step of others", "runs", "least squared norm", "of the bound", "later L", "mean |w|²")
    caption = (
        "From filters of norm 1, by the step sizes that the theorem takes from second derivatives at the start; L is "
        "the constant of its bound. Later L: the largest along the run over the first; the theorem asks for 1 or less. "
        "|w|²: of the filters at the end. Median [95 % bootstrap interval] over seeds."
    )
    return Table(header, rows, caption)


def _largest(results: Results, run: Record) -> float:
    return max([point[1] for point in results.curve(run, SMOOTHNESS) if point[1] is not None], default=run[SMOOTHNESS])


@dataclass(frozen=True)
class Gain:
    """GD's least squared norm over PSIGD's in decades, and mean |w|² of GD's filters: the most that theory has."""

    test: PairedTest
    most: float


def _gains(stages: Mapping[str, Sequence[Record]]) -> dict[str, Gain]:
    pairs, most = {}, {}
    for name, records in stages.items():
        runs = by_method(converged(records))
        if all(method in runs for method in PAIR):
            gd, psi = (
                {seed: math.log10(value) for seed, value in by_seed(runs[method], METRIC).items()} for method in PAIR
            )
            pairs[name] = gd, psi
            most[name] = statistics.median(by_seed(runs[PAIR[0]], "mean_square_norm").values())
    return {name: Gain(test, most[name]) for name, test in compare_pairs(pairs).items()}


def _gain_words(gains: Mapping[str, Gain]) -> list[str]:
    """Whether the constant factor by which the theory has PSIGD ahead is seen."""
    if not gains:
        return []
    sentences = ["The theory has `PSIGD` ahead of `GD` by a constant factor, |w|² of `GD`'s filters at most."]
    for name, gain in gains.items():
        test = gain.test
        ratio = f"{_ratio(test.difference)} [{_ratio(test.low)}, {_ratio(test.high)}]"
        if not test.seen:
            shown = "no difference seen, the gain does not show"
        elif test.difference < 0:
            shown = "PSIGD is behind, the gain does not show"
        elif 10**test.low > gain.most:
            shown = "PSIGD is ahead by more than the theory says"
        else:
            shown = "the gain shows"
        sentences.append(
            f"{name[0].upper()}{name[1:]} `GD`'s least squared norm is {ratio} times `PSIGD`'s (p = {test.p:.2g}, "
            f"{test.seeds} seeds), |w|² {_ratio(math.log10(gain.most))}: {shown}."
        )
    return [" ".join(sentences)]


def _ratio(decades: float) -> str:
    """Of so many decades: "0.28"; near one with what it differs by, "1.00031"."""
    value = 10**decades
    digits = 3 if abs(value - 1) > 0.05 else 3 - math.floor(math.log10(max(abs(value - 1), 1e-6)))
    return f"{value:.{digits}g}"


def _gain_table(gains: Mapping[str, Gain]) -> Table:
    rows = []
    for name, gain in gains.items():
        test = gain.test
        ratios = [_ratio(x) for x in (test.difference, test.low, test.high, math.log10(gain.most))]
        sure = [number(test.p, ".2g"), number(test.wilcoxon_p, ".2g"), number(test.cohens_d, ".2f")]
        rows.append([name, *ratios, *sure])
    header = ("step sizes", "GD over PSIGD", "low", "high", "|w|² of GD", "p", "p, Wilcoxon", "Cohen's d")
    caption = (
        "Ratio of least squared gradient norms in the metric, paired by seed: geometric mean and 95 % interval, "
        "p-values corrected by Holm, effect size of the logarithms."
    )
    return Table(header, rows, caption)
