"""`retract bench lowrank`: methods differ in their start alone, tuning sees no test images, a stopped grid goes on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import typer
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from retract.benchmarks import lowrank, lowrank_cell, lowrank_compression, lowrank_errors, lowrank_report
from retract.benchmarks.lowrank_cell import (
    FULL_RANK,
    METHODS,
    Cell,
    Settings,
    calibration_batches,
    load_data,
    measured_statistics_,
    perceptron,
    starts,
    train_cell,
)
from retract.benchmarks.lowrank_compression import Compression
from retract.nets import factorize
from retract.nets.cnn import MODELS
from retract.nets.layers.low_rank import LowRankLayer

SETTINGS = Settings(
    data="digits",
    data_dir=None,
    subset=80,
    image_size=None,
    epochs=2,
    batch_size=20,
    model="tiny",
    model_epochs=2,
    model_batch_size=20,
    device="cpu",
    amp=False,
)


def tiny(num_classes=10, in_channels=1):
    """A network with BatchNorm between convolutions, for 8x8 images."""
    inner = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    first = [nn.Conv2d(in_channels, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*first, *inner, nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, num_classes))


@pytest.fixture(scope="module", autouse=True)
def small_networks_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", tiny)
        patch.setattr(lowrank_cell, "WIDTHS", (24, 16))
        patch.setattr(lowrank_cell, "LOOKS", (2, 5, 100))
        patch.setattr(lowrank_cell, "WINDOW", 2)
        yield
    torch.set_num_threads(threads)


def never():
    return False


def cell(method="spectral", network="plain", *, lr=0.01, seed=0, tuning=False):
    return Cell(network, 1.0 if method == FULL_RANK else 1 / 4, method, lr, seed, tuning)


@pytest.fixture
def data():
    return load_data(SETTINGS)


def reference_and_batches(data, normalized=False):
    torch.manual_seed(0)
    reference, batches = perceptron(data, normalized), calibration_batches(data, 0)
    measured_statistics_(reference, batches)
    return reference, batches


# ---------------------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalized", [False, True])
def test_hidden_layers_have_a_low_rank_and_the_classifier_is_the_same(data, method, normalized):
    reference, batches = reference_and_batches(data, normalized)
    before = copy.deepcopy(reference.state_dict())
    model = starts(reference, method, 1 / 4, batches)
    assert [layer.rank for layer in model.modules() if isinstance(layer, LowRankLayer)] == [6, 4]
    assert torch.equal(model[-1].weight, reference[-1].weight)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


def test_full_rank_is_the_reference(data):
    reference, batches = reference_and_batches(data)
    model = starts(reference, FULL_RANK, 1.0, batches)
    assert torch.equal(model(batches[0]), reference(batches[0]))
    assert model[1].weight is not reference[1].weight


def test_scalars_and_their_baseline(data):
    """Layer by layer: one has the best scalar for the function, the other keeps the norm."""
    reference, batches = reference_and_batches(data)
    names = ("spectral", "scaled", "norm", "random")
    made = {name: starts(reference, name, 1 / 4, batches)[1].weight.detach() for name in names}
    for name in ("scaled", "norm"):
        factor = made[name].norm() / made["spectral"].norm()
        torch.testing.assert_close(made[name], factor * made["spectral"])
        assert factor > 1
    full = reference[1].weight.detach()
    torch.testing.assert_close(made["norm"].norm(), full.norm())
    assert float(made["random"].norm() / full.norm()) == pytest.approx(1, abs=0.3)
    assert abs(float(F.cosine_similarity(made["random"].flatten(), full.flatten(), 0))) < 0.2


def test_calibration_comes_closest_to_the_outputs(data):
    reference, batches = reference_and_batches(data)
    with torch.no_grad():
        outputs = {name: starts(reference, name, 1 / 4, batches)(batches[0]) for name in METHODS}
        errors = {name: float((output - reference(batches[0])).norm()) for name, output in outputs.items()}
    assert min(errors, key=errors.__getitem__) == "calibrated"


def test_the_network_at_full_rank_has_the_statistics_of_the_data():
    trainer, energy = lowrank_cell._begin(SETTINGS, cell(FULL_RANK, "BatchNorm"))
    norm = next(layer for layer in trainer.model if isinstance(layer, nn.BatchNorm1d))
    assert norm.num_batches_tracked > 0
    assert norm.running_mean.any()
    assert energy == 1


def test_weights_keep_variances(data, monkeypatch):
    monkeypatch.setattr(lowrank_cell, "WIDTHS", (256, 256))
    model = perceptron(data, False)
    assert model[3].weight.square().mean().item() == pytest.approx(2 / 256, rel=0.05)
    assert not any(layer.bias.any() for layer in model if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_means_over_the_batches(training):
    norm = nn.BatchNorm1d(3, momentum=0.3).train(training)
    batches = list(torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3]) + 1)
    norm(batches[0])
    measured_statistics_(norm, batches)
    torch.testing.assert_close(norm.running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))
    assert (norm.momentum, norm.training) == (0.3, training)


# ------------------------------------------------------------------------------------------------------- one cell


def test_methods_differ_in_their_start_alone():
    begun = {method: lowrank_cell._begin(SETTINGS, cell(method)) for method in (FULL_RANK, *METHODS)}
    first = begun["spectral"][0]
    for trainer, _ in begun.values():
        assert torch.equal(trainer.order, first.order)
        assert torch.equal(trainer.model[-1].weight, first.model[-1].weight)
        (group,) = trainer.optimizer.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 0)
        assert len(group["params"]) == len(list(trainer.model.parameters()))
    energies = {method: energy for method, (_, energy) in begun.items()}
    assert energies[FULL_RANK] == 1
    assert energies["spectral"] < energies["scaled"] < energies["norm"]
    assert not torch.equal(lowrank_cell._begin(SETTINGS, cell(seed=1))[0].order, first.order)


def test_losses_are_means_of_the_batches_before_a_step():
    """Of a run of eight steps, by the loop written out."""
    found = train_cell(SETTINGS, cell("relu"), never)
    trainer, _ = lowrank_cell._begin(SETTINGS, cell("relu"))
    losses = []
    trainer.fit(on_step=lambda trainer: losses.append(trainer.losses[trainer.step - 1].item()))
    assert len(losses) == 8
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01, "the rate is constant"
    assert found["early"] == [pytest.approx(sum(losses[:2]) / 2), pytest.approx(sum(losses[3:5]) / 2), None]
    assert found["train_loss"] == pytest.approx(sum(losses[4:]) / 4)
    assert (found["unseen_loss"], found["accuracy"]) == pytest.approx(trainer.evaluate())


def test_a_run_that_diverges_has_no_results():
    found = train_cell(SETTINGS, cell(lr=1e30), never)
    assert found["early"] == [None] * 3
    assert [found[name] for name in ("train_loss", "unseen_loss", "accuracy")] == [None] * 3
    assert math.isfinite(found["energy"])


def test_a_run_that_is_stopped_has_none_either():
    assert train_cell(SETTINGS, cell(), lambda: True) is None


def test_tuning_never_sees_test_images():
    for begin in (
        lambda tuning: lowrank_cell._begin(SETTINGS, cell("calibrated", tuning=tuning))[0],
        lambda tuning: compression_trainer("tuning" if tuning else "dense"),
    ):
        final, tuning = begin(False).data, begin(True).data
        assert len(tuning.test_labels) == round(0.1 * len(final.train_labels))
        assert len(tuning.train_labels) + len(tuning.test_labels) == len(final.train_labels)
        everything = torch.cat([tuning.train_images, tuning.test_images]).flatten(1)
        assert torch.equal(*(images.sort(0).values for images in (everything, final.train_images.flatten(1))))


# ----------------------------------------------------------------------------------------------------- compression


def compression_trainer(stage):
    """What a cell of a stage is trained by."""
    made = []

    def record(*arguments):
        made.append(arguments[-1])
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank_compression, "open_cell", record)
        with pytest.raises(InterruptedError):
            lowrank_compression.train_cell(SETTINGS, None, Compression(stage, 0), never)
    return made[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a dense network that was trained, and its results."""
    folder = tmp_path_factory.mktemp("grid")
    return folder, lowrank_compression.train_cell(SETTINGS, folder, Compression("dense", 0), never)


def test_compressed_networks_are_made_of_the_trained_one(trained, data):
    folder, dense = trained
    results = {
        name: lowrank_compression.train_cell(SETTINGS, folder, Compression("compressed", 0, 0.01, 0.6, name), never)
        for name in lowrank_compression.INITIALIZATIONS
    }
    assert len({found["parameters"] for found in results.values()}) == 1
    assert results["spectral"]["parameters"] < dense["parameters"]

    trainer, _ = lowrank_compression._begin(SETTINGS, folder, Compression("dense", 0), data)
    state = torch.load(folder / "cells" / Compression("dense", 0).name / "checkpoint.pt", weights_only=True)["state"]
    trainer.model.load_state_dict(state["model"])
    assert trainer.evaluate()[1] == dense["accuracy"]
    factorize(trainer.model, "lowrank", budget=0.6, init="spectral", skip=("0", "8"))
    assert trainer.evaluate()[1] == results["spectral"]["accuracy_as_made"]
    measured_statistics_(trainer.model, calibration_batches(data, 0))
    assert trainer.evaluate()[1] == results["spectral"]["accuracy_before"]


def test_first_and_last_layers_stay_dense(data):
    reference = tiny()
    model = lowrank_compression.compress(
        copy.deepcopy(reference).eval(), "calibrated", 0.6, calibration_batches(data, 0)
    )
    assert [isinstance(model[index], LowRankLayer) for index in (0, 2, 5, 8)] == [False, True, True, False]
    assert torch.equal(model[0].weight, reference[0].weight)


def test_a_compressed_network_needs_the_dense_one(tmp_path):
    with pytest.raises(ValueError, match=r"dense-0\.1-7"):
        lowrank_compression.train_cell(SETTINGS, tmp_path, Compression("compressed", 7, 0.01, 0.5, "relu"), never)


def test_rates_of_fine_tuning_are_chosen_on_a_network_that_was_held_out_too():
    assert Compression("fine-tuning", 5, 0.03, 0.2, "relu").parent == Compression("tuning", 5)
    assert Compression("compressed", 5, 0.03, 0.2, "relu").parent == Compression("dense", 5)


def test_compressed_networks_are_tested_on_a_random_part_of_the_test_images(data, monkeypatch):
    monkeypatch.setattr(lowrank_compression, "TEST_IMAGES", 100)
    order = data.test_labels.argsort()  # some data sets are sorted by class
    data = replace(data, test_images=data.test_images[order], test_labels=data.test_labels[order])
    fewer = lowrank_compression._fewer_tests(data)
    assert len(fewer.test_labels) == len(fewer.test_images) == 100
    assert set(fewer.test_labels.tolist()) == set(range(10))
    monkeypatch.setattr(lowrank_compression, "TEST_IMAGES", 10**6)
    assert len(lowrank_compression._fewer_tests(data).test_labels) == len(data.test_labels)


# -------------------------------------------------------------------------------------------------------- the grid


def test_the_rate_of_the_lowest_mean_loss():
    tuned = {
        cell(method, lr=lr, seed=seed, tuning=True): {"unseen_loss": loss}
        for method, lr, losses in (
            ("relu", 0.1, (0.1, None)),
            ("relu", 0.01, (0.5, 0.4)),
            ("relu", 0.003, (0.3, 0.7)),
            ("norm", 0.1, (None, None)),
            ("norm", 0.01, (None, 1.0)),
        )
        for seed, loss in enumerate(losses)
    }
    assert lowrank.best_rates(tuned) == {("plain", 0.25, "relu"): 0.01, ("plain", 0.25, "norm"): 0.01}


def test_all_methods_have_the_same_rates_and_seeds():
    tuning = lowrank.tuning_cells()
    per_method = {}
    for one in tuning:
        per_method.setdefault((one.network, one.fraction, one.method), []).append((one.lr, one.seed))
    assert len(per_method) == 2 * (3 * len(METHODS) + 1)
    assert len({tuple(sorted(found)) for found in per_method.values()}) == 1
    final = lowrank.final_cells(dict.fromkeys(per_method, 0.1), 5)
    assert len(set(final)) == 5 * len(per_method)
    assert not {one.seed for one in final} & {one.seed for one in tuning}
    tuning = lowrank.fine_tuning_cells()
    made = {(one.budget, one.initialization) for one in tuning}
    assert len(made) == 4 * 4 and len(set(tuning)) == len(made) * len(lowrank.RATES)
    assert len(set(lowrank.compressed_cells(dict.fromkeys(made, 0.1), range(3)))) == len(made) * 3


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def invoke(monkeypatch):
    """The command with few cells and small data; (exit status, output, exception)."""
    monkeypatch.setattr(lowrank, "METHODS", ("spectral", "calibrated"))
    monkeypatch.setattr(lowrank, "INITIALIZATIONS", ("spectral", "calibrated"))
    for name, value in {
        "FRACTIONS": (1 / 4,),
        "RATES": (0.01, 1e30),
        "TUNING_SEEDS": (1000,),
        "BUDGETS": (0.6,),
    }.items():
        monkeypatch.setattr(lowrank, name, value)
    for name, value in {"SIZES": (16,), "FRACTIONS": (1 / 4,), "DRAWS": {16: 2}, "SAMPLES": 50}.items():
        monkeypatch.setattr(lowrank_errors, name, value)
    few = {name: lowrank_errors.INITIALIZATIONS[name] for name in ("spectral", "relu_varpro", "whitened")}
    for module in (lowrank_errors, lowrank_report):
        monkeypatch.setattr(module, "INITIALIZATIONS", few)
    monkeypatch.setattr(lowrank_errors, "COST_SECONDS", 0.0)
    monkeypatch.setattr(lowrank_errors, "COST_ROUNDS", 2)
    app = typer.Typer()
    app.command()(lowrank.lowrank_command)
    small = {"subset": 80, "epochs": 1, "batch-size": 20, "model": "tiny", "model-epochs": 1, "seeds": 2}
    options = [str(part) for name, value in small.items() for part in (f"--{name}", value)]

    def run(*arguments):
        arguments = [*options, "--processes", "1", *map(str, arguments)]
        result = CliRunner(env={"COLUMNS": "250"}).invoke(app, arguments)
        return result.exit_code, " ".join(result.output.split()), result.exception

    return run


def test_command_computes_all_parts_and_says_them(invoke, tmp_path):
    status, output, _ = invoke("--out", tmp_path)
    assert status == 0, output
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    count = {part: sum(record["part"] == part for record in records) for part in (*lowrank.PARTS, "costs")}
    assert count == {"errors": 5, "costs": 2, "training": 2 * 3 * (2 + 2), "compression": 1 + 2 + 2 * 2 + 2 * 2}
    html = (tmp_path / "report.html").read_text()
    for text in (
        "orthogonal weights",
        "relu_varpro",
        "BatchNorm perceptrons",
        "full rank",
        "after an epoch",
        "retract",
    ):
        assert text in html
    for text in ("plain-calibrated-0.25-0.01-final-1", "compressed-calibrated-0.6-0.01-0", "diverged"):
        assert text in output
    assert invoke("--out", tmp_path)[0] == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(records), "nothing is computed twice"


def test_parts_can_be_chosen_and_stopped(invoke, tmp_path):
    status, output, _ = invoke("--parts", "errors", "--out", tmp_path / "a")
    assert status == 0
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {record["part"] for record in records} == {"errors", "costs"}
    assert "accuracy" not in output
    status, output, _ = invoke("--minutes", 0, "--out", tmp_path / "b")
    assert status == 0
    assert "the same command goes on" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "errors,speed"], "--parts must be of errors, training, compression, got speed"),
        (["--model", "resnet21"], "--model must be of"),
        (["--data", "letters"], "data must be one of"),
    ],
)
def test_errors_come_before_there_is_a_folder(invoke, tmp_path, arguments, message):
    status, _, error = invoke(*arguments, "--out", tmp_path / "new")
    assert status != 0
    assert message in str(error)
    assert not (tmp_path / "new").exists()


def test_settings_of_a_folder_stay(invoke, tmp_path):
    assert invoke("--parts", "training", "--minutes", 0, "--out", tmp_path)[0] == 0
    status, _, error = invoke("--parts", "training", "--epochs", 3, "--out", tmp_path)
    assert status != 0
    assert "epochs = 1, not 3" in str(error)
