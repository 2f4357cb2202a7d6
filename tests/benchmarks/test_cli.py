"""The command line: help, errors a user can put right, and small runs."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from retract.benchmarks import cli, experiment, train
from retract.benchmarks.optimizers import OPTIMIZERS
from retract.nets.cnn import MODELS
from tests.benchmarks.command_line import invoke

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


SMALL = ("train", "--subset", "100", "--batch-size", "20", "--epochs", "2", "--threads", "1")


# ------------------------------------------------------------------------------------------------------- help


def test_help_lists_the_commands():
    for arguments in (["--help"], ["-h"]):
        status, output = invoke(*arguments)
        assert status == 0
        assert all(command.summary in output for command in cli.COMMANDS)
    assert all(command.summary in invoke("bench", "--help")[1] for command in cli.BENCHMARKS)


@pytest.mark.parametrize(
    "command",
    [(command.name,) for command in cli.COMMANDS] + [("bench", command.name) for command in cli.BENCHMARKS],
    ids=" ".join,
)
def test_every_command_has_help(command):
    status, output = invoke(*command, "--help")
    assert status == 0
    assert f"{' '.join(command)} [OPTIONS]" in output


def test_the_help_of_train_is_enough():
    _, output = invoke("train", "--help")
    assert all(name in output for name in OPTIMIZERS)
    assert "radians per unit of gradient at unit norm" in output
    assert "retract train --resume runs/" in output
    for name in MODELS:
        family, size = re.fullmatch(r"([a-z]+?)(\d+)", name).groups() if name[:6] == "resnet" else (name, "")
        assert family in output
        assert size in output
    for default in ("[default: digits]", "Default: psisgd", "[default: cosine]", "[default: 128]"):
        assert default in output
    for name, choice in OPTIMIZERS.items():
        assert f"{choice.lr:g}" in output, name


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from retract.benchmarks.cli import app; "
        "app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_train_options_import_nothing_heavy():
    """`retract train --help` and its mistakes are answered before torch is imported."""
    tree = ast.parse(Path(train.__file__).read_text())
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "dataclasses", "pathlib", "typing"}


def test_version():
    assert invoke("--version") == (0, f"retract {version('retract')}")


# ------------------------------------------------------------------------------------------------------- runs


def test_a_small_run(tmp_path):
    status, output = invoke(*SMALL, "--out", "runs/small")
    assert status == 0
    assert "epoch 2/2 train loss" in output
    assert "digitsnet on digits, psisgd, lr 0.1" in output
    assert f"Run folder: {tmp_path / 'runs/small'}" in output
    config = json.loads((tmp_path / "runs/small/config.json").read_text())
    assert config["subset"] == 100
    assert config["canonical"] is True
    assert config["augment"] is False
    metrics = [json.loads(line) for line in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in metrics] == [1, 2]
    assert f"{100 * metrics[-1]['test_accuracy']:.2f} %" in output
    assert (tmp_path / "runs/small/checkpoint.pt").exists()
    assert not (tmp_path / "cache").exists()


def test_the_same_run_twice_is_the_same():
    for out in ("a", "b"):
        assert invoke(*SMALL, "--augment", "--out", out)[0] == 0
    a, b = (experiment.Run.open(out).load_checkpoint() for out in "ab")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_default_folder_resume_and_overwrite(tmp_path):
    assert invoke(*SMALL, "--optimizer", "sgd")[0] == 0
    folder = tmp_path / "runs/digits-digitsnet-sgd-0"
    before = (folder / "metrics.jsonl").read_text()
    assert invoke(*SMALL, "--optimizer", "sgd")[0] == 2
    assert invoke("train", "--resume", folder)[0] == 0
    assert (folder / "metrics.jsonl").read_text() == before
    assert invoke(*SMALL, "--optimizer", "sgd", "--lr", "0.02", "--overwrite")[0] == 0
    assert (folder / "metrics.jsonl").read_text() != before


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_runs(name):
    status, output = invoke(*SMALL, "--optimizer", name, "--warmup", "0.5", "--schedule", "step")
    assert status == 0, output


def test_canonical_brings_filters_to_one_norm():
    from retract.nets import CANONICAL_NORM

    assert invoke(*SMALL, "--optimizer", "sgd", "--lr", "0", "--canonical", "--out", "a")[0] == 0
    assert invoke(*SMALL, "--optimizer", "sgd", "--lr", "0", "--out", "b")[0] == 0
    weights = [
        next(value for value in experiment.Run.open(out).load_checkpoint()["model"].values() if value.ndim == 4)
        for out in "ab"
    ]
    norms = [weight.flatten(1).norm(dim=1) for weight in weights]
    torch.testing.assert_close(norms[0], torch.full_like(norms[0], CANONICAL_NORM), rtol=1e-5, atol=0)
    assert (norms[1] - norms[1].mean()).abs().max() > 1e-3


def test_images_of_another_size():
    assert invoke(*SMALL, "--model", "resnet20", "--image-size", "12", "--epochs", "1")[0] == 0


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagenet"], "--data must be one of digits, mnist, cifar10, svhn, got 'imagenet'"),
        (["--model", "vgg99"], "--model must be one of digitsnet, "),
        (["--optimizer", "psi"], "--optimizer must be one of sgd, "),
        (["--schedule", "wave"], "--schedule must be one of constant, cosine, step, got 'wave'"),
        (["--lr", "-1"], "lr must be finite and at least 0, got -1.0"),
        (["--lr", "nan"], "lr must be finite and at least 0, got nan"),
        (["--euclidean-lr", "inf"], "euclidean_lr must be finite"),
        (["--subset", "5"], "subset must be from 10"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--data", "mnist", "--data-dir", "nowhere"], "there is no folder or archive /"),
        (
            ["--model", "mnist_convnet", "--image-size", "28"],
            "needs scale-invariant weights, and MnistConvNet has none",
        ),
        (["--model", "vgg16_bn"], "vgg16_bn cannot take images of 8x8 pixels: try --image-size 32"),
        (["--resume", "nowhere"], "nowhere holds no run: there is no nowhere/config.json"),
        (["--resume", "nowhere", "--overwrite"], "leave out --out and --overwrite"),
        (["--warmup", "99"], "warm-up must be 0 to"),
        (["--lr", "1e30", "--optimizer", "sgd"], "training diverged at step"),
    ],
)
def test_errors_are_one_line(arguments, message):
    status, output = invoke("train", "--threads", "1", *arguments)
    assert status == 2
    assert output.startswith("Error: ")
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(place):
    arguments = ["train", "--data", "imagenet"]
    arguments.insert(place, "--debug")
    with pytest.raises(ValueError, match="--data must be one of"):
        invoke(*arguments)


def test_wrong_usage_is_explained():
    assert invoke("trian")[0] == 2
    assert "Did you mean 'train'?" in invoke("trian")[1]
    assert "No such option" in invoke("train", "--learning-rate", "1")[1]
    assert "Invalid value for '--epochs'" in invoke("train", "--epochs", "0")[1]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, output = invoke(*SMALL)
    assert status == 2
    assert "sklearn" in output
    assert output.endswith("pip install 'retract[bench]'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.2"], "was run with lr = 0.1, not 0.2: a resumed run keeps its options"),
        (["--no-canonical"], "was run with canonical = True, not False"),
        (["--seed", "1"], "was run with seed = 0, not 1"),
        (["--data-dir", "nowhere"], "there is no folder or archive /"),
    ],
)
def test_a_resumed_run_keeps_its_options(arguments, message):
    assert invoke(*SMALL, "--out", "run")[0] == 0
    status, output = invoke("train", "--resume", "run", *arguments)
    assert status == 2
    assert message in output
    assert invoke("train", "--resume", "run", "--lr", "0.1", "--epochs", "2")[0] == 0


def test_a_folder_of_another_program_is_not_resumed(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 0.1}')
    status, output = invoke("train", "--resume", tmp_path)
    assert status == 2
    assert "holds no run of `retract train`" in output
