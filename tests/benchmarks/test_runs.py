"""Run folders, and training that is stopped anywhere and goes on to the bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from retract.benchmarks import optimizers
from retract.benchmarks.cli import app
from retract.benchmarks.data import load
from retract.benchmarks.runs import Interrupted, Run, stop_on_signal
from retract.benchmarks.training import Trainer
from retract.nets.cnn import digitsnet

EPOCHS = 2
CONFIG = {"lr": 0.1, "seed": 0}


class NetWithDropout(nn.Module):
    """A small zoo model behind dropout, so that torch's own random numbers matter too."""

    def __init__(self):
        super().__init__()
        self.drop, self.net = nn.Dropout(0.2), digitsnet()

    def forward(self, images):
        return self.net(self.drop(images))

    def manifold_groups(self):
        return self.net.manifold_groups()


@pytest.fixture(scope="module")
def data():
    return load("digits", subset=200)


def trainer_for(data, optimizer="psisgd", *, epochs=EPOCHS):
    torch.manual_seed(0)
    model = NetWithDropout()
    return Trainer(
        model,
        optimizers.build(
            optimizer, model, lr=0.05, weight_decay=0 if optimizer in ("psigd", "riemannian-gd") else 1e-3
        ),
        data,
        epochs=epochs,
        batch_size=50,
        warmup=0.5,
        label_smoothing=0.1,
        augment=True,
        seed=1,
    )


def resumed(data, folder, optimizer="psisgd", *, epochs=EPOCHS):
    """A new trainer, whose random numbers have gone elsewhere meanwhile, and its run."""
    trainer = trainer_for(data, optimizer, epochs=epochs)
    run = Run.open(folder)
    if (state := run.load_checkpoint()) is not None:
        torch.manual_seed(12345)
        trainer.load_state_dict(state)
    return trainer, run


def without_times(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def assert_same_state(a, b, path="state"):
    """Equal to the bit, however deeply nested; times aside."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """{optimizer: (metrics, final state)} of runs that nothing stopped."""
    results = {}

    def get(optimizer):
        if optimizer not in results:
            run = Run.create(tmp_path_factory.mktemp("whole") / optimizer, CONFIG)
            trainer = trainer_for(data, optimizer)
            trainer.fit(run)
            results[optimizer] = without_times(run.metrics()), trainer.state_dict()
        return results[optimizer]

    return get


def send(signum=signal.SIGINT):
    os.kill(os.getpid(), signum)


class InterruptAt:
    """Sends the signal after the given step of the run, counted from 1 over all epochs."""

    def __init__(self, step, signum=signal.SIGINT):
        self.step, self.signum = step, signum

    def __call__(self, trainer):
        if trainer.epoch * trainer.steps_per_epoch + trainer.step == self.step:
            send(self.signum)


# ------------------------------------------------------------------------------------------ resume to the bit


@pytest.mark.parametrize("optimizer", list(optimizers.OPTIMIZERS))
@pytest.mark.parametrize("step", [2, 4, 7])
def test_interrupted_after_a_step(data, tmp_path, uninterrupted, optimizer, step):
    """Within an epoch, at its very end (before evaluation), and in the second one."""
    run = Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(Interrupted):
        trainer_for(data, optimizer).fit(run, on_step=InterruptAt(step))
    trainer, run = resumed(data, run.folder, optimizer)
    assert trainer.epoch * trainer.steps_per_epoch + trainer.step == step
    trainer.fit(run)
    metrics, state = uninterrupted(optimizer)
    assert without_times(run.metrics()) == metrics
    assert_same_state(trainer.state_dict(), state)


def test_interrupted_at_every_step(data, tmp_path, uninterrupted):
    run = Run.create(tmp_path / "run", CONFIG)
    trainer = trainer_for(data)
    for step in range(1, EPOCHS * trainer.steps_per_epoch + 1):
        with pytest.raises(Interrupted):
            trainer.fit(run, on_step=InterruptAt(step))
        trainer, run = resumed(data, run.folder)
    trainer.fit(run)
    metrics, state = uninterrupted("psisgd")
    assert without_times(run.metrics()) == metrics
    assert_same_state(trainer.state_dict(), state)


def test_interrupted_during_evaluation(data, tmp_path, uninterrupted, monkeypatch):
    evaluate = Trainer.evaluate

    def interrupt_and_evaluate(self, stop=None):
        if self.epoch == 1:
            send()
        return evaluate(self, stop)

    run = Run.create(tmp_path / "run", CONFIG)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "evaluate", interrupt_and_evaluate)
        with pytest.raises(Interrupted):
            trainer_for(data).fit(run)
    trainer, run = resumed(data, run.folder)
    assert (trainer.epoch, trainer.step) == (1, trainer.steps_per_epoch)
    trainer.fit(run)
    metrics, state = uninterrupted("psisgd")
    assert without_times(run.metrics()) == metrics
    assert_same_state(trainer.state_dict(), state)


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("moment", ["first epoch", "before the line", "after the line", "saving"])
def test_power_cut(data, tmp_path, uninterrupted, monkeypatch, moment):
    """Nothing is saved at the cut itself: the run goes back to its last checkpoint, its metrics too."""

    def cut(*arguments):
        raise PowerCutError

    target = {
        "before the line": (Run, "log"),
        "after the line": (Run, "save_checkpoint"),
        "saving": (os, "replace"),
    }
    run = Run.create(tmp_path / "run", CONFIG)
    with monkeypatch.context() as patched:
        callbacks = {"on_epoch": lambda record: patched.setattr(*target[moment], cut)}
        if moment == "first epoch":
            callbacks = {"on_step": cut}
        with pytest.raises(PowerCutError):
            trainer_for(data).fit(run, **callbacks)

    trainer, run = resumed(data, run.folder)
    assert (trainer.epoch, trainer.step) == (0 if moment == "first epoch" else 1, 0)
    trainer.fit(run)
    metrics, state = uninterrupted("psisgd")
    assert without_times(run.metrics()) == metrics
    assert_same_state(trainer.state_dict(), state)
    assert {path.name for path in run.folder.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}


def test_a_half_written_line_is_removed(data, tmp_path, uninterrupted):
    run = Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(Interrupted):
        trainer_for(data).fit(run, on_step=InterruptAt(5))
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "tra')
    trainer, run = resumed(data, run.folder)
    trainer.fit(run)
    assert without_times(run.metrics()) == uninterrupted("psisgd")[0]


def test_a_finished_run_resumed_stays_as_it_is(data, tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    trainer_for(data).fit(run)
    before = (run.folder / "metrics.jsonl").read_bytes()
    trainer, run = resumed(data, run.folder)
    trainer.fit(run)
    assert (run.folder / "metrics.jsonl").read_bytes() == before


def test_other_data_are_refused(data, tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(Interrupted):
        trainer_for(data).fit(run, on_step=InterruptAt(1))
    with pytest.raises(ValueError, match=f"fingerprint .*, expected {data.fingerprint}"):
        resumed(load("digits", subset=200, seed=1), run.folder)


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag_and_handlers_come_back(signum):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with stop_on_signal() as stop:
        stop.check()
        send(signum)
        assert {number: signal.getsignal(number) for number in before} == before  # a second one acts at once
        with pytest.raises(Interrupted, match=signal.Signals(signum).name) as interruption:
            stop.check()
    assert interruption.value.signum == signum
    assert {number: signal.getsignal(number) for number in before} == before


def test_signals_are_left_alone_off_the_main_thread():
    def use():
        with stop_on_signal() as stop:
            stop.check()
        done.append(True)

    done = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_real_process_interrupted_and_resumed(tmp_path, signum, status):
    """`retract train` as a user runs it: the message gives the command, and the command finishes the same
    run.
    """
    options = ["train", "--batch-size", "25", "--epochs", "8", "--threads", "1", "--out"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = [sys.executable, "-m", "retract.benchmarks.cli", *options, stopped]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (stopped / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert f"retract train --resume {stopped}" in output
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) < 8

    for arguments in (["train", "--resume", str(stopped)], [*options, str(whole)]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert without_times(Run.open(stopped).metrics()) == without_times(Run.open(whole).metrics())
    states = [Run.open(folder).load_checkpoint() for folder in (whole, stopped)]
    assert_same_state(*states)


# ------------------------------------------------------------------------------------------------ run folders


def test_a_folder_with_a_run_is_not_taken(tmp_path):
    Run.create(tmp_path / "run", CONFIG).log({"epoch": 1})
    with pytest.raises(ValueError, match="already holds a run: use --resume"):
        Run.create(tmp_path / "run", CONFIG)
    (tmp_path / "run/notes.txt").write_text("mine")
    run = Run.create(tmp_path / "run", {"lr": 1.0}, overwrite=True)
    assert run.metrics() == []
    assert run.load_checkpoint() is None
    assert json.loads((tmp_path / "run/config.json").read_text()) == {"lr": 1.0}
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run is a file; a run needs a folder"):
        Run.create(tmp_path / "run", CONFIG)


def test_a_differing_option_is_named(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    run.require_same({"lr": 0.1, "seed": 0})
    with pytest.raises(ValueError, match=r"was run with lr = 0\.1, not 0\.2"):
        run.require_same({"seed": 0, "lr": 0.2})


def test_no_run_and_damaged_runs(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: there is no .*config\.json"):
        Run.open(tmp_path)
    run = Run.create(tmp_path / "run", CONFIG)
    run.log({"epoch": 1})
    run.save_checkpoint({"x": torch.ones(3)})
    checkpoint = run.folder / "checkpoint.pt"
    content = checkpoint.read_bytes()
    for damaged in (content[:-100], b"", b"nonsense"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
            Run.open(run.folder).load_checkpoint()
    torch.save([1], checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        Run.open(run.folder).load_checkpoint()
    checkpoint.write_bytes(content)
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds 0 lines; its checkpoint came after 1"):
        Run.open(run.folder).load_checkpoint()
    (run.folder / "metrics.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        Run.open(run.folder)
    (run.folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Run.open(run.folder)


def test_a_checkpoint_runs_no_code(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    mark = tmp_path / "mark"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    torch.save({"state": Hostile(), "metrics_lines": 0}, run.folder / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        run.load_checkpoint()
    assert not mark.exists()


def test_metrics_are_strict_json(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.log({"loss": float("nan")})
    assert run.metrics() == []
