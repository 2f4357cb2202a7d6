"""`retract bench canonical`: alike for all methods, truncations train all that is left, and a stopped grid goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import typer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from typer.testing import CliRunner

from retract.benchmarks import canonical, canonical_cell, canonical_report
from retract.benchmarks.canonical_cell import METHODS, Cell, Settings, _count, cut_terms, train_cell
from retract.benchmarks.data import load
from retract.benchmarks.runs import Run
from retract.nets.cnn import MODELS
from retract.nets.parametrizations.canonical import canonical_weight_norm
from retract.nets.parametrizations.models import canonical_weights

SETTINGS = Settings(
    data="digits",
    data_dir=None,
    model="tiny",
    subset=40,
    image_size=None,
    epochs=1,
    tuning_epochs=1,
    fine_tuning_epochs=1,
    batch_size=20,
    pressure=0.3,
    device="cpu",
    amp=False,
)


def tiny(num_classes=10, in_channels=1, *, weights="plain"):
    """A network as those of the benchmark, for 8x8 images: 5, 40 and 9 terms."""
    layers = [nn.Conv2d(in_channels, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(256, num_classes)]
    for layer, rank in zip(layers, (5, 40, 9), strict=True):
        if weights == "weight_norm":
            weight_norm(layer)
        elif weights == "canonical":
            canonical_weight_norm(layer, rank)
    first, second, last = layers
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), last)


@pytest.fixture(scope="module", autouse=True)
def tiny_network_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", tiny)
        patch.setattr(canonical, "MODELS", ("mnist_convnet", "cifar_alexnet", "tiny"))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a canonical network that was trained, and its results."""
    folder = tmp_path_factory.mktemp("grid")
    return folder, train_cell(SETTINGS, folder, cell("canonical"), never)


def cell(method, stage="training", kept=1.0, allocation="ratio", lr=1e-3, seed=0):
    fine = 2e-3 if stage in ("truncation", "fine-tuning") else None
    return Cell(method, lr, seed, stage, kept, allocation, fine)


def never():
    return False


class After:
    """Asks to stop at the given step."""

    def __init__(self, step):
        self.left = step

    def __call__(self):
        self.left -= 1
        return self.left == 0


def begin(folder, one, settings=SETTINGS):
    return canonical_cell._begin(settings, folder, one, canonical_cell.load_data(settings))


# ------------------------------------------------------------------------------------------------------- one cell


def test_parameters_of_the_networks_of_the_paper():
    """As published, less vectors of unit modes and sigma."""
    settings = replace(SETTINGS, model="mnist_convnet")
    data = canonical_cell.load_data(SETTINGS)
    counts = {method: _count(canonical_cell.build_model(settings, cell(method), data)) for method in METHODS}
    assert counts["plain"] == 1_199_882
    assert counts["weight norm"] == 1_199_882 + 32 + 64 + 128 + 10
    assert counts["canonical"] == counts["canonical l1"] == 1_226_038 - 11 - 4
    quarter = canonical_cell.build_model(settings, cell("canonical", "scratch", 0.25), data)
    assert _count(quarter) == 306_537 - 2 - 4


def test_methods_differ_in_their_weights_alone(tmp_path):
    """The same optimizer, rates, batches and epochs."""
    trainers = {method: begin(tmp_path, cell(method))[0] for method in METHODS}
    first = trainers["plain"]
    for trainer in trainers.values():
        assert type(trainer.optimizer) is torch.optim.AdamW
        assert {(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups} == {(1e-3, 0)}
        assert torch.equal(trainer.order, first.order)
        assert (trainer.epochs, trainer.batch_size) == (first.epochs, first.batch_size)


def test_dropout_is_alike(tmp_path):
    states = []
    for method in ("plain", "canonical"):
        begin(tmp_path, cell(method))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_truncation_begins_where_the_training_ended(trained):
    """With the weights of the terms that were kept, and what the optimizer knew of them."""
    folder, result = trained
    whole, before = begin(folder, cell("canonical", "truncation"))
    assert before["accuracy_before"] == result["accuracy"]
    assert before["loss_before"] == pytest.approx(result["unseen_loss"], rel=1e-4)

    half, before = begin(folder, cell("canonical", "truncation", 0.5))
    assert list(before["ranks"].values()) == [2, 20, 4]
    for parameter in half.model.parameters():
        state = half.optimizer.state[parameter]
        assert state["exp_avg"].shape == parameter.shape
        assert state["exp_avg_sq"].any()
        assert state["step"] == 2
    assert half.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] == 2e-3


def test_fine_tuning_changes_every_parameter(trained):
    folder, _ = trained
    trainer, _ = begin(folder, cell("canonical", "truncation", 0.25))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.fit()
    assert not any(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    assert {id(p) for p in trainer.model.parameters()} == {
        id(p) for group in trainer.optimizer.param_groups for p in group["params"]
    }


@pytest.mark.parametrize("kept", [0.5, 0.25])
def test_one_error_over_all_layers_has_no_more_parameters(trained, kept):
    folder, _ = trained
    trainer, _ = begin(folder, cell("canonical", "truncation"))
    even, budget = (cut_terms(trainer.model, kept, allocation) for allocation in ("ratio", "error"))
    counts = [_count(cut.model) for cut in (even, budget)]
    assert 0.9 * counts[0] <= counts[1] <= counts[0]
    losses = [sum(layer.error**2 for layer in cut.layers) for cut in (even, budget)]
    assert losses[1] < losses[0]


def test_from_scratch_has_as_many_terms(trained):
    folder, _ = trained
    truncated, found = begin(folder, cell("canonical", "truncation", 0.25))
    scratch, _ = begin(folder, cell("canonical", "scratch", 0.25))
    ranks = [weight.rank for _, weight, _ in canonical_weights(scratch.model)]
    assert ranks == list(found["ranks"].values())
    assert _count(scratch.model) == _count(truncated.model)
    assert scratch.epochs == SETTINGS.epochs + SETTINGS.fine_tuning_epochs
    assert not scratch.optimizer.state


def test_pressure_is_on_the_weights_of_terms_while_they_train(tmp_path):
    """A step takes pressure times sigma times the learning rate off every |lambda|; none of it in fine-tuning."""
    settings = replace(SETTINGS, pressure=100.0)
    trainer, _ = begin(tmp_path, cell("canonical l1"), settings)
    before = [
        (weight.sigma, originals[0].detach().clone()) for _, weight, originals in canonical_weights(trainer.model)
    ]
    canonical_cell._pressure(settings, cell("canonical l1"))(trainer)
    after = [originals[0].detach().clone() for _, _, originals in canonical_weights(trainer.model)]
    for (sigma, old), new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * (1 - 0.1 * sigma))
    for one in (cell("canonical"), cell("canonical l1", "truncation")):
        assert canonical_cell._pressure(settings, one) is None
    assert all(torch.equal(x, y[0]) for x, (_, _, y) in zip(after, canonical_weights(trainer.model), strict=True))


@pytest.mark.parametrize("one", [cell("weight norm"), cell("canonical l1"), cell("canonical", "truncation", 0.5)])
def test_a_stopped_cell_goes_on_to_the_bit(trained, tmp_path, one):
    settings = replace(SETTINGS, epochs=2, fine_tuning_epochs=2)
    for name in ("whole", "stopped"):
        if one.stage == "truncation":
            source, copy = (folder / "cells" / one.parent.name for folder in (trained[0], tmp_path / name))
            copy.mkdir(parents=True)
            for file in source.iterdir():
                (copy / file.name).write_bytes(file.read_bytes())
    whole = train_cell(settings, tmp_path / "whole", one, never)
    assert train_cell(settings, tmp_path / "stopped", one, After(3)) is None
    steps = After(-1)
    resumed = train_cell(settings, tmp_path / "stopped", one, steps)
    assert -1 - steps.left == 1  # it does not begin again
    timed = ("steps_per_second", "seconds")
    assert {k: v for k, v in whole.items() if k not in timed} == {k: v for k, v in resumed.items() if k not in timed}


def test_checkpoints_stay_where_terms_can_be_cut(tmp_path):
    cells = {cell("plain"): False, cell("plain", "tuning"): False, cell("canonical", "tuning"): True}
    cells |= {cell("canonical", "fine-tuning", 0.5): False, cell("canonical"): True}
    for one, stays in cells.items():
        train_cell(SETTINGS, tmp_path, one, never)
        assert (tmp_path / "cells" / one.name / "checkpoint.pt").exists() == stays


def test_a_diverging_cell_is_a_result_and_is_not_cut(tmp_path):
    result = train_cell(SETTINGS, tmp_path, cell("plain", lr=1e30), never)
    assert result["accuracy"] is None
    json.dumps(result, allow_nan=False)
    diverged = cell("canonical")
    Run.create(tmp_path / "cells" / diverged.name, {})
    with pytest.raises(ValueError, match="has no checkpoint of the trained network"):
        begin(tmp_path, cell("canonical", "truncation"))


# -------------------------------------------------------------------------------------------------------- the grid


def test_tuning_never_sees_test_images(tmp_path, monkeypatch):
    data = load("digits", subset=40)
    spoiled = replace(
        data, test_images=torch.zeros_like(data.test_images), test_labels=torch.zeros_like(data.test_labels)
    )
    found = []
    for index, used in enumerate((data, spoiled)):
        monkeypatch.setattr(canonical_cell, "load_data", lambda settings, used=used: used)
        for stage in ("tuning", "fine-tuning", "training"):
            result = train_cell(SETTINGS, tmp_path / str(index), cell("canonical", stage), never)
            found.append(result["unseen_loss"])
    assert found[:2] == found[3:5]
    assert found[2] != found[5]


def test_the_best_rate_has_the_lowest_validation_loss():
    losses = {"plain": (0.3, 0.1, None), "canonical": (0.2, 0.3, 0.1)}
    tuned = {
        cell(method, "tuning", lr=lr): {"unseen_loss": loss}
        for method, three in losses.items()
        for lr, loss in zip(canonical.RATES, three, strict=True)
    }
    rates = canonical.best_rates(tuned, ["plain", "canonical", "canonical l1"])
    assert rates == {"plain": 1e-3, "canonical": 3e-3, "canonical l1": 3e-3}
    with pytest.raises(ValueError, match="plain diverged at every learning rate of 0"):
        canonical.best_rates({one: {"unseen_loss": None} for one in tuned}, ["plain"])


def test_the_rate_of_fine_tuning_is_chosen_in_the_same_way():
    cells = canonical.fine_tuning_cells({"plain": 0.1, "canonical": 0.2, "canonical l1": 0.2})
    assert {(one.method, one.lr) for one in cells} == {("canonical", 0.2)}
    assert {one.parent for one in cells} == {cell("canonical", "tuning", lr=0.2, seed=canonical.TUNING_SEED)}
    tuned = {one: {"unseen_loss": loss} for one, loss in zip(cells, (0.3, 0.1, None), strict=True)}
    rates = canonical.best_fine_tuning_rates(tuned, ["plain", "canonical", "canonical l1"])
    assert rates == dict.fromkeys(("canonical", "canonical l1"), 0.2)
    assert [one.fine_tuning_lr for one in cells] == [0.0667, 0.2, 0.667]


def test_a_pressed_network_has_no_rate_of_its_own():
    assert {one.method for one in canonical.tuning_cells(["canonical l1"])} == {"canonical"}
    assert len(canonical.tuning_cells(list(METHODS))) == 3 * len(canonical.RATES)


def test_which_networks_are_cut():
    trained = [cell(method, seed=seed) for method in METHODS for seed in range(2)]
    cells = canonical.smaller_cells(trained, [0.5, 0.25], {"canonical": 0.1, "canonical l1": 0.2}, scratch=True)
    assert {one.method for one in cells} == {"canonical", "canonical l1"}
    for method, cuts in (("canonical", ("ratio", "error")), ("canonical l1", ("error",))):
        parts = [(one.kept, one.allocation) for one in cells if one.stage == "truncation" and one.method == method]
        assert sorted(parts) == sorted(2 * [(1.0, cuts[0]), *((kept, cut) for kept in (0.5, 0.25) for cut in cuts)])
        rates = {one.fine_tuning_lr for one in cells if one.stage == "truncation" and one.method == method}
        assert rates == {{"canonical": 0.1, "canonical l1": 0.2}[method]}
    assert sorted(one.kept for one in cells if one.stage == "scratch") == [0.25, 0.25, 0.5, 0.5]
    assert len({one.name for one in cells}) == len(cells)
    assert not any(one.stage == "scratch" for one in canonical.smaller_cells(trained, [0.5], {}, scratch=False))


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def invoke(monkeypatch):
    """The command with one learning rate on small data; (exit status, output, exception)."""
    monkeypatch.setattr(canonical, "RATES", (1e-3,))
    monkeypatch.setattr(canonical, "FINE_TUNING_FACTORS", (1.0, 2.0))
    app = typer.Typer()
    app.command()(canonical.canonical_command)
    small = {"data": "digits", "model": "tiny", "subset": 40, "kept": 0.5, "batch-size": 20}
    small |= {"epochs": 1, "tuning-epochs": 1, "fine-tuning-epochs": 1}
    options = [str(part) for name, value in small.items() for part in (f"--{name}", value)]

    def run(*arguments):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*options, *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split()), result.exception

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_grid_is_computed_once_and_can_be_extended(invoke, tmp_path):
    out = tmp_path / "grid"
    methods = ("--methods", "plain,canonical", "--out", out)
    status, output, error = invoke(*methods, "--seeds", 1, "--minutes", 0)
    assert status == 0, error
    assert "Stopped before the end: the same command goes on." in output

    status, output, error = invoke(*methods, "--seeds", 1)
    assert status == 0, error
    stages = [(record["method"], record["stage"]) for record in lines(out)]
    assert len(stages) == 2 + 2 + 2 + 3
    assert stages.count(("canonical", "fine-tuning")) == 2
    assert stages.count(("canonical", "truncation")) == 3
    assert "Stopped" not in output
    assert "canonical, by error" in output
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in html
    assert "fine_tuning_epochs" in html

    before = (out / "metrics.jsonl").read_bytes()
    assert invoke(*methods, "--seeds", 1)[0] == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    status, output, error = invoke(*methods, "--seeds", 2, "--no-scratch", "--processes", 1)
    assert status == 0, error
    assert "canonical less plain" in output
    assert (out / "metrics.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dense"], "--methods must be of plain, weight norm, canonical, canonical l1, got dense"),
        (["--model", "lenet5_bn"], "--model must be one of mnist_convnet, cifar_alexnet, tiny, got 'lenet5_bn'"),
        (["--kept", "0.5,1"], "--kept must be fractions between 0 and 1, such as 0.5,0.25, got '0.5,1'"),
        (["--kept", "half"], "--kept must be fractions"),
        (["--subset", "5"], "subset must be from 10"),
    ],
)
def test_errors_come_before_anything_is_written(invoke, tmp_path, arguments, message):
    status, _, error = invoke(*arguments, "--out", tmp_path / "grid")
    assert status != 0
    with pytest.raises(ValueError, match=message):
        raise error
    assert not (tmp_path / "grid").exists()


# ---------------------------------------------------------------------------------------------------------- report


def record(one, accuracy, parameters=1000, before=None):
    found = {
        "lr": one.lr,
        "seed": one.seed,
        "unseen_loss": accuracy and 1 - accuracy,
        "accuracy": accuracy,
        "parameters": parameters,
        "steps_per_second": 2.0,
    }
    return found if before is None else {**found, "accuracy_before": before}


def test_tables_and_plot_of_unfinished_and_diverged_runs(tmp_path):
    results = {}
    for seed in range(2):
        for method, accuracy in (("plain", 0.99), ("canonical", 0.992 + 0.001 * seed), ("weight norm", None)):
            one = cell(method, seed=seed)
            results[one] = record(one, accuracy)
        half = cell("canonical", "truncation", 0.5, seed=seed)
        results[half] = record(half, 0.98, 500, before=0.5)
        scratch = cell("canonical", "scratch", 0.5, seed=seed)
        results[scratch] = record(scratch, 0.96 + 0.01 * seed, 500)
    one = cell("plain", "tuning", lr=0.003)
    results[one] = record(one, None)
    one = cell("canonical", "fine-tuning", 0.5)
    results[one] = record(one, 0.9, 500)
    trained, differences, smaller, tuning, fine_tuning = canonical_report.tables(results)
    assert trained.rows[0] == ["plain", "0.001", "2 of 2", "1,000", "99.00 ± 0.00", "2.00"]
    assert trained.rows[1][2:5] == ["0 of 2", "1,000", "–"]
    assert [row[:2] for row in differences.rows] == [
        ["canonical less plain", "+0.25"],
        ["canonical less weight norm", "–"],
        ["canonical, by ratio, at 50 % less from scratch", "+1.50"],
    ]
    row = dict(zip(smaller.header, smaller.rows[0], strict=True))
    assert (row["weights"], row["terms %"], row["parameters"]) == ("canonical, by ratio", "50", "500")
    assert (row["before"], row["accuracy %"], row["less plain"]) == ("50.00 ± 0.00", "98.00 ± 0.00", "-1.00")
    assert tuning.rows == [["plain", "–"]]
    assert [*fine_tuning.header, len(fine_tuning.rows)] == ["weights", "lr 0.002", 1]
    path = canonical_report.write_canonical_report(tmp_path / "report.html", results, SETTINGS)
    assert "canonical, cut by ratio" in path.read_text(encoding="utf-8")
    assert all(not table.rows for table in canonical_report.tables({}))
    canonical_report.write_canonical_report(tmp_path / "empty.html", {}, SETTINGS)
