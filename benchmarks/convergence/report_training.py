"""What the report of `retract bench convergence` says of training: how fast, how far, and who is ahead of whom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..report import Figure, Section, Table
from .export import Results
from .figures import two_panels
from .methods import FIXED_DECAY, find_method
from .statistics import PairedTest, compare_pairs, wilcoxon_floor
from .summary import (
    AT_EDGE,
    SETTINGS,
    by_method,
    converged,
    curve_band,
    grouped,
    number,
    seeds,
    spread,
    tuned,
    verdict,
)

__all__ = ["CURVES", "Measure", "training_sections"]

CURVES = ("accuracy", "train_loss")
"""What the tables are made of."""

REFERENCE, LEADER = "SGD", "PSIAngular"
LEVELS = (0.8, 0.95, 0.99)
"""Target accuracies, in parts of the reference's median best."""
SPOKEN = ("best accuracy %", "loss halfway")
"""Measures, beside the times to targets, of which sentences speak."""

Record = Mapping[str, Any]


class Measure(NamedTuple):
    """What runs are compared by: from a run to it, None of one without; the form it is shown in; what is better."""

    of: Callable[[Record], float | None]
    form: str
    higher_is_better: bool


def training_sections(results: Results, *, effects: bool = True) -> list[Section]:
    """A section for every data set and network that methods were trained on.

    Args:
        results: the protocol's and others'.
        effects: with a table of p-values and effect sizes, a row for each test.
    """
    final = [r for r in results.metrics() if r["protocol"] == "training" and r["stage"] == "final"]
    tasks = grouped(final, lambda record: (record["data"], record["model"]))
    return [_section(results, data, model, records, effects=effects) for (data, model), records in tasks.items()]


def _section(results: Results, data: str, model: str, records: Sequence[Record], *, effects: bool) -> Section:
    runs = by_method(records)
    leader = _first(LEADER, runs)
    reference = _first(REFERENCE, runs) or next(iter(runs))
    measures = _measures(results, _targets(runs[reference]))
    values = {method: {name: _values(own, m) for name, m in measures.items()} for method, own in runs.items()}
    items: list[Figure | Table] = [*_figures(results, runs), _methods(runs, values, measures)]
    words = []
    # Of two methods the second table would say what the first says.
    for whose in dict.fromkeys([reference, *([leader] if leader and len(runs) > 2 else [])]):
        family = _against(whose, values, measures)
        if any(family.values()):
            words += _words(whose, leader, family, measures)
            others = [method for method in runs if method != whose]
            items += [_differences(whose, others, family, measures), *([_effects(whose, family)] if effects else [])]
    levels = ", ".join(f"{100 * level:g} %" for level in LEVELS)
    text = _TEXT.strip().format(reference=reference, levels=levels)
    return Section(f"Training: {model} on {data}", "\n\n".join([text, *words]), items)


def _first(name: str, methods: Iterable[str]) -> str | None:
    """The first of this name, with its decay tuned or fixed."""
    return next((method for method in methods if method.partition(FIXED_DECAY)[0] == name), None)


_TEXT = """
Every method at its own settings, tuned in as many trials on a validation split; test images are looked at here alone.
Runs of a seed begin at the same weights and see the same batches. Targets are parts of the median best accuracy of
`{reference}` ({levels}), reached on the straight line between two looks at the test images; seconds are of
training alone, on one thread.
"""


# ------------------------------------------------------------------------------------------------------ measures


def _targets(reference: Sequence[Record]) -> list[float]:
    """Target accuracies, rounded to tenths of a percent; none if every run of the reference diverged."""
    best = [record["best_accuracy"] for record in converged(reference)]
    return [round(level * statistics.median(best), 3) for level in LEVELS] if best else []


def _measures(results: Results, targets: Sequence[float]) -> dict[str, Measure]:
    def halfway(record: Record) -> float | None:
        curve = results.curve(record, "train_loss") if converged([record]) else ()
        return curve[(len(curve) - 1) // 2][1] if curve else None

    found = {
        "best accuracy %": Measure(_percent("best_accuracy"), ".2f", True),
        "last accuracy %": Measure(_percent("accuracy"), ".2f", True),
        "area %": Measure(_percent("area"), ".2f", True),
        "loss halfway": Measure(halfway, ".4f", False),
        "last loss": Measure(lambda record: record["train_loss"], ".4f", False),
    }
    for target in targets:
        found[f"epochs to {100 * target:.1f} %"] = Measure(_until(results, target, 0), ".3g", False)
    for target in targets:
        found[f"seconds to {100 * target:.1f} %"] = Measure(_until(results, target, 1), ".3g", False)
    return found


def _percent(name: str) -> Callable[[Record], float | None]:
    return lambda record: None if record[name] is None else 100 * record[name]


def _until(results: Results, target: float, which: int) -> Callable[[Record], float | None]:
    """Epochs (0) or seconds (1) until the test accuracy is there, on straight lines between looks at test images;
    infinite if it never is, and of a run that diverged.
    """

    def until(record: Record) -> float | None:
        before = (0.0, 0.0, 0.0)
        for step, value, seconds in results.curve(record, "accuracy") if converged([record]) else ():
            here = (step or 0.0, value or 0.0, seconds or 0.0)
            if here[1] >= target:
                start, end = (before[0], here[0]) if which == 0 else (before[2], here[2])
                return start + (end - start) * (target - before[1]) / (here[1] - before[1])
            before = here
        return math.inf

    return until


def _values(records: Sequence[Record], measure: Measure) -> dict[int, float]:
    """By seed, of the runs that did not diverge; of times, of all: a run that diverged never gets there."""
    found = {record["seed"]: measure.of(record) for record in records}
    return {seed: value for seed, value in found.items() if value is not None}


# -------------------------------------------------------------------------------------------- figures and tables


def _figures(results: Results, runs: Mapping[str, Sequence[Record]]) -> list[Figure]:
    found = []
    for name, timed, ylabel, yscale in (
        ("train_loss", False, "training loss", "log"),
        ("accuracy", False, "test accuracy", "linear"),
        ("accuracy", True, "test accuracy", "linear"),
    ):
        bands = {method: curve_band(results, own, name, timed=timed) for method, own in runs.items()}
        known = {method: band for method, band in bands.items() if band is not None}
        if known:
            xlabel = "seconds of training" if timed else "epochs"
            figure = two_panels(known, runs, xlabel=xlabel, ylabel=ylabel, yscale=yscale)
            caption = f"{ylabel.capitalize()} over {xlabel}: median over seeds and its 95 % bootstrap interval."
            found.append(Figure(figure, caption))
    return found


def _methods(
    runs: Mapping[str, Sequence[Record]],
    values: Mapping[str, Mapping[str, Mapping[int, float]]],
    measures: Mapping[str, Measure],
) -> Table:
    rows = []
    for method, own in runs.items():
        if not converged(own):
            cells = ["diverged"] * len(measures)
        else:
            cells = [spread(values[method][name].values(), measure.form) for name, measure in measures.items()]
        rows.append([method, *tuned(own, find_method(method)), seeds(own), *cells])
    caption = (
        "Median [95 % bootstrap interval] over seeds. Runs: converged of all. Area: mean of the test accuracy over the "
        "looks. Halfway: training loss after half of the epochs. Never: the median run, or an end of the interval, "
        f"does not get there. {AT_EDGE}"
    )
    return Table(("method", *SETTINGS, "runs", *measures), rows, caption)


# --------------------------------------------------------------------------------------------------- comparisons


def _against(
    whose: str, values: Mapping[str, Mapping[str, Mapping[int, float]]], measures: Mapping[str, Measure]
) -> dict[str, dict[str, PairedTest]]:
    """By measure: every other method less this one; those of a measure are one family."""
    compared = [name for name in measures if not name.startswith("last")]
    return {
        name: compare_pairs({m: (found[name], values[whose][name]) for m, found in values.items() if m != whose})
        for name in compared
    }


def _words(
    whose: str,
    leader: str | None,
    family: Mapping[str, Mapping[str, PairedTest]],
    measures: Mapping[str, Measure],
) -> list[str]:
    """The leader beside the reference in a sentence for each measure that is spoken of; or beside all, counted."""
    spoken = [name for name in family if name in SPOKEN or name.startswith("epochs")]
    if leader is None:
        return []
    if whose == leader:
        return [" ".join(_counted(leader, name, family[name], measures[name]) for name in spoken if family[name])]
    sentences = [
        f"{_capital(name)}: {family[name][leader].worded(leader, whose, higher_is_better=measure.higher_is_better)}."
        for name, measure in measures.items()
        if name in spoken and leader in family[name]
    ]
    return [" ".join(sentences)] if sentences else []


def _counted(leader: str, name: str, tests: Mapping[str, PairedTest], measure: Measure) -> str:
    """Whom the leader, whom the others were compared with, is ahead of and behind."""
    seen = {method: (test.difference > 0) == measure.higher_is_better for method, test in tests.items() if test.seen}
    ahead, behind = sum(not better for better in seen.values()), sum(seen.values())
    return (
        f"{_capital(name)}: {leader} is ahead of {ahead} of the {len(tests)} other methods, behind {behind}, and no "
        f"difference is seen from {len(tests) - ahead - behind}."
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _differences(
    whose: str,
    others: Sequence[str],
    family: Mapping[str, Mapping[str, PairedTest]],
    measures: Mapping[str, Measure],
) -> Table:
    rows = [
        [other, *(_difference(tests.get(other), measures[name]) for name, tests in family.items())] for other in others
    ]
    count = max(test.seeds for tests in family.values() for test in tests.values())
    caption = (
        f"Each method less `{whose}`, paired by seed: mean [95 % interval] by Student's t, and whether the method is "
        "ahead or behind by the t-test corrected by Holm for its column; else no difference is seen. With "
        f"{count} seeds the least p-value of Wilcoxon's signed-rank test is {wilcoxon_floor(count):.2g}."
    )
    return Table((f"method, less {whose}", *family), rows, caption)


def _difference(test: PairedTest | None, measure: Measure) -> str:
    if test is None:
        return "–"
    numbers = f"{test.difference:+{measure.form}} [{test.low:+{measure.form}}, {test.high:+{measure.form}}]"
    return f"{numbers}, {verdict(test, higher_is_better=measure.higher_is_better)}"


def _effects(whose: str, family: Mapping[str, Mapping[str, PairedTest]]) -> Table:
    """The numbers behind the words, a row for each test."""
    rows = []
    for name, tests in family.items():
        for other, test in tests.items():
            ps = [number(p, ".2g") for p in (test.p, test.wilcoxon_p)]
            sizes = [number(size, ".2f") for size in (test.cohens_d, test.rank_biserial)]
            rows.append([other, name, *ps, *sizes, str(test.seeds), str(test.left_out)])
    header = ("method", "measure", "p", "p, Wilcoxon", "Cohen's d", "rank-biserial", "seeds", "left out")
    caption = f"Tests of each method less `{whose}`: p-values corrected by Holm over a measure's, and effect sizes."
    return Table(header, rows, caption)
