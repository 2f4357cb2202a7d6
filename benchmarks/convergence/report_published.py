"""The published comparison of PSI methods with others, beside what was measured here on the same network."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from ..report import Section, Table
from .export import Results
from .statistics import PairedTest, compare_pairs
from .summary import by_method, by_seed, number

__all__ = ["PUBLISHED", "published_sections"]

TASK = ("cifar10", "resnet20")

PUBLISHED: dict[str, dict[str, float]] = {
    "0": {"SGD": 91.14, "Adam": 89.90, "SGD-G": 91.38, "PSISGD without momentum": 92.25, "PSISGD": 92.41},
    "5e-4": {"SGD": 92.35, "Adam": 90.89, "SGD-G": 91.99, "PSISGD without momentum": 92.49, "PSISGD": 92.70},
}
"""Test accuracy of ResNet-20 on CIFAR-10, %, by decay and method: [Yi22, Tables 1 and 2], 200 epochs, five runs."""

OURS, OTHERS = ("PSISGD without momentum", "PSISGD"), ("SGD", "Adam", "SGD-G")
SPOKEN_AS = {"PSISGD (paper)": "PSISGD"}  # the transport of the paper counts as its method, if it was run


def published_sections(results: Results) -> list[Section]:
    """A section if methods of the published comparison were trained at its decays."""
    final = [r for r in results.metrics() if r["protocol"] == "training" and r["stage"] == "final"]
    runs = by_method(record for record in final if (record["data"], record["model"]) == TASK)
    accuracies = {method: by_seed(own, "best_accuracy") for method, own in runs.items()}
    pairs = {}
    for decay, ours, theirs in product(PUBLISHED, OURS, OTHERS):
        mine, other = _accuracies(accuracies, ours, decay), _accuracies(accuracies, theirs, decay)
        if mine and other:
            pairs[decay, ours, theirs] = mine, other
    tests = compare_pairs(pairs)
    if not tests:
        return []
    agreeing = sum(_agrees(test, _published(*key)) for key, test in tests.items())
    seen = sum(_agrees(test, _published(*key)) for key, test in tests.items() if test.seen)
    words = f"{agreeing} of {len(tests)} differences have the published sign; of these the test tells {seen} from none."
    return [Section("The published differences", f"{_TEXT.strip()} {words}", [_table(tests)])]


_TEXT = """
Yi (UAI 2022) trained ResNet-20 on CIFAR-10 for 200 epochs: without decay, and with 5e-4. Here the same methods at the
same decays, each at its own best learning rates, for as long as the training runs above: the differences of the best
accuracy, in points, beside the published ones. `PSISGD` has the paper's transport where that was run.
"""


def _accuracies(found: Mapping[str, Mapping[int, float]], method: str, decay: str) -> dict[int, float]:
    """Percent by seed, of the method with this decay."""
    names = [*(name for name, spoken in SPOKEN_AS.items() if spoken == method), method]
    for name in names:
        for own, values in found.items():
            base, _, given = own.partition(", decay ")
            if base == name and given and float(given) == float(decay):
                return {seed: 100 * value for seed, value in values.items()}
    return {}


def _table(tests: Mapping[tuple[str, str, str], PairedTest]) -> Table:
    rows = []
    for (decay, ours, theirs), test in tests.items():
        published = _published(decay, ours, theirs)
        here = f"{test.difference:+.2f} [{test.low:+.2f}, {test.high:+.2f}]"
        p = number(test.p, ".2g")
        rows.append(
            [decay, f"{ours} less {theirs}", f"{published:+.2f}", here, p, str(test.seeds), _sign(test, published)]
        )
    header = ("decay", "difference", "published", "here", "p", "seeds", "sign")
    caption = (
        "Points of test accuracy. Here: mean [95 % interval] over seeds, paired; p-value of the t-test, corrected by "
        "Holm for all rows."
    )
    return Table(header, rows, caption)


def _published(decay: str, ours: str, theirs: str) -> float:
    return PUBLISHED[decay][ours] - PUBLISHED[decay][theirs]


def _agrees(test: PairedTest, published: float) -> bool:
    return (test.difference > 0) == (published > 0)


def _sign(test: PairedTest, published: float) -> str:
    sign = "as published" if _agrees(test, published) else "opposite"
    return sign if test.seen else f"{sign}, no difference seen"
