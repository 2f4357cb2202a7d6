"""How `retract bench convergence` tunes a method: successive halving, with the same trials and runs for every one.

The search is scikit-learn's. Its rounds are synchronous, so which settings go on depends neither on how many processes
train them nor on which ends first, and every method trains for exactly as many epochs. A run of a later round begins
anew with a schedule of its own, for losses are comparable at the end of a schedule only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .methods import Setting

__all__ = ["TUNING_SEEDS", "Trial", "Tuned", "tune"]

TUNING_SEEDS = (1000, 1001)
"""Of the runs that settings are chosen by; no run of a comparison has them."""
FACTOR = 3  # a third of the settings goes on
WHOLE = 9  # ninths, of the runs of the last round: a run of the round before is a third as long
WORST = 1e9  # stands for the loss of a run that diverged, in sums that have to stay finite


@dataclass(frozen=True)
class Trial:
    """One training run of the search: a setting, ninths of a whole run's epochs, and a seed."""

    setting: Setting
    ninths: int
    seed: int

    def part_of(self, whole: int) -> int:
        """How many epochs or steps it takes, if a whole run has so many: 1 at least."""
        return max(1, round(whole * self.ninths / WHOLE))


@dataclass(frozen=True)
class Tuned:
    """The best setting, and its mean loss over seeds in whole runs; infinite if all of the last round diverged."""

    setting: Setting
    loss: float


Losses = Callable[[list[Trial]], Mapping[Trial, float] | None]


def tune(grid: Sequence[Setting], losses: Losses, *, trials: int, seeds: Sequence[int]) -> Tuned | None:
    """The setting of the lowest mean loss by successive halving.

    Args:
        grid: to choose from.
        losses: trains and returns the loss of every trial of a list, infinite if it diverged; None to stop the search.
        trials: settings of the first round, drawn at random without replacement; the whole grid if it has no more. For
            grids of equal length they are the same places of the grid.
        seeds: of which every setting has a run each.

    Returns:
        The best of the last round, or None if ``losses`` stopped the search.

    Raises:
        ValueError: no trials, no seeds or no grid.

    Source: Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
    """
    if not grid or trials < 1 or not seeds:
        raise ValueError(f"grid, trials and seeds must not be empty, got {len(grid)}, {trials} and {len(seeds)}")
    known: dict[Trial, float] = {}
    while True:
        search, missing = _search(grid, known, min(trials, len(grid)), seeds)
        if not missing:
            best = grid[search.best_params_["setting"]]
            loss = -float(search.best_score_)
            return Tuned(best, loss if loss < WORST / len(seeds) else float("inf"))
        # What the search asked for after a round that is not complete, it asked for without knowing that round.
        first = min(trial.ninths for trial in missing)
        found = losses([trial for trial in missing if trial.ninths == first])
        if found is None:
            return None
        known.update(found)


def _search(
    grid: Sequence[Setting], known: Mapping[Trial, float], trials: int, seeds: Sequence[int]
) -> tuple[Any, list[Trial]]:
    """scikit-learn's search over runs whose losses are known, and those it asked for that are not."""
    from sklearn.base import BaseEstimator
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401  # opens the import below
    from sklearn.model_selection import HalvingRandomSearchCV

    missing: dict[Trial, None] = {}

    class Lookup(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
        """A run in scikit-learn's terms: its one sample is a seed, and its score is known already."""

        def __init__(self, setting: int = 0, ninths: int = 1) -> None:
            self.setting, self.ninths = setting, ninths

        def fit(self, seeds: Any, y: Any = None) -> Any:
            return self

        def score(self, seeds: Any, y: Any = None) -> float:
            trial = Trial(grid[self.setting], self.ninths, int(seeds[0, 0]))
            if trial not in known:
                missing[trial] = None
            return -min(known.get(trial, WORST), WORST)

    search = HalvingRandomSearchCV(
        Lookup(),
        {"setting": list(range(len(grid)))},
        n_candidates=trials,
        factor=FACTOR,
        resource="ninths",
        min_resources="exhaust",  # few trials begin with longer runs, so that the last round is of whole ones
        max_resources=WHOLE,
        cv=[([index], [index]) for index in range(len(seeds))],
        refit=False,
        random_state=0,
        error_score="raise",
    )
    search.fit(np.array(seeds)[:, None])
    return search, list(missing)
