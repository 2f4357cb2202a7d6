"""`retract train --factorize` and `retract inspect --spectra`: options, runs that resume to the bit, errors."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from retract.benchmarks import optimizers
from retract.benchmarks.cli import app
from retract.benchmarks.experiment import Config, build_trainer, read_config
from retract.benchmarks.factorization import FORMS, KINDS, SPECTRA
from retract.benchmarks.runs import Interrupted, Run
from retract.manifolds.spectrum import as_spectrum
from retract.nets import cnn
from retract.nets.compress import factorize
from retract.nets.parametrizations import spectral_weights
from retract.nets.summary import summary

SMALL = ("train", "--subset", "100", "--batch-size", "20", "--epochs", "2", "--threads", "1")


def invoke(*arguments):
    """(exit status, output in one line)."""
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def layers(kind="svdp", form="householder", *, rank=8, spectrum="lipschitz", skip="fc"):
    return ("--factorize", kind, "--rank", rank, "--spectrum", spectrum, "--form", form, "--skip", skip)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_its_layers_cost(tmp_path, kind, form):
    optimizer = {"householder": "sgd", "stiefel": "riemannian-sgd"}[form]
    status, output = invoke(*SMALL, *layers(kind, form))
    assert status == 0, output
    folder = tmp_path / f"runs/digits-digitsnet-{kind}8-{optimizer}-0"
    asked = {"factorize": kind, "rank": 8, "spectrum": "lipschitz", "form": form, "skip": "fc"}
    assert asked.items() <= config_of(folder).items()
    assert (config_of(folder)["optimizer"], config_of(folder)["canonical"]) == (optimizer, False)

    model = factorize(cnn.digitsnet(), kind, 8, "lipschitz", skip="fc", form=form)
    freedom = sum(p.degrees_of_freedom for _, p, _ in spectral_weights(model))
    assert f"{kind} of rank 8, lipschitz spectrum, {form} form: 3 of 4 layers, {freedom:,} degrees of freedom" in output
    assert f"Z = {summary(model).compression:.1f} % of the network" in output


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_spectrum_is_kept(tmp_path, spectrum):
    assert invoke(*SMALL, *layers(spectrum=spectrum), "--out", "run")[0] == 0
    trainer = build_trainer(read_config(Run.open(tmp_path / "run"), {}))
    trainer.load_state_dict(Run.open(tmp_path / "run").load_checkpoint())
    found = list(spectral_weights(trainer.model))
    assert [name for name, _, _ in found] == ["block1.0.weight", "block2.0.weight", "block3.0.weight"]
    for _, parametrization, weights in found:
        assert parametrization.spectrum == as_spectrum(spectrum)
        ok, reason = parametrization.spectrum.contains(parametrization.singular_values(*weights))
        assert ok, reason


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_to_the_bit(tmp_path, kind, form):
    """Stopped within an epoch, and taken up from the folder alone."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert invoke(*SMALL, *layers(kind, form), "--augment", "--out", whole)[0] == 0

    run = Run.create(stopped, config_of(whole))

    def stop(trainer):
        if trainer.epoch == 1 and trainer.step == 2:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        build_trainer(read_config(run, {})).fit(run, on_step=stop)
    assert invoke("train", "--resume", stopped)[0] == 0
    states = [Run.open(folder).load_checkpoint() for folder in (whole, stopped)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert all(torch.equal(states[0]["model"][key], states[1]["model"][key]) for key in states[0]["model"])
    losses = [[r["train_loss"] for r in Run.open(folder).metrics()] for folder in (whole, stopped)]
    assert losses[0] == losses[1]


def test_a_run_of_before_there_were_factored_layers_resumes(tmp_path):
    assert invoke(*SMALL, "--out", "run")[0] == 0
    path = tmp_path / "run/config.json"
    old = {name: value for name, value in config_of(path.parent).items() if name not in optional_fields()}
    assert "factorize" not in old
    path.write_text(json.dumps(old))
    assert invoke("train", "--resume", "run")[0] == 0
    status, output = invoke("train", "--resume", "run", "--factorize", "svdp")
    assert status == 2
    assert "was run with factorize = None, not 'svdp'" in output


def optional_fields():
    return {name for name in Config.__dataclass_fields__ if hasattr(Config, name)}


def test_a_resumed_run_keeps_its_layers():
    assert invoke(*SMALL, *layers(), "--out", "run")[0] == 0
    status, output = invoke("train", "--resume", "run", "--rank", "4")
    assert status == 2
    assert "was run with rank = 8, not 4" in output
    assert invoke("train", "--resume", "run", "--rank", "8", "--form", "householder")[0] == 0


def test_amp():
    assert invoke(*SMALL, *layers("sttp", "stiefel"), "--amp")[0] == 0


# ------------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("form", "name", "decay"),
    [("householder", "sgd", 1e-3), ("householder", "adamw", 1e-3), ("stiefel", "riemannian-sgd", 0)],
)
def test_rates_and_decay_of_both_forms(form, name, decay):
    """Factored weights have the learning rate, all others --euclidean-lr; points on a manifold do not decay."""
    model = factorize(cnn.digitsnet(), "svdp", 8, skip="fc", form=form)
    optimizer = optimizers.build(name, model, lr=0.2, euclidean_lr=0.5, weight_decay=1e-3)
    factored = {id(weight) for _, _, weights in spectral_weights(model) for weight in weights}
    seen = {id(w): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for w in group["params"]}
    assert seen == {id(p): (0.2, decay) if id(p) in factored else (0.5, 1e-3) for p in model.parameters()}


def test_a_network_of_factored_layers_alone():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    optimizer = optimizers.build("riemannian-sgd", factorize(model, "svdp", 2, form="stiefel"), euclidean_lr=0.5)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "8"], "--rank given without --factorize svdp or sttp"),
        (["--form", "stiefel", "--skip", "fc"], "--form and --skip given without --factorize svdp or sttp"),
        (["--factorize", "svd", "--rank", "8"], "--factorize must be one of svdp, sttp, got 'svd'"),
        (["--factorize", "svdp"], "--factorize svdp needs --rank"),
        ([*layers(spectrum="flat")], "--spectrum must be one of identity, free, lipschitz, bounded, got 'flat'"),
        ([*layers(form="polar")], "--form must be one of householder, stiefel, got 'polar'"),
        ([*layers(skip="head")], "'head' fits no layer"),
        ([*layers(skip="*")], "no layer to factorize"),
        ([*layers(form="stiefel"), "--optimizer", "sgd"], "sgd would leave the Stiefel manifold: use riemannian-sgd"),
        ([*layers(form="stiefel"), "--optimizer", "adamw"], "adamw would leave the Stiefel manifold"),
        ([*layers(), "--optimizer", "riemannian-sgd"], "riemannian-sgd needs weights on a manifold"),
        ([*layers(), "--optimizer", "psisgd"], "psisgd turns scale-invariant filters, and factored layers have none"),
        ([*layers(), "--optimizer", "geoopt-sphere"], "geoopt-sphere turns scale-invariant filters"),
        ([*layers(form="stiefel"), "--lr", "1e30"], "training diverged at step"),
        ([*layers(), "--lr", "1e30"], "training diverged at step"),
    ],
)
def test_errors_are_one_line_and_leave_no_folder(tmp_path, arguments, message):
    status, output = invoke(*SMALL, *arguments)
    assert status == 2
    assert output.startswith("Error: ")
    assert message in output
    assert "Traceback" not in output
    assert "1e30" in arguments or not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_a_model_of_the_zoo(kind):
    torch.manual_seed(0)
    status, output = invoke("inspect", "digitsnet", "--spectra", *layers(kind))
    assert status == 0
    for name in ("block1.0", "block2.0", "block3.0", "fc"):
        assert name in output
    assert output.count(kind) == 3
    assert "Z = " in output


def test_inspect_a_dense_model():
    status, output = invoke("inspect", "resnet20", "--spectra")
    assert status == 0
    assert "Z = 100.00 %" in output


@pytest.mark.parametrize("form", FORMS)
def test_inspect_a_run(tmp_path, form):
    """The spectra of the last checkpoint, not of a new network; as JSON they can be read again."""
    assert invoke(*SMALL, *layers(form=form, spectrum="free"), "--out", "run")[0] == 0
    status, output = invoke("inspect", "--spectra", "run", "--json")
    assert status == 0
    found = json.loads(output)
    trainer = build_trainer(read_config(Run.open(tmp_path / "run"), {}))
    trainer.load_state_dict(Run.open(tmp_path / "run").load_checkpoint())
    rows = {row["name"]: row for row in found["layers"]}
    for name, parametrization, weights in spectral_weights(trainer.model):
        row = rows[name.removesuffix(".weight")]
        values = parametrization.singular_values(*weights)
        assert (row["largest"], row["smallest"]) == pytest.approx((values.max().item(), values.min().item()), rel=1e-6)
        assert row["degrees_of_freedom"] == parametrization.degrees_of_freedom
    assert found["z"] == pytest.approx(summary(trainer.model).compression)
    assert "svdp" in invoke("inspect", "--spectra", "run")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digitsnet", "--factorize", "svdp", "--rank", "8"], "means something only with --spectra"),
        (["digitsnet", "--spectra", "--rank", "8"], "--rank given without --factorize"),
        (["digitsnet", "--spectra", "--factorize", "svdp"], "--factorize svdp needs --rank"),
        (["resnet21", "--spectra"], "is no model of the zoo"),
        ([".", "--spectra"], "holds no run"),
    ],
)
def test_errors_of_inspect(arguments, message):
    status, output = invoke("inspect", *arguments)
    assert status == 2
    assert message in output


def test_a_run_is_inspected_as_it_is(tmp_path):
    assert invoke(*SMALL, "--out", "run")[0] == 0
    status, output = invoke("inspect", "run", "--spectra", "--factorize", "svdp", "--rank", "4")
    assert status == 2
    assert "the layers of a run are as they are" in output
    (tmp_path / "run/checkpoint.pt").unlink()
    status, output = invoke("inspect", "run", "--spectra")
    assert status == 2
    assert "has no checkpoint yet" in output
