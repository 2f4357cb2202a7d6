"""``retract demo``: PSISGD's two runs coincide, SGD's do not, and the page shows it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from retract.benchmarks.cli import app
from retract.benchmarks.data import digits
from retract.benchmarks.demo import (
    Precision,
    Run,
    Settings,
    initial_models,
    rescale_filters,
    run_demo,
)
from retract.benchmarks.demo_report import differences, first_split, tables

SETTINGS = Settings(epochs=2)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return run_demo(SETTINGS)


def test_psisgd_draws_one_curve(runs: list[Run]) -> None:
    assert max(differences(runs, "PSISGD", Precision.float64)) < 1e-11
    # float32: rounding grows with the steps, so only the first ones are held to it
    assert max(differences(runs, "PSISGD", Precision.float32)[:10]) < 1e-4


@pytest.mark.parametrize("precision", list(Precision))
def test_sgd_draws_two(runs: list[Run], precision: Precision) -> None:
    gaps = differences(runs, "SGD", precision)
    assert gaps[0] < 1e-2, "the two starting points should compute the same function"
    assert max(gaps[1:]) > 0.02


def test_every_run_learns(runs: list[Run]) -> None:
    for run in runs:
        assert [len(epoch) for epoch in run.epochs] == [21, 21]  # 1347 images in batches of 64
        assert run.losses[-1] < 0.7 * run.losses[0]
    # BatchNorm's running statistics of the rescaled network still lag after so few steps
    assert all(0.5 < run.accuracy <= 1 for run in runs if run.init == "usual")


def test_runs_repeat_to_the_bit(runs: list[Run]) -> None:
    settings = Settings(epochs=SETTINGS.epochs, precisions=(Precision.float64,))
    again = run_demo(settings)
    assert [run.losses for run in again] == [run.losses for run in runs if run.precision == Precision.float64]


def test_another_seed_is_another_run(runs: list[Run]) -> None:
    usual = initial_models(SETTINGS)["usual"].state_dict()
    other = initial_models(Settings(seed=1))["usual"].state_dict()
    assert any(not torch.equal(usual[key], other[key]) for key in usual)


def test_rescaling_keeps_the_function_and_moves_every_filter() -> None:
    models = initial_models(SETTINGS)
    data = digits.read()
    x = data.normalizer()(data.train_images[:64]).double()
    outputs = [models[name].train()(x) for name in ("usual", "rescaled")]
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * outputs[0].abs().max()
    for group, rescaled in zip(models["usual"].manifold_groups(), models["rescaled"].manifold_groups(), strict=True):
        for (name, before), (_, after) in zip(group["params"], rescaled["params"], strict=True):
            if "manifold" not in group:
                assert torch.equal(before, after), name
                continue
            ratio = group["manifold"].norms(after) / group["manifold"].norms(before)
            assert ((ratio >= 10**-1.5) & (ratio <= 10**1.5)).all(), name
            assert ratio.numel() == 1 or ratio.std() > 0.1, name


def test_rescaling_leaves_what_is_not_scale_invariant() -> None:
    model = initial_models(SETTINGS)["usual"]
    rescale_filters(model.manifold_groups(), torch.Generator().manual_seed(0), decades=0.0)
    for key, tensor in initial_models(SETTINGS)["usual"].state_dict().items():
        assert torch.allclose(model.state_dict()[key], tensor, rtol=1e-15, atol=0), key


def test_first_split_counts_steps_from_one() -> None:
    assert first_split([0.0, 1e-3, 2e-3, 1.0]) == 3
    assert first_split([0.0, 1e-3]) is None


def test_tables_hold_a_row_per_run_and_pair(runs: list[Run]) -> None:
    training, difference = tables(runs)
    assert len(training.rows) == 4
    assert len(difference.rows) == 4


def test_command_writes_page_and_metrics(tmp_path: Path) -> None:
    arguments = ["demo", "--epochs", "1", "--dtype", "float64", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert "PSISGD" in result.output
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert html.count("<table") == 2
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("test_accuracy" in record for record in records) == 4
    assert sum("loss" in record for record in records) == 4 * 21


def test_command_refuses_no_epochs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--epochs", "0", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--epochs" in result.output
