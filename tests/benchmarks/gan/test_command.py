"""`retract gan` as a user runs it: the run folder, mistakes, killed processes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from retract.benchmarks.gan import experiment as gan_experiment
from retract.benchmarks.gan import observer as gan_observer
from retract.benchmarks.gan.observer import Observer
from retract.benchmarks.runs import Run
from retract.benchmarks.samples import classifier as sample_classifier
from retract.nets.gan.constraints import CONSTRAINTS
from retract.nets.gan.networks import GANS
from tests.benchmarks.command_line import invoke

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

SMALL = (
    *("gan", "--subset", "100", "--width", "4", "--generator-width", "4", "--discriminator-steps", "1"),
    *("--batch-size", "16", "--log-every", "2", "--samples-every", "2", "--threads", "1"),
)


def contents(folder):
    """What has to be equal in runs that are: pictures, latent vectors, metrics but for times."""
    metrics = [{**record, "seconds": None} for record in Run.open(folder).metrics()]
    pictures = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    return metrics, pictures, torch.load(folder / "latents.pt")["grid"].tolist()


def test_the_help_is_enough():
    _, output = invoke("gan", "--help")
    assert all(name in output for name in (*CONSTRAINTS, *GANS, "hinge", "non-saturating", "stiefel"))


def test_a_run_and_its_folder(tmp_path, monkeypatch):
    recipe = sample_classifier.Recipe("digitsnet", epochs=1, lr=0.1, batch_size=32)
    monkeypatch.setattr(sample_classifier, "recipe_for", lambda data: recipe)
    status, output = invoke(*SMALL, "--steps", "5", "--metric-samples", "50", "--samples-every", "4", "--out", "run")
    assert status == 0
    for step in (2, 4, 5):
        assert f"step {step}/5 losses D " in output
    assert "singular values 0.5 to 1 Lipschitz bound" in output
    assert output.count("Fréchet") == 2
    run = Run.open(tmp_path / "run")
    records = run.metrics()
    assert [record["step"] for record in records] == [2, 4, 5]
    assert [sorted(record["metrics"])[0] if "metrics" in record else None for record in records] == [
        None,
        "class_divergence",
        "class_divergence",
    ]
    assert all(record["spectrum_violation"] < 1e-5 for record in records)
    assert all(record["spectra"].keys() == {"maps.0", "maps.2", "linear"} for record in records)
    pictures = {"data.png", *(f"step-{step:07}{kind}.png" for step in (4, 5) for kind in ("", "-paths"))}
    assert {path.name for path in (run.folder / "samples").iterdir()} == pictures
    with Image.open(run.folder / "samples/step-0000005.png") as grid:
        assert grid.size == (8 * 33 - 1, 8 * 33 - 1)
    html = (run.folder / "report.html").read_text()
    assert "After 5 of 5 steps" in html
    assert html.count("data:image/png") == 4  # the data, the last samples, their paths, an earlier step
    classifier = records[-1]["metrics"]["classifier_hash"]
    assert all(part in html for part in (classifier, "maps.2", "Lipschitz", "stable rank", "fingerprint"))
    assert torch.load(run.folder / "latents.pt")["ends"].shape == (2, 8, 16)


def test_an_inception_file_is_used_after_the_last_step(tmp_path, monkeypatch):
    seen = []

    class Figures:
        def as_dict(self):
            return {"fid": 12.5, "kid": 0.25}

    def measured(samples, data, weights):
        seen.append((samples.shape, samples.dtype, data.name, weights))
        return Figures()

    monkeypatch.setattr(gan_experiment, "require_inception", lambda weights: None)
    monkeypatch.setattr(gan_observer, "inception_metrics", measured)
    monkeypatch.setattr(Observer, "_classifier", None)
    monkeypatch.setattr(gan_observer, "evaluate_samples", lambda samples, data, classifier: NoMetrics())
    options = ("--steps", "4", "--metric-samples", "20", "--inception", "weights.pth", "--out", "run")
    assert invoke(*SMALL, *options)[0] == 0
    assert seen == [((20, 1, 8, 8), torch.uint8, "digits", str(tmp_path / "weights.pth"))]
    assert [record.get("inception") for record in Run.open(tmp_path / "run").metrics()] == [
        None,
        {"fid": 12.5, "kid": 0.25},
    ]
    assert "12.5" in (tmp_path / "run/report.html").read_text()


class NoMetrics:
    def as_dict(self):
        return {}


def test_resumed_after_an_interruption(tmp_path, monkeypatch):
    """Ctrl-C between two records, then the command that the message gives: the same run."""
    from retract.benchmarks.gan.progress import GANProgress

    options = (*SMALL, "--steps", "6", "--samples-every", "6", "--metric-samples", "0", "--constraint", "sn")
    assert invoke(*options, "--out", "whole")[0] == 0

    def step(self, trainer):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(GANProgress, "step", step)
        status, output = invoke(*options, "--out", "run")
    assert status == 130
    assert "Stopped after step 3. To go on: retract gan --resume run" in output
    assert invoke("gan", "--resume", "run", "--seed", "0", "--constraint", "sn")[0] == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    status, output = invoke("gan", "--resume", "run", "--seed", "1")
    assert status == 2 and "was run with seed = 0, not 1" in output


@pytest.mark.parametrize(
    ("steps", "moments"), [(8, [3]), pytest.param(40, [1, 3, 5, 9], marks=pytest.mark.slow)], ids=["once", "often"]
)
def test_killed_at_any_moment_and_resumed(tmp_path, steps, moments):
    """SIGKILL, which no program can handle, when so many pictures are there."""
    options = [*SMALL, "--steps", str(steps), "--samples-every", "4", "--metric-samples", "0"]
    command, arguments = [sys.executable, "-m", "retract.benchmarks.cli"], [*options, "--out", "killed"]
    for pictures in moments:
        with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("killed/samples/*"))) < pictures and time.monotonic() < deadline:
                time.sleep(0.001)
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        arguments = ["gan", "--resume", "killed"]
    assert len(Run.open(tmp_path / "killed").metrics()) < steps // 2
    for rest in (arguments, [*options, "--out", "whole"]):
        assert invoke(*rest)[0] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert (tmp_path / "killed/report.html").exists()


def test_a_new_run_in_the_place_of_an_old_one(tmp_path):
    options = (*SMALL, "--metric-samples", "0", "--constraint", "none", "--out", "run")
    assert invoke(*options, "--steps", "4")[0] == 0
    status, output = invoke(*options, "--steps", "2")
    assert status == 2 and "already holds a run: use --resume run, --overwrite, or another --out" in output
    assert invoke(*options, "--steps", "2", "--overwrite")[0] == 0
    assert len(list((tmp_path / "run/samples").glob("step-*"))) == 2
    assert "After 2 of 2 steps" in (tmp_path / "run/report.html").read_text()


def test_a_folder_of_images_without_classes(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(25):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    small = [part for part in SMALL if part not in ("--subset", "100")]
    status, output = invoke(
        *small, "--data", "folder", "--data-dir", "images", "--network", "digits", "--steps", "2", "--constraint", "sr"
    )
    assert status == 0
    assert "Fréchet" not in output  # one class: nothing to train a classifier on
    folder = tmp_path / "runs/gan-folder-digits-sr-0"
    assert json.loads((folder / "config.json").read_text())["data_dir"] == str(tmp_path / "images")
    assert "no metrics" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "celeba"], "--data must be one of digits, mnist, cifar10, svhn, folder, got 'celeba'"),
        (["--network", "biggan"], "--network must be one of digits, dcgan28, dcgan32, sngan32, sngan48, got 'biggan'"),
        (["--constraint", "clip"], "--constraint must be one of none, sn, sr"),
        (["--generator-constraint", "clip"], "--generator-constraint must be one of none, sn, sr"),
        (["--form", "polar"], "--form must be one of householder, stiefel, got 'polar'"),
        (["--loss", "wgan"], "--loss must be one of hinge, non-saturating, got 'wgan'"),
        (["--samples-every", "3"], "--samples-every must be a multiple of --log-every, got 3 and 2"),
        (["--data", "folder"], "--data folder needs --data-dir"),
        (["--constraint", "sn", "--rank", "4"], "rank must be None for constraint 'sn'"),
        (["--metric-samples", "5"], "--metric-samples must be 0 or at least 10, got 5"),
        (["--inception", "weights.pth", "--metric-samples", "0"], "--metric-samples is 0"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--ema", "1"], "ema must be in [0, 1), got 1.0"),
    ],
)
def test_mistakes_are_answered_before_a_folder_is_made(tmp_path, options, message):
    status, output = invoke(*SMALL, "--out", "run", *options)
    assert status == 2
    assert message in output
    assert not (tmp_path / "run").exists()


def test_inception_without_its_package(monkeypatch):
    def missing(weights):
        raise ImportError("Inception metrics need torch-fidelity")

    monkeypatch.setattr(gan_experiment, "require_inception", missing)
    status, output = invoke(*SMALL, "--inception", "weights.pth")
    assert status == 2 and "--inception: Inception metrics need torch-fidelity" in output


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    status, output = invoke(*SMALL, "--steps", "2", "--out", "file/run")
    assert status == 2
    assert "file/run cannot be written" in output


def test_resuming_what_is_no_gan(tmp_path):
    Run.create(tmp_path / "run", {"lr": 0.1})
    status, output = invoke("gan", "--resume", "run")
    assert status == 2 and "run holds no run of `retract gan`" in output
    status, output = invoke("gan", "--resume", "run", "--overwrite")
    assert status == 2 and "leave out --out and --overwrite" in output
