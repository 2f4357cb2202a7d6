"""Successive halving: the rounds, their order of decisions, equal trials for every method, and the best setting."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from retract.benchmarks.convergence.methods import FULL_BATCH, METHODS, STOCHASTIC, Method, Setting, find_method
from retract.benchmarks.convergence.tuning import Trial, Tuned, tune

GRID = Method("sgd", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.1, 0.3, 1.0), (0.0, 5e-4)).grid
BEST = Setting(0.3, 0.3, 5e-4)
SEEDS = (1000, 1001)


def loss(trial):
    """Least at BEST; noisier the shorter the run."""
    setting = trial.setting
    far = abs(math.log(setting.lr / BEST.lr)) + abs(math.log(setting.euclidean_lr / BEST.euclidean_lr))
    noise = random.Random(f"{trial}").uniform(0, 0.3 / trial.ninths)
    return far + (0.1 if setting.weight_decay == 0 else 0) + noise


class Losses:
    """Remembers what it was asked for."""

    def __init__(self, of=loss):
        self.of, self.rounds = of, []

    def __call__(self, trials):
        self.rounds.append(trials)
        return {trial: self.of(trial) for trial in trials}


def test_a_third_goes_on_to_three_times_the_epochs():
    losses = Losses()
    found = tune(GRID, losses, trials=36, seeds=SEEDS)
    assert found.setting == BEST
    assert found.loss == pytest.approx(sum(loss(Trial(BEST, 9, seed)) for seed in SEEDS) / 2)
    assert [Counter(trial.ninths for trial in found) for found in losses.rounds] == [{1: 72}, {3: 24}, {9: 8}]
    for ninths, found in zip((1, 3), losses.rounds, strict=False):
        means = {s: sum(loss(Trial(s, ninths, seed)) for seed in SEEDS) for s in {trial.setting for trial in found}}
        ranked = sorted(means, key=means.__getitem__)
        following = losses.rounds[losses.rounds.index(found) + 1]
        assert {trial.setting for trial in following} == set(ranked[: len(ranked) // 3])


def test_every_trial_is_asked_for_once_and_the_order_of_answers_does_not_matter():
    def reversed_losses(trials):
        return dict(reversed([(trial, loss(trial)) for trial in trials]))

    losses = Losses()
    assert tune(GRID, losses, trials=20, seeds=SEEDS) == tune(GRID, reversed_losses, trials=20, seeds=SEEDS)
    asked = [trial for trials in losses.rounds for trial in trials]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(("trials", "rounds"), [(1, [1]), (3, [3, 1]), (10, [10, 4, 2]), (99, [36, 12, 4])])
def test_every_number_of_trials_ends_in_whole_runs(trials, rounds):
    losses = Losses()
    found = tune(GRID, losses, trials=trials, seeds=(0,))
    assert [len(asked) for asked in losses.rounds] == rounds
    assert {trial.ninths for trial in losses.rounds[-1]} == {9}
    assert found.setting in {trial.setting for trial in losses.rounds[-1]}


def test_equal_grids_are_tried_at_equal_places():
    places = []
    for method in ("SGD", "Muon", "PSIAngular"):
        losses = Losses(lambda trial: 1.0)
        grid = STOCHASTIC[method].grid
        tune(grid, losses, trials=7, seeds=(0,))
        places.append([grid.index(trial.setting) for trial in losses.rounds[0]])
    assert places[0] == places[1] == places[2]


def test_settings_that_diverge_lose():
    def losses(trials):
        return {trial: math.inf if trial.setting != BEST or trial.seed else 5.0 for trial in trials}

    assert tune(GRID, losses, trials=36, seeds=(0,)) == Tuned(BEST, 5.0)
    assert tune(GRID, losses, trials=36, seeds=(0, 1)).loss == math.inf


def test_it_can_be_stopped():
    assert tune(GRID, lambda trials: None, trials=36, seeds=SEEDS) is None


def test_nothing_to_tune_is_an_error():
    for grid, trials, seeds in (([], 3, (0,)), (GRID, 0, (0,)), (GRID, 3, ())):
        with pytest.raises(ValueError, match="grid, trials and seeds must not be empty"):
            tune(grid, loss, trials=trials, seeds=seeds)


def test_the_length_of_a_trial():
    assert [Trial(BEST, ninths, 0).part_of(9) for ninths in (1, 3, 9)] == [1, 3, 9]
    assert [Trial(BEST, ninths, 0).part_of(40) for ninths in (1, 3, 9)] == [4, 13, 40]
    assert Trial(BEST, 1, 0).part_of(2) == 1


# ----------------------------------------------------------------------------------------------------- the methods


def test_grids_have_one_shape():
    for name, method in STOCHASTIC.items():
        shape = (len(method.lrs), len(method.euclidean_lrs), len(method.weight_decays))
        assert shape == (6, 4, 2), name
        assert len(set(method.grid)) == 48
    for method in METHODS.values():
        for rates in (method.lrs, method.euclidean_lrs):
            assert all(round(b / a, 6) in (3, round(10 / 3, 6)) for a, b in pairwise(rates))
    assert FULL_BATCH.keys() & STOCHASTIC.keys() == {"Adam"}


def test_edges_of_a_grid():
    method = Method("sgd", (0.1, 0.3, 1.0), (0.1, 0.3, 1.0), (0.0,))
    assert method.at_edges(0.3, 0.3) == (False, False)
    assert method.at_edges(0.1, 0.3) == (True, False) and method.at_edges(0.3, 1.0) == (False, True)
    assert method.at_edges(0.1000001, 0.3) == (True, False), "an export has six digits"


def test_names_with_a_fixed_decay():
    assert find_method("SGD") is METHODS["SGD"]
    fixed = find_method("SGD, decay 1e-3")
    assert fixed.weight_decays == (1e-3,) and fixed.lrs == METHODS["SGD"].lrs
    with pytest.raises(ValueError, match=r"method must be of SGD; .*, got 'Lion'"):
        find_method("Lion")
    for decay in ("much", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"a number of at least 0, got '{decay}'"):
            find_method(f"SGD, decay {decay}")
