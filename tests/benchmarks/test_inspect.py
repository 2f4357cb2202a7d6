"""retract inspect: models from the zoo, files and packages; a table or JSON; errors that name the option."""

import io
import json

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from retract.benchmarks.inspect import inspect_command, invariance_table
from retract.nets import cnn


@pytest.fixture
def app():
    app = typer.Typer()
    app.command()(inspect_command)
    return app


@pytest.fixture
def run(app):
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def printed(table, width):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


MODEL_FILE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.out(self.norm(self.table(tokens)))

def tokens():
    return Tokens(), torch.arange(8).reshape(2, 4)

ready = build()
number = 3
"""


def test_table_of_a_zoo_model():
    text = printed(invariance_table(cnn.digitsnet(), torch.randn(4, 1, 8, 8), title="digits"), width=200)
    lines = text.splitlines()
    row = next(line for line in lines if "block2.0.weight" in line)
    assert "32x16x3x3" in row
    assert "per filter" in row
    assert "PSI(dim=0)" in row
    assert "3 of 11 parameters are scale-invariant: 13,968 of 14,458 entries, 80 scales." in text
    assert sum("PSI" in line for line in lines) == 3


def test_zoo_model_as_table_and_json(run):
    result = run("digitsnet")
    assert result.exit_code == 0
    assert "block1.0.weight" in result.output
    result = run("digitsnet", "--json", "--batch", "2", "--input-shape", "1x6x6")
    rows = json.loads(result.output)
    assert list(rows) == [name for name, _ in cnn.digitsnet().named_parameters()]
    assert rows["block1.0.weight"]["manifold"] == {"name": "PSI", "dim": 0, "groups": None, "conv_groups": 1}
    assert rows["block1.0.weight"]["residual"] < 1e-12
    assert rows["fc.bias"]["manifold"] is None
    assert rows["fc.bias"]["kind"] == "none"


@pytest.mark.parametrize("name", ["build", "ready"])
def test_model_from_a_file(run, tmp_path, name):
    (tmp_path / "mine.py").write_text(MODEL_FILE)
    result = run(f"{tmp_path / 'mine.py'}:{name}", "--input-shape", "2,6,6", "--json")
    rows = json.loads(result.output)
    assert (rows["0.weight"]["kind"], rows["0.weight"]["partner"]) == ("bias", "0.bias")
    table = run(f"{tmp_path / 'mine.py'}:{name}", "--input-shape", "2,6,6").output
    assert "with bias, per group" in table


def test_model_that_brings_its_input(run, tmp_path):
    (tmp_path / "mine.py").write_text(MODEL_FILE)
    rows = json.loads(run(f"{tmp_path / 'mine.py'}:tokens", "--json").output)
    assert rows["table.weight"]["kind"] == "filter"


def test_model_from_a_package(run):
    rows = json.loads(run("retract.nets.cnn:resnet20", "--input-shape", "3,16,16", "--json").output)
    assert sum(row["kind"] == "filter" for row in rows.values()) == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet21"], "is no model of the zoo"),
        (["nowhere.py:build"], "there is no file nowhere.py"),
        (["no_such_package:build"], "cannot import no_such_package"),
        (["retract.nets.cnn:nothing"], "has no 'nothing'"),
        (["retract.nets.cnn:resnet20"], "say --input-shape"),
        (["retract.nets.cnn:INPUT_SHAPES", "--input-shape", "3,8,8"], "not a torch.nn.Module"),
        (["digitsnet", "--input-shape", "1,8,eight"], "want positive sizes"),
        (["digitsnet", "--input-shape", "1,0,8"], "want positive sizes"),
        (["digitsnet", "--input-shape", "3,8,8"], "forward pass failed on example_input"),
        (["digitsnet", "--batch", "0"], "--batch"),
        (["digitsnet", "--plot", "a.png"], "means something only with --variance"),
        (["digitsnet", "--rank", "4"], "means something only with --spectra or --variance"),
        (["digitsnet", "--variance", "--spectra"], "choose one"),
        (["digitsnet", "--variance", "--input-shape", "3,8,8"], "forward pass failed on the inputs"),
        (["digitsnet", "--variance", "--plot", "nowhere/a.png"], "No such file or directory"),
        (["digitsnet", "--variance", "--plot", "a.table"], "'table' is not supported"),
    ],
)
def test_errors(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert message in words


def test_scalar_parameters_and_markup_in_names_are_printed_as_they_are():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("[red]gain", nn.Parameter(torch.tensor(2.0)))

        def forward(self, x):
            return x * getattr(self, "[red]gain")

    text = printed(invariance_table(Scaled(), (torch.randn(3),)), width=120)
    assert "[red]gain" in text
    assert "scalar" in text


def test_variance_of_a_zoo_model_as_table_and_json(run):
    lines = run("digitsnet", "--variance").output.splitlines()
    assert lines[0].split() == ["layer", "module", "E[y²]", "forward", "E[g²]", "backward"]
    assert [line.split()[0] for line in lines[2:6]] == ["block1.0", "block2.0", "block3.0", "fc"]
    assert [line.split()[0] for line in lines[7:]] == ["arithmetic", "geometric"]
    result = run("digitsnet", "--variance", "--json")
    assert result.output == run("digitsnet", "--variance", "--json").output, "weights are drawn with a seed"
    found = json.loads(result.output)
    row = found["layers"][1]
    assert row["name"] == "block2.0"
    assert row["forward"] == pytest.approx(row["moment"] / found["layers"][0]["moment"])
    mean = sum(layer["backward"] for layer in found["layers"][1:]) / 3
    assert found["backward"][0] == pytest.approx(mean)


def test_variance_of_integer_inputs_has_no_ratio_to_them(run, tmp_path):
    (tmp_path / "mine.py").write_text(MODEL_FILE)
    found = json.loads(run(f"{tmp_path / 'mine.py'}:tokens", "--variance", "--json").output)
    assert [row["name"] for row in found["layers"]] == ["out"]
    assert found["layers"][0]["forward"] is None
    assert found["layers"][0]["moment"] > 0


def test_variance_of_factored_layers_and_its_plot(run, tmp_path):
    plot = tmp_path / "variance.svg"
    options = ("--factorize", "svdp", "--rank", "4", "--plot", str(plot), "--json")
    found = json.loads(run("digitsnet", "--variance", *options).output)
    assert ["Factored" in row["kind"] for row in found["layers"]] == [True] * 4
    assert plot.read_text().startswith("<?xml")
