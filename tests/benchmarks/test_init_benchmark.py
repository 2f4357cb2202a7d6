"""`retract bench init`: its tables are those of the theory, tuning never sees test images, a stopped grid goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tensorly
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from retract.benchmarks import init, init_cell, init_depth, init_report
from retract.benchmarks.init_cell import Cell, Settings, load_data, plain_network, train_cell
from retract.benchmarks.init_depth import Measurement, measure, measurements, network
from retract.benchmarks.init_methods import INITIALIZATIONS, TENSORLY_TORCH, TRAINED, knows
from retract.nets.init.variance_report import WINDOW, variance_report
from retract.nets.layers.tensor import TensorConv2d
from retract.nets.layers.tensor_formats import tensor_network

OURS = TRAINED[0]
KAIMING, XAVIER, CONV = (name for name in INITIALIZATIONS if name.startswith("each core"))
RESET, INFORMED = (name for name in INITIALIZATIONS if name.startswith("tltorch"))
SETTINGS = Settings("digits", None, 60, None, 3, 6, 0.5, 2, 1, 20, "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def never():
    return False


# ------------------------------------------------------------------------------------------------- initializations


def layer_of(format, shape=(12, 8, 3, 3), **options):
    return TensorConv2d(tensor_network(format, shape, **options), padding=1, bias=False)


@pytest.mark.parametrize(
    ("format", "rank"), [("cp", 5), ("tucker", (4, 3, 2, 2)), ("tucker2", (4, 3)), ("tensor_train", (4, 5, 6))]
)
@pytest.mark.parametrize("name", [RESET, INFORMED])
def test_cores_of_tensorly_torch_make_its_own_weight(format, rank, name, monkeypatch):
    tltorch = pytest.importorskip("tltorch")
    made = []

    class Recorded(tltorch.FactorizedConv):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(tltorch, "FactorizedConv", Recorded)
    layer = layer_of(format, rank=rank)
    before = tensorly.get_backend()
    INITIALIZATIONS[name](layer, format, None)
    assert tensorly.get_backend() == before
    with tensorly.backend_context("pytorch"):
        theirs = made[0].weight.to_tensor().detach()
    theirs = theirs.movedim(-1, 0) if format == "tensor_train" else theirs
    torch.testing.assert_close(layer.weight.detach(), theirs, rtol=1e-4, atol=1e-6 * float(theirs.std()))


def test_which_initializations_there_are_of_a_format():
    assert knows(OURS, "block_term")
    assert knows(RESET, "cp")
    assert not knows(INFORMED, "tensor_ring")
    assert TRAINED == (OURS, KAIMING, XAVIER, RESET, INFORMED)


# ---------------------------------------------------------------------------------------------- without training


def test_networks_are_those_of_the_table():
    sizes = {name: network(name) for name in init_depth.NETWORKS}
    assert all(found.weight_shape == (64, 64, 3, 3) for found in sizes.values())
    assert sizes["cp"].bond_product == 48
    assert sizes["tucker"].bond_product == (16 * 3) ** 2
    assert sizes["tt_matrix"].bond_product == 12**3
    assert sizes["tensor_ring"].bond_product == 10**7
    assert sizes["block_term"].bond_product == 4 * 8 * 8
    assert sizes["hierarchical_tucker"].bond_product == (16 * 3 * 8) ** 2
    assert sizes["odd"].bond_product == 5**7
    shares = {name: found.parameters / (64 * 64 * 9) for name, found in sizes.items()}
    assert shares.pop("dense") == 1
    assert 0.28 < shares.pop("odd") < 0.29
    assert all(0.08 < share < 0.19 for share in shares.values())


# Mean of Var(W)/(2/fan_in): the formula B F/2 prod v_i with torch's v_i for the cores as they are.
PREDICTED = {
    ("cp", KAIMING): 0.0417,
    ("cp", XAVIER): 0.0068,
    ("cp", CONV): 3.2e-5,
    ("tucker2", KAIMING): 16,
    ("tucker2", XAVIER): 0.32,
    ("tucker2", CONV): 0.074,
    ("tensor_train", KAIMING): 8,
    ("tensor_train", XAVIER): 0.0196,
    ("tensor_train", CONV): 0.0062,
    ("tt_matrix", KAIMING): 0.013,
    ("tensor_ring", XAVIER): 1.3e-4,
    ("tensor_train", RESET): 0.02**2 / (2 / 576) / 24**3,
    ("tensor_train", INFORMED): 1 / 24**3,
    ("cp", INFORMED): 1,
    ("cp", RESET): 0.02**2 / (2 / 576),
    ("dense", KAIMING): 1,
}


@pytest.mark.parametrize(("name", "initialization"), PREDICTED)
def test_variances_of_weights_are_the_predicted_ones(name, initialization):
    found = measure(Measurement("weights", name, initialization), never)
    expected = PREDICTED[name, initialization]
    error = found["variation"] / math.sqrt(init_depth.DRAWS["weights"])
    assert abs(found["mean"] / expected - 1) < max(4 * error, 0.05)


@pytest.mark.parametrize("name", init_depth.NETWORKS)
def test_ours_has_the_variance_that_is_due_with_little_spread(name):
    found = measure(Measurement("weights", name, OURS), never)
    assert found["mean"] == pytest.approx(1, abs=0.03)
    assert found["variation"] < 0.12


def test_depth_is_measured_between_layers(monkeypatch):
    """Two draws of a dense network and of one that explodes."""
    monkeypatch.setitem(init_depth.DRAWS, "depth", 2)
    found = measure(Measurement("depth", "dense", OURS), never)
    for direction in ("forward", "backward"):
        assert WINDOW[0] < found[direction]["geometric"] <= found[direction]["arithmetic"] < WINDOW[1]
    found = measure(Measurement("depth", "tucker2", KAIMING), never)
    for direction in ("forward", "backward"):
        assert found[direction]["arithmetic"] == pytest.approx(16, rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", init_depth.NETWORKS)
def test_ours_keeps_deep_networks_in_the_window(name):
    found = measure(Measurement("depth", name, OURS), never)
    for direction in ("forward", "backward"):
        assert WINDOW[0] < found[direction]["arithmetic"] < WINDOW[1]


def test_a_measurement_stops_when_asked_to():
    assert measure(Measurement("weights", "cp", OURS), lambda: True) is None


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("size", "maps"), [(8, [8, 8, 8, 8, 4, 4, 4, 4, 4, 4]), (28, [14] * 4 + [7] * 6)])
def test_the_network_has_nothing_but_convolutions(size, maps):
    settings = Settings("digits", None, 60, size, 9, 6, 0.5, 1, 1, 20, "cpu")
    data = load_data(settings)
    model = plain_network(settings, data, "cp", OURS)
    kinds = {type(module) for module in model}
    assert kinds == {nn.Conv2d, nn.ReLU, TensorConv2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    layers = [module for module in model if isinstance(module, nn.Conv2d | TensorConv2d)]
    assert len(layers) == 10
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda module, arguments, output: seen.append(output.shape[-1]))
    assert model(torch.randn(2, 1, size, size)).shape == (2, 10)
    assert seen == maps


def test_dense_layers_are_the_same_from_every_initialization():
    models = []
    for name in TRAINED:
        torch.manual_seed(0)
        models.append(plain_network(SETTINGS, load_data(SETTINGS), "cp", name))
    for model in models[1:]:
        assert torch.equal(model[0].weight, models[0][0].weight)
        assert not model[0].bias.any()


def test_ours_makes_up_for_the_zeros_around_small_maps():
    torch.manual_seed(0)
    settings = Settings("digits", None, 60, None, 12, 32, 0.5, 1, 1, 20, "cpu")
    reports = []
    for name in (OURS, INFORMED):
        model = plain_network(settings, load_data(settings), "cp", name)
        reports.append(variance_report(model, torch.randn(16, 1, 8, 8)))
    ours, theirs = ([layer.forward for layer in report.layers[2:-1]] for report in reports)
    assert sum(ours) / len(ours) == pytest.approx(1, abs=0.2)
    assert sum(theirs) / len(theirs) < 0.9


def test_tuning_sees_no_test_image():
    data = load_data(SETTINGS)
    tuning = init_cell._trainer(SETTINGS, Cell("cp", OURS, 0.1, 0, True))
    final = init_cell._trainer(SETTINGS, Cell("cp", OURS, 0.1, 0, False))
    assert (tuning.epochs, final.epochs) == (1, 2)
    assert len(tuning.data.train_labels) == 48
    assert len(tuning.data.test_labels) == 12
    known = {image.numpy().tobytes() for image in data.train_images}
    assert all(image.numpy().tobytes() in known for image in tuning.data.test_images)
    assert torch.equal(final.data.test_images, data.test_images)
    assert final.optimizer.param_groups[0]["initial_lr"] == 0.1


def test_a_stopped_cell_goes_on_to_the_bit(tmp_path):
    cell = Cell("tucker2", OURS, 3e-3, 0, False)
    whole = train_cell(SETTINGS, tmp_path / "whole", cell, never)
    left = iter([False, False, False, False, True])
    assert train_cell(SETTINGS, tmp_path / "stopped", cell, lambda: next(left)) is None
    resumed = train_cell(SETTINGS, tmp_path / "stopped", cell, never)
    for result in (whole, resumed):
        del result["seconds"]
    assert whole == resumed
    assert len(whole["curve"]) == 2
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_diverging_cell_is_a_result(tmp_path):
    result = train_cell(SETTINGS, tmp_path, Cell("cp", OURS, 1e30, 0, False), never)
    assert result["train_loss"] is result["accuracy"] is result["unseen_loss"] is None
    json.dumps(result, allow_nan=False)


def test_best_rates():
    """A rate at which one seed fails loses to one that is fair with every seed."""
    losses = {(OURS, 0.1): (2.0, 2.0), (OURS, 0.2): (1.0, 1.2), (OURS, 0.3): (0.1, None), (OURS, 0.4): (0.1, 2.3)}
    losses |= {(KAIMING, 0.2): (None, None), (KAIMING, 0.1): (None, None)}
    tuned = {
        Cell("cp", name, lr, seed, True): {"unseen_loss": loss}
        for (name, lr), pair in losses.items()
        for seed, loss in enumerate(pair)
    }
    assert init.best_rates(tuned) == {("cp", OURS): 0.2, ("cp", KAIMING): 0.1}


def test_formats_that_tensorly_torch_lacks_train_without_it():
    cells = init.tuning_cells(["cp", "tensor_ring"])
    assert {cell.initialization for cell in cells if cell.format == "tensor_ring"} == {OURS, KAIMING, XAVIER}
    assert {cell.initialization for cell in cells if cell.format == "cp"} == set(TRAINED)
    assert len(cells) == 8 * len(init.RATES) * len(init.TUNING_SEEDS)


@pytest.mark.slow
def test_thirty_layers_train_from_ours_and_not_core_by_core(tmp_path):
    settings = Settings("digits", None, None, None, 30, 24, 0.25, 8, 1, 64, "cpu")
    losses = {
        name: train_cell(settings, tmp_path, Cell("cp", name, 1e-3, 0, False), never)["train_loss"]
        for name in (OURS, KAIMING, XAVIER)
    }
    assert losses[OURS] < 1
    assert min(losses[KAIMING], losses[XAVIER]) > 2.29


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def invoke(monkeypatch):
    """The command with one learning rate, few cells and small data; (exit status, output)."""
    for module in (init, init_report):
        monkeypatch.setattr(module, "RATES", (1e-3, 1e30))
    monkeypatch.setattr(init, "TRAINED", (OURS, KAIMING))
    few = [cell for part in ("weights", "depth") for cell in measurements(part) if cell.network in ("cp", "tt_matrix")]
    monkeypatch.setattr(init, "measurements", lambda part: [c for c in few if c.part == part][::3])
    monkeypatch.setattr(init_depth, "DEPTH", 3)
    monkeypatch.setattr(init_depth, "DRAWS", {"depth": 2, "weights": 2})
    app = typer.Typer()
    app.command()(init.init_command)
    small = {"formats": "cp", "subset": 60, "depth": 2, "channels": 4, "epochs": 1, "tuning-epochs": 1, "seeds": 2}
    options = [str(part) for name, value in small.items() for part in (f"--{name}", value)]

    def run(*arguments):
        result = CliRunner(env={"COLUMNS": "250"}).invoke(app, [*options, "--processes", "1", *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split()), result.exception

    return run


def test_command_computes_all_parts_and_says_them(invoke, tmp_path):
    status, output, _ = invoke("--out", tmp_path)
    assert status == 0, output
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    count = {part: sum(record["part"] == part for record in records) for part in init.PARTS}
    assert count == {"weights": 5, "depth": 5, "training": 4 * 2 + 4}
    final = [record for record in records if record["part"] == "training" and not record["tuning"]]
    assert {(record["initialization"], record["lr"]) for record in final} == {(OURS, 1e-3), (KAIMING, 1e-3)}
    html = (tmp_path / "report.html").read_text()
    for text in ("tt_matrix (a=12, b=12, c=12)", "✓", "2 of 2", "diverged", "<svg", "retract", "test accuracy %"):
        assert text in html
    assert "cp-ours-orthogonal-0.001-final-1 train loss" in output
    again = invoke("--out", tmp_path)
    assert again[0] == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(records), "nothing is computed twice"


def test_parts_can_be_chosen_and_stopped(invoke, tmp_path):
    status, output, _ = invoke("--parts", "weights", "--out", tmp_path / "a")
    assert status == 0
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {record["part"] for record in records} == {"weights"}
    assert "test accuracy" not in output
    status, output, _ = invoke("--minutes", 0, "--out", tmp_path / "b")
    assert status == 0
    assert "the same command goes on" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "depth,width"], "--parts must be of weights, depth, training, got width"),
        (["--formats", "cp,tt"], "--formats must be of cp"),
        (["--data", "letters"], "data must be one of"),
    ],
)
def test_errors_come_before_there_is_a_folder(invoke, tmp_path, arguments, message):
    status, _, error = invoke(*arguments, "--out", tmp_path / "new")
    assert status != 0
    assert message in str(error)
    assert not Path(tmp_path / "new").exists()


def test_figures_of_any_size_are_shown():
    assert init_report._spread([]) == "–"
    assert init_report._spread([2.0]) == "2.000 ± 0.000"
    assert init_report._spread([1e12, 3e12]) == "2.0e+12 ± 1.4e+12"


def test_tensorly_torch_has_no_other_formats():
    assert set(TENSORLY_TORCH) <= {"cp", "tucker", "tucker2", "tensor_train"}
