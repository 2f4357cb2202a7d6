"""Comparisons of methods seed by seed, one or many at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Comparison", "compare", "holm", "mean_and_error", "paired_difference"]

LEVEL = 0.05
ROUNDING = 1e-12

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Comparison:
    """Mean difference over seeds, half the width of its 95 % interval, and the p-value corrected for its family."""

    difference: float
    half_width: float
    p: float

    def worded(self, *, higher_is_better: bool) -> str:
        """`helps`, `hurts`, or `ties` where the corrected p-value is not below 0.05."""
        if self.p >= LEVEL:
            return "ties"
        return "helps" if (self.difference > 0) == higher_is_better else "hurts"


def compare(family: Mapping[Key, tuple[Mapping[int, float], Mapping[int, float]]]) -> dict[Key, Comparison]:
    """Student's paired t-test of each pair of methods, corrected for all of them by Holm's step-down procedure.

    Args:
        family: two methods' results by seed. Seeds count that both have; pairs with fewer than two are left out.
    """
    differences = {
        key: [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        for key, (ours, theirs) in family.items()
    }
    differences = {key: values for key, values in differences.items() if len(values) > 1}
    tests = {key: _t_test(values) for key, values in differences.items()}
    corrected = holm([p for _, p in tests.values()])
    return {
        key: Comparison(statistics.mean(values), tests[key][0], p)
        for (key, values), p in zip(differences.items(), corrected, strict=True)
    }


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float, float, float] | None:
    """Mean of a less b over the seeds that both have, and the ends of its 95 % interval by Student's t.

    None without two such seeds.
    """
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if len(differences) < 2:
        return None
    mean, (half, _) = statistics.mean(differences), _t_test(differences)
    return mean, mean - half, mean + half


def _t_test(differences: Sequence[float]) -> tuple[float, float]:
    """Half the width of the 95 % interval of the mean, and the two-sided p-value of mean zero.

    Differences that are all the same have no spread to judge their mean by: the p-value is 1.
    """
    from scipy.stats import t as students_t

    mean, error = mean_and_error(differences)
    freedom = len(differences) - 1
    if error <= ROUNDING * abs(mean):
        return 0.0, 1.0
    return float(students_t.ppf(1 - LEVEL / 2, freedom)) * error, float(2 * students_t.sf(abs(mean) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the chance of one or more false rejections is below the level at which they are compared.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is NaN of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
