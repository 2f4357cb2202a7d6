"""`retract bench layers`: both forms start alike, tuning never sees test images, and a stopped grid goes on."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from scipy.stats import t as students_t
from typer.testing import CliRunner

from retract.benchmarks import layers, layers_cell, layers_report
from retract.benchmarks.data import load
from retract.benchmarks.factorization import Factorization
from retract.benchmarks.layers_cell import METHODS, Cell, Settings, hold_out, measure, train_cell
from retract.nets import cnn
from retract.nets.compress import factorize
from retract.nets.parametrizations import spectral_weights

SETTINGS = Settings(
    data="digits",
    data_dir=None,
    subset=120,
    image_size=None,
    epochs=2,
    tuning_epochs=1,
    batch_size=20,
    rank=None,
    spectrum="lipschitz",
    device="cpu",
    amp=False,
)
FACTORED = [name for name, method in METHODS.items() if method.kind is not None]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def invoke(monkeypatch):
    """The command with two learning rates on small data; (exit status, output, exception)."""
    for module in (layers, layers_report):
        monkeypatch.setattr(module, "RATES", (0.1, 0.3))
    app = typer.Typer()
    app.command()(layers.layers_command)
    small = {"data": "digits", "models": "digitsnet", "subset": 120, "epochs": 1, "tuning-epochs": 1, "batch-size": 20}
    options = [str(part) for name, value in small.items() for part in (f"--{name}", value)]

    def run(*arguments):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*options, *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split()), result.exception

    return run


def cell(method, lr=0.1, seed=0, tuning=False):
    return Cell("digitsnet", method, lr, seed, tuning)


def never():
    return False


class After:
    """Asks to stop at the given step."""

    def __init__(self, step):
        self.left = step

    def __call__(self):
        self.left -= 1
        return self.left == 0


# ------------------------------------------------------------------------------------------------------- one cell


@pytest.mark.parametrize("kind", ["SVDP", "STTP"])
def test_both_forms_start_from_the_same_weights(kind):
    models = [layers_cell._trainer(SETTINGS, cell(f"{kind} {form}")).model for form in ("Householder", "Stiefel")]
    for ours, theirs in zip(*(model.modules() for model in models), strict=False):
        if isinstance(ours, torch.nn.Conv2d | torch.nn.Linear):
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=2e-6)
    images = torch.randn(4, 1, 8, 8)
    logits = [model.eval()(images) for model in models]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_which_weights_have_the_rate_of_the_cell(method):
    """Those of the inner layers, in whichever form; the first and the last layer are dense in all methods."""
    trainer = layers_cell._trainer(SETTINGS, cell(method, lr=0.7))
    rates = {id(w): group["lr"] for group in trainer.optimizer.param_groups for w in group["params"]}
    named = dict(trainer.model.named_parameters())
    tuned = {name for name, weight in named.items() if rates[id(weight)] == 0.7}
    assert len(rates) == len(named)
    inner = ("block2.0.", "block3.0.")
    assert tuned == {name for name in named if name.startswith(inner)}
    assert {rates[id(named[name])] for name in named.keys() - tuned} == {layers_cell.EUCLIDEAN_RATE}
    assert {"block1.0.weight", "fc.weight"} <= named.keys()


@pytest.mark.parametrize("method", ["dense", "SVDP Householder", "STTP Stiefel"])
def test_a_stopped_cell_goes_on_to_the_bit(tmp_path, method):
    whole = train_cell(SETTINGS, tmp_path / "whole", cell(method), never)
    assert train_cell(SETTINGS, tmp_path / "stopped", cell(method), After(8)) is None
    assert list((tmp_path / "stopped").rglob("checkpoint.pt"))
    steps = After(-1)
    resumed = train_cell(SETTINGS, tmp_path / "stopped", cell(method), steps)
    assert -1 - steps.left == 2 * 120 // 20 - 8  # it does not begin again
    timed = ("steps_per_second", "seconds")
    assert {k: v for k, v in whole.items() if k not in timed} == {k: v for k, v in resumed.items() if k not in timed}
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_diverging_cell_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(layers_cell, "EUCLIDEAN_RATE", 1e30)
    for method in ("dense", "SVDP Stiefel"):
        result = train_cell(SETTINGS, tmp_path, cell(method), never)
        assert result["train_loss"] is None
        assert result["accuracy"] is None
        json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("method", FACTORED)
def test_singular_values_are_distinct_at_the_start(method):
    """Largest values of random weights would nearly all be cut to the cap, where their coordinates have no effect."""
    trainer = layers_cell._trainer(SETTINGS, cell(method))
    for _, parametrization, weights in spectral_weights(trainer.model):
        values = parametrization.singular_values(*weights).sort(descending=True).values
        torch.testing.assert_close(values, parametrization.spectrum.spread(parametrization.rank))


def test_free_values_are_those_of_the_present_weights():
    torch.manual_seed(0)
    model = cnn.digitsnet()
    before = model.block2[0].weight.detach().flatten(1).clone()
    Factorization("svdp", 8, "free").apply(model)
    torch.testing.assert_close(
        torch.linalg.svdvals(model.block2[0].weight.flatten(1))[:8], torch.linalg.svdvals(before)[:8]
    )


def test_the_default_rank_is_a_quarter_of_the_widest_layer():
    trainer = layers_cell._trainer(SETTINGS, cell("SVDP Stiefel"))
    widest = max(m.out_channels for m in trainer.model.modules() if isinstance(m, torch.nn.Conv2d))
    assert {p.rank for _, p, _ in spectral_weights(trainer.model)} == {widest // 4}
    trainer = layers_cell._trainer(replace(SETTINGS, rank=3), cell("SVDP Stiefel"))
    assert {p.rank for _, p, _ in spectral_weights(trainer.model)} == {3}


# ---------------------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize(
    ("spectrum", "excess"), [("identity", 0.5), ("lipschitz", 0.5), ("bounded", 0.35), ("free", None)]
)
def test_measure_sees_what_is_wrong(spectrum, excess):
    """A frame times 1.5: |1.5² - 1| off orthonormal, and its layer's largest value (0.9, where bounded) times 1.5."""
    torch.manual_seed(0)
    model = factorize(cnn.digitsnet(), "svdp", 8, spectrum, skip="fc", form="stiefel", init="spread")
    sound = measure(model)
    assert sound["orthonormality_error"] < 1e-5
    assert sound["cap_error"] is None if excess is None else sound["cap_error"] < 1e-5
    with torch.no_grad():
        _, _, (u, _, _) = list(spectral_weights(model))[1]
        u *= 1.5
    broken = measure(model)
    assert broken["orthonormality_error"] == pytest.approx(1.25, rel=1e-4)
    assert broken["cap_error"] == (None if excess is None else pytest.approx(excess, abs=1e-4))
    assert broken["compression"] == sound["compression"]


def test_measure_of_a_dense_network():
    assert measure(cnn.digitsnet()) == {"compression": 100.0, "orthonormality_error": None, "cap_error": None}


# ---------------------------------------------------------------------------------------------------- tuning split


def test_the_validation_split_is_held_out():
    data = load("digits", subset=120)
    split = hold_out(data, 30)
    images = [images.flatten(1) for images in (split.train_images, split.test_images)]
    assert [len(part) for part in images] == [90, 30]
    together = torch.cat(images)
    assert torch.equal(together.sort(dim=0).values, data.train_images.flatten(1).sort(dim=0).values)
    again = hold_out(data, 30)
    assert torch.equal(split.test_images, again.test_images)


def test_tuning_never_sees_test_images(tmp_path, monkeypatch):
    data = load("digits", subset=120)
    spoiled = replace(
        data, test_images=torch.zeros_like(data.test_images), test_labels=torch.zeros_like(data.test_labels)
    )
    found = []
    for index, used in enumerate((data, spoiled)):
        monkeypatch.setattr(layers_cell, "load_data", lambda settings, used=used: used)
        for tuning in (True, False):
            result = train_cell(SETTINGS, tmp_path / f"{index}{tuning}", cell("dense", tuning=tuning), never)
            found.append(result["unseen_loss"])
    assert found[0] == found[2]
    assert found[1] != found[3]


def test_the_best_rate_has_the_lowest_mean_validation_loss():
    losses = {0.03: (2.0, 2.0), 0.1: (1.3, 0.9), 0.3: (0.8, 1.2), 1.0: (0.1, None)}
    tuned = {
        cell("dense", lr, seed, True): {"unseen_loss": loss}
        for lr, pair in losses.items()
        for seed, loss in enumerate(pair)
    }
    assert layers.best_rates(tuned) == {"dense": 0.3}
    with pytest.raises(ValueError, match="dense diverged at every learning rate of 0"):
        layers.best_rates({one: {"unseen_loss": None} for one in tuned})
    table = layers_report.tables(tuned)[-1]
    assert table.header[2:] == ("lr 0.01", "lr 0.03", "lr 0.1", "lr 0.3")
    assert table.rows == [["digitsnet", "dense", "–", "2.000", "1.100", "1.000"]]


# --------------------------------------------------------------------------------------------------------- command


def test_the_grid_is_computed_once_and_can_be_extended(invoke, tmp_path):
    out = tmp_path / "grid"
    methods = "SVDP Householder,SVDP Stiefel"
    status, output, error = invoke("--methods", methods, "--seeds", 2, "--minutes", 0, "--out", out)
    assert status == 0, error
    assert "Stopped before the end: the same command goes on." in output
    assert not (out / "metrics.jsonl").exists() or len(lines(out)) < 12

    status, output, error = invoke("--methods", methods, "--seeds", 2, "--out", out)
    assert status == 0, error
    assert len(lines(out)) == 2 * 2 * len(layers.TUNING_SEEDS) + 2 * 2
    assert "Stiefel less Householder" in output
    assert "Stopped" not in output
    before = (out / "metrics.jsonl").read_bytes()
    assert before.endswith(b"\n")
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "SVDP Stiefel" in html
    assert "weight_decay" in html

    assert invoke("--methods", methods, "--seeds", 2, "--out", out)[0] == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    assert invoke("--methods", methods, "--seeds", 3, "--processes", 1, "--out", out)[0] == 0
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    assert sorted(record["seed"] for record in lines(out) if not record["tuning"]) == [0, 0, 1, 1, 2, 2]


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet21"], "--models must be of digitsnet, .*, got resnet21"),
        (["--methods", "dense,tucker"], "--methods must be of dense, .*, got tucker"),
        (["--spectrum", "flat"], "--spectrum must be of identity, free, lipschitz, bounded, got flat"),
        (["--data", "imagenet"], "data must be one of digits, mnist, cifar10, svhn"),
    ],
)
def test_errors_leave_no_folder(invoke, tmp_path, arguments, message):
    status, _, error = invoke(*arguments, "--out", tmp_path / "grid")
    assert status != 0
    with pytest.raises(ValueError, match=message):
        raise error
    assert not (tmp_path / "grid").exists()


def test_another_grid_is_not_mixed_in(invoke, tmp_path):
    for arguments, status in (([], 0), (["--rank", 4], 1)):
        found = invoke("--methods", "dense", "--seeds", 1, "--minutes", 0, "--out", tmp_path / "grid", *arguments)
        assert found[0] == status
    assert "was run with rank = None, not 4" in str(found[2])


# ---------------------------------------------------------------------------------------------------------- report


def results(householder, stiefel):
    """Records of finished cells with these losses, a seed each."""
    found = {}
    for method, losses in (("SVDP Householder", householder), ("SVDP Stiefel", stiefel)):
        for seed, loss in enumerate(losses):
            found[cell(method, seed=seed)] = {
                "lr": 0.1,
                "train_loss": loss,
                "unseen_loss": loss,
                "accuracy": None if loss is None else 0.5,
                "steps_per_second": 2.0,
                "compression": 31.7,
                "orthonormality_error": 1e-6,
                "cap_error": 2e-7 * (1 + seed),
            }
    return found


def test_difference_of_the_forms():
    """Welch's interval, by its formula."""
    a, b = [1.0, 1.1, 1.3], [1.05, 1.2, 1.25]
    variances = [statistics.variance(x) / 3 for x in (a, b)]
    error = math.sqrt(sum(variances))
    freedom = sum(variances) ** 2 / sum(v**2 / 2 for v in variances)
    half = students_t.ppf(0.975, freedom) * error
    mean = statistics.mean(b) - statistics.mean(a)
    assert layers_report._difference(a, b) == pytest.approx((mean - half, mean + half), rel=1e-9)
    row = layers_report.tables(results(a, b))[1].rows[0]
    assert row[:3] == ["digitsnet", "SVDP", f"{mean:+.4f}"]
    assert row[-1] == "yes"
    assert layers_report.tables(results(a, [x - 0.5 for x in b]))[1].rows[0][-1] == "no"


def test_a_table_of_unfinished_and_diverged_runs():
    losses, forms, costs, tuning = layers_report.tables(results([1.0, None, 1.2], [None]))
    assert losses.rows[0][1:] == ["SVDP Householder", "0.1", "2 of 3", "1.1000 ± 0.1414", "50.00 ± 0.00"]
    assert losses.rows[1][3:] == ["0 of 1", "–", "–"]
    assert costs.rows[0][2:] == ["2.00", "31.7", "1.0e-06", "6.0e-07"]
    assert forms.rows == tuning.rows == []
    assert layers_report.tables({})[0].rows == []


def test_steps_are_timed_without_a_folder(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr("retract.benchmarks.layers.STEPS_SECONDS", 0.1)
    out = tmp_path / "run"
    status, output, error = invoke("--steps", "--methods", "dense,STTP Stiefel", "--out", out)
    assert status == 0, error
    assert "digitsnet" in output and "STTP Stiefel" in output
    assert not out.exists()
