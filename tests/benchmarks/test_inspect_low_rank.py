"""retract inspect --lowrank: ranks, parameters and errors of each start, JSON, options that mean nothing."""

import json

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from retract.benchmarks.inspect import inspect_command
from retract.benchmarks.inspect_lowrank import START, lowrank_rows
from retract.nets.init import function_error
from retract.nets.layers.low_rank import low_rank_layer


@pytest.fixture(scope="module")
def invoke():
    app = typer.Typer()
    app.command()(inspect_command)
    return lambda *arguments: CliRunner().invoke(app, [*arguments], env={"COLUMNS": "300", "NO_COLOR": "1"})


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False))
    return nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 32)).double()


X = torch.randn(2, 8, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("unfolding", ["output", "input", "separable"])
def test_rows_are_the_errors_of_layers(unfolding):
    model = network()
    first, second, last = lowrank_rows(model, X, rank=4, unfolding=unfolding)
    assert [row.name for row in (first, second, last)] == ["0", "3", "6"]
    assert [row.following for row in (first, second, last)] == ["BatchNorm, ReLU", "leaky ReLU 0.2", ""]
    assert [row.slope for row in (first, second, last)] == [0.0, 0.2, 1.0]
    layer = low_rank_layer(model[3], 4, unfolding=unfolding)
    assert (second.shape, second.dense_parameters) == ((16, 16, 3, 3), 16 * 144)
    assert second.parameters == layer.left.numel() + layer.right.numel()
    difference = (layer.weight - model[3].weight).detach().square().sum() / model[3].weight.detach().square().sum()
    assert second.matrix_error == pytest.approx(float(difference), rel=1e-12)
    assert second.function_error["spectral"] == pytest.approx(function_error(layer, model[3], slope=0.2), rel=1e-12)
    for row in (first, second):
        errors = [row.function_error[start] for start in ("relu_dc", "relu", "scaled", "spectral")]
        assert errors == sorted(errors) and errors[0] < errors[-1]  # as it must be without biases
        assert row.function_error["relu + bias"] < row.function_error["relu"]
    assert set(last.function_error) == set(START)
    linear = function_error(low_rank_layer(model[6], 4), model[6], slope=1.0)
    assert all(error == pytest.approx(linear, rel=1e-9) for error in last.function_error.values())
    assert type(model[0]) is nn.Conv2d


def test_table(invoke):
    result = invoke("digitsnet", "--lowrank", "--rank", "4", "--skip", "fc")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split()[-6:] == ["scaled", "relu", "relu_dc", "relu", "+", "bias"]
    assert set(lines[1]) == {"-"}
    assert any("BatchNorm, ReLU" in line and " 4 " in line for line in lines) and "fc" not in result.output
    assert "layers: " in result.output and "parameters for" in result.output


def test_json_and_sizes(invoke):
    layers = [
        json.loads(invoke("digitsnet", "--lowrank", "--json", "--unfolding", "separable", *size).output)["layers"]
        for size in ((), ("--budget", "0.25"), ("--budget", "0.5"), ("--energy", "0.3"))
    ]
    assert layers[0] == layers[1]
    stored = [sum(layer["parameters"] for layer in one) for one in layers]
    assert stored[1] < stored[2] and all(layer["matrix_error"] <= 0.7 for layer in layers[3])
    assert layers[0][0]["function_error"].keys() == START.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lowrank", "--spectra"], "ask for two tables"),
        (["--lowrank", "--form", "stiefel", "--error", "0.1"], "means nothing with --lowrank"),
        (["--unfolding", "input"], "means something only with --lowrank"),
        (["--lowrank", "--rank", "2", "--budget", "0.1"], "exactly one of rank, budget, energy"),
        (["--lowrank", "--budget", "1.5"], "budget must be a fraction"),
        (["--lowrank", "--unfolding", "rows"], "unfolding must be one of"),
        (["--lowrank", "--input-shape", "7,8,8"], "the model's forward pass failed"),
    ],
)
def test_wrong_options(invoke, arguments, message):
    result = invoke("digitsnet", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
