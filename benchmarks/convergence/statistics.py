"""How sure a comparison of methods over seeds is: medians with intervals, paired tests, effect sizes, and words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..paired_statistics import LEVEL, ROUNDING, compare, holm

__all__ = ["Median", "PairedTest", "compare_pairs", "median_interval", "wilcoxon_floor"]

RESAMPLES = 4999

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Median:
    """A median, the ends of its 95 % interval, NaN for a single value, and of how many values."""

    median: float
    low: float
    high: float
    count: int


def median_interval(values: Sequence[float]) -> Median:
    """Median and its percentile bootstrap interval; infinite values, of runs that did not get there, count.

    Ranks are resampled rather than values, so that infinity needs no arithmetic; between two ranks the interval takes
    the outer one. The resamples are the same at every call.

    Args:
        values: one or more, none of them NaN.

    Raises:
        ValueError: no value, or NaN.
    """
    import numpy as np
    from scipy.stats import bootstrap

    if not values or any(math.isnan(value) for value in values):
        raise ValueError(f"values must be one or more numbers, got {list(values)}")
    ordered = sorted(values)
    if len(ordered) == 1:
        return Median(ordered[0], math.nan, math.nan, 1)
    ranks = np.arange(len(ordered), dtype=np.float64)
    rng = np.random.default_rng(0)
    found = bootstrap((ranks,), np.median, n_resamples=RESAMPLES, method="percentile", rng=rng, axis=0)
    low, high = found.confidence_interval
    return Median(statistics.median(ordered), ordered[math.floor(low)], ordered[math.ceil(high)], len(ordered))


@dataclass(frozen=True)
class PairedTest:
    """One method less another, seed by seed. Corrected p-values are Holm's, each test with its own family.

    Attributes:
        difference: mean over the seeds at which both are finite.
        low, high: 95 % interval of that mean by Student's t, not corrected.
        p: corrected p-value of the t-test, by which words are chosen.
        wilcoxon_p: of the signed-rank test, which assumes no normal distribution; few seeds cannot make it small
            (`wilcoxon_floor`). A seed at which one of the two is infinite counts as the largest difference.
        cohens_d: mean over standard deviation of the differences; 0 or infinite where they do not differ.
        rank_biserial: from -1, every rank says less, to 1, every rank says more.
        seeds: that both are finite at.
        left_out: seeds at which one is infinite, or both.
    """

    difference: float
    low: float
    high: float
    p: float
    wilcoxon_p: float
    cohens_d: float
    rank_biserial: float
    seeds: int
    left_out: int = 0

    @property
    def seen(self) -> bool:
        """Whether the corrected t-test tells the two apart."""
        return self.p < LEVEL

    def worded(self, ours: str, theirs: str, *, higher_is_better: bool, digits: int = 2, unit: str = "") -> str:
        """A sentence without its full stop: who is ahead, by how much, how sure; or that no difference was seen.

        Args:
            ours: name of the one.
            theirs: name of the other.
            higher_is_better: of what was measured.
            digits: after the point.
            unit: of the difference, with a space before it if it needs one.
        """
        interval = f"[{self.low:+.{digits}f}, {self.high:+.{digits}f}]{unit}"
        sure = f"p = {self.p:.2g}, {self.seeds} seeds"
        if self.left_out:
            sure += f", {self.left_out} more left out where a run did not get there"
        if self.low == self.high != 0:
            difference = f"{self.difference:+.{digits}f}{unit}"
            return f"{ours} and {theirs} differ by {difference} at each of {self.seeds} seeds: not tested"
        if not self.seen:
            return f"{ours} and {theirs}: no difference seen ({self.difference:+.{digits}f} {interval}, {sure})"
        place = "ahead of" if (self.difference > 0) == higher_is_better else "behind"
        return f"{ours} {place} {theirs} by {abs(self.difference):.{digits}f}{unit} ({interval}, {sure})"


def compare_pairs(family: Mapping[Key, tuple[Mapping[int, float], Mapping[int, float]]]) -> dict[Key, PairedTest]:
    """Test every pair of a family, and correct for all of them.

    Args:
        family: two methods' results by seed; infinite for a run that did not get there. Seeds count that both have;
            pairs with fewer than two finite differences are left out.

    Raises:
        ValueError: a result that is NaN.
    """
    differences = {key: _differences(*pair) for key, pair in family.items()}
    finite = {
        key: {seed: value for seed, value in found.items() if math.isfinite(value)}
        for key, found in differences.items()
    }
    tests = compare({key: (values, dict.fromkeys(values, 0.0)) for key, values in finite.items()})
    ranked = holm([_wilcoxon(list(differences[key].values())) for key in tests])
    return {
        key: PairedTest(
            difference=found.difference,
            low=found.difference - found.half_width,
            high=found.difference + found.half_width,
            p=found.p,
            wilcoxon_p=ranked_p,
            cohens_d=_cohens_d(list(finite[key].values())),
            rank_biserial=_rank_biserial(list(differences[key].values())),
            seeds=len(finite[key]),
            left_out=len(differences[key]) - len(finite[key]) + _both_infinite(*family[key]),
        )
        for (key, found), ranked_p in zip(tests.items(), ranked, strict=True)
    }


def wilcoxon_floor(seeds: int) -> float:
    """The least p-value that the signed-rank test can give, two-sided: 0.0625 of five seeds, before correction."""
    return min(1.0, 2.0 ** (1 - seeds))


def _differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours less theirs; no entry where both are infinite alike."""
    found = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        if math.isnan(ours[seed]) or math.isnan(theirs[seed]):
            raise ValueError(f"results must not be NaN, got {ours[seed]} and {theirs[seed]} for seed {seed}")
        if math.isfinite(ours[seed]) or ours[seed] != theirs[seed]:
            found[seed] = ours[seed] - theirs[seed]
    return found


def _both_infinite(ours: Mapping[int, float], theirs: Mapping[int, float]) -> int:
    seeds = ours.keys() & theirs.keys()
    return sum(math.isinf(ours[seed]) and ours[seed] == theirs[seed] for seed in seeds)


def _wilcoxon(differences: Sequence[float]) -> float:
    """P-value of the signed-rank test; differences of zero say nothing."""
    from scipy.stats import wilcoxon

    said = [value for value in differences if value != 0]
    return float(wilcoxon(said).pvalue) if said else 1.0


def _rank_biserial(differences: Sequence[float]) -> float:
    """Kerby, "The simple difference formula", Comprehensive Psychology 3, 2014: favourable ranks less the others."""
    import numpy as np
    from scipy.stats import rankdata

    said = np.array([value for value in differences if value != 0])
    if not len(said):
        return 0.0
    ranks = rankdata(np.abs(said))
    return float((ranks * np.sign(said)).sum() / ranks.sum())


def _cohens_d(differences: Sequence[float]) -> float:
    """Of paired samples: d_z."""
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation <= ROUNDING * abs(mean):
        return 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return mean / deviation
