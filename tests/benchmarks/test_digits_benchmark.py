"""`retract bench digits`: trials are reproducible, and tuning never sees test images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from retract.benchmarks import digits
from retract.benchmarks.cli import app
from retract.benchmarks.digits import Result, Trial


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch, two settings: enough to see what is done with the results."""
    monkeypatch.setattr(digits, "EPOCHS", 4)
    monkeypatch.setattr(digits, "RATES", (0.03, 0.1))
    monkeypatch.setattr(digits, "EUCLIDEAN_RATES", (0.1,))


def trial(method: str = "PSISGD", init: str = "usual", tuning: bool = False) -> Trial:
    return Trial(method, 0.1, 0.1, init, 0, tuning)


def test_a_trial_gives_the_same_result_to_the_bit() -> None:
    assert digits.train(trial()) == digits.train(trial())


@pytest.mark.parametrize("init", ["filters", "layers"])
def test_psisgd_trains_alike_from_rescaled_weights_and_sgd_does_not(init: str) -> None:
    """docs/checks.md, check 20, in its first epochs."""
    usual, rescaled = (digits.train(trial("PSISGD", start)) for start in ("usual", init))
    assert rescaled.first_loss == pytest.approx(usual.first_loss, abs=1e-3)
    usual, rescaled = (digits.train(trial("SGD", start)) for start in ("usual", init))
    assert abs(rescaled.first_loss - usual.first_loss) > 0.02


def test_sgd_fails_where_layers_are_out_of_scale_and_psisgd_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/checks.md, check 20, at the end of training."""
    monkeypatch.setattr(digits, "EPOCHS", 12)
    ours, theirs = (digits.train(trial(method, "layers")) for method in ("PSISGD", "SGD"))
    assert ours.accuracy > 97
    assert theirs.accuracy < 95
    assert theirs.last_loss > 5 * ours.last_loss


def test_tuning_never_sees_the_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits.digits.read()
    before = digits.train(trial(tuning=True))
    spoiled = torch.zeros_like(data.test_images)
    monkeypatch.setattr(digits.digits, "read", lambda: type(data)(**{**vars(data), "test_images": spoiled}))
    assert digits.train(trial(tuning=True)) == before


def test_the_lowest_validation_loss_wins_and_nan_never() -> None:
    trials = [Trial("SGD", lr, 0.1, "usual", seed, True) for lr in (0.1, 0.3, 1.0) for seed in (0, 1)]
    losses = [0.2, 0.4, 0.25, 0.3, float("nan"), 0.01]
    results = [Result(1, 1, loss, 90) for loss in losses]
    assert digits._best(list(zip(trials, results, strict=True)))["SGD"].lr == 0.3


@pytest.mark.slow
def test_command_writes_report_and_results(tmp_path: Path) -> None:
    arguments = ["bench", "digits", "--methods", "SGD;PSISGD", "--seeds", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sum(not row["tuning"] for row in rows) == 2 * 3 * 2
    assert len(rows) == digits.count_trials(["SGD", "PSISGD"], 2)
    assert "PSISGD" in (tmp_path / "report.html").read_text()


def test_a_rate_that_a_method_refuses_is_a_failed_trial() -> None:
    assert digits.train(Trial("PSIAngular", 3.0, 0.1, "usual", 0, True)) is digits.FAILED


def test_unknown_methods_are_named() -> None:
    result = CliRunner().invoke(app, ["bench", "digits", "--methods", "SGDX"])
    assert result.exit_code == 2
    assert "SGDX" in result.output
