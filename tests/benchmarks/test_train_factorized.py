"""`retract train --factorize` and `retract inspect --spectra`: options, runs that resume to the bit, errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from retract.benchmarks import optimizers
from retract.benchmarks.experiment import Config, build_trainer, read_config
from retract.benchmarks.factorization import FORMS, SPECTRA, SPECTRAL, Factorization, fill_in
from retract.benchmarks.runs import Interrupted, Run
from retract.manifolds.spectrum import as_spectrum
from retract.nets import cnn
from retract.nets.compress import factorize
from retract.nets.layers.low_rank import low_rank_layer
from retract.nets.parametrizations.models import canonical_weights, spectral_weights
from retract.nets.summary import summary
from tests.benchmarks.command_line import invoke

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

SMALL = ("train", "--subset", "100", "--batch-size", "20", "--epochs", "2", "--threads", "1")


def layers(kind="svdp", form="householder", *, rank=8, spectrum="lipschitz", skip="fc"):
    return ("--factorize", kind, "--rank", rank, "--spectrum", spectrum, "--form", form, "--skip", skip)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("form", FORMS["svdp"])
@pytest.mark.parametrize("kind", SPECTRAL)
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


@pytest.mark.parametrize("form", FORMS["svdp"])
@pytest.mark.parametrize("kind", SPECTRAL)
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


# ------------------------------------------------------------------------------- canonical layers and tensor layers

CANONICAL = ("--factorize", "canonical", "--rank", 8, "--skip", "block1,fc")
TENSOR = ("--factorize", "tucker2", "--budget", 0.3, "--skip", "block1,fc")
LOW_RANK = ("--factorize", "lowrank", "--budget", 0.3, "--skip", "fc")
DECOMPOSED = ("--factorize", "tucker2", "--error", 0.6, "--skip", "block1,fc")


@pytest.mark.parametrize(
    ("arguments", "folder", "said"),
    [
        (CANONICAL, "canonical8-sgd", "canonical of rank 8, euclidean form: 2 of 4 layers"),
        (
            (*CANONICAL, "--form", "oblique"),
            "canonical8-riemannian-sgd",
            "canonical of rank 8, oblique form: 2 of 4 layers",
        ),
        (TENSOR, "tucker2budget0.3-sgd", "tucker2 of budget 0.3: 2 of 4 layers"),
        (DECOMPOSED, "tucker2error0.6-sgd", "tucker2 of error 0.6: 2 of 4 layers"),
        (LOW_RANK, "lowrankbudget0.3-sgd", "lowrank of budget 0.3: 2 of 4 layers"),
    ],
)
def test_every_kind_trains_resumes_and_is_inspected(tmp_path, arguments, folder, said):
    """What is stopped within an epoch goes on to the bit; the ranks of a decomposition are found again."""
    status, output = invoke(*SMALL, *arguments)
    assert status == 0, output
    assert said in output
    whole = tmp_path / f"runs/digits-digitsnet-{folder}-0"

    run = Run.create(tmp_path / "stopped", config_of(whole))

    def stop(trainer):
        if trainer.epoch == 1 and trainer.step == 2:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        build_trainer(read_config(run, {})).fit(run, on_step=stop)
    assert invoke("train", "--resume", "stopped")[0] == 0
    states = [Run.open(place).load_checkpoint()["model"] for place in (whole, tmp_path / "stopped")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    torch.manual_seed(99)  # not the seed of the run
    status, output = invoke("inspect", "--spectra", whole)
    assert status == 0, output
    assert arguments[1] in output


def test_layers_of_a_budget_start_afresh_and_those_of_an_error_are_decomposed():
    torch.manual_seed(0)
    dense = cnn.digitsnet()
    for size, near in (({"budget": 0.9}, False), ({"error": 0.6}, True)):
        model = copy.deepcopy(dense)
        Factorization("tucker2", None, skip=("block1", "fc"), **size).apply(model)
        target = dense.block2[0].weight
        error = (model.block2[0].weight - target).norm() / target.norm()
        assert (error <= 0.6 + 1e-5) == near


@pytest.mark.parametrize("size", [{"rank": 4}, {"budget": 0.3}, {"energy": 0.4}])
def test_low_rank_layers_start_as_the_function_of_the_layer(size):
    torch.manual_seed(0)
    dense = cnn.digitsnet()
    model = copy.deepcopy(dense)
    options = {"factorize": "lowrank", "spectrum": None, "form": None, "skip": "fc", **size}
    Factorization.of(fill_in(options)).apply(model)
    layer, target = model.block2[0], dense.block2[0]
    expected = low_rank_layer(target, layer.rank, method="relu")
    assert torch.equal(layer.left, expected.left) and torch.equal(layer.right, expected.right)


def test_oblique_factors_stay_unit_vectors():
    assert invoke(*SMALL, *CANONICAL, "--form", "oblique", "--out", "run")[0] == 0
    trainer = build_trainer(read_config(Run.open("run"), {}))
    trainer.load_state_dict(Run.open("run").load_checkpoint())
    for _, _, (_, *factors) in canonical_weights(trainer.model):
        for rows in factors:
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("form", "name"), [("euclidean", "sgd"), ("oblique", "riemannian-sgd")])
def test_rates_of_canonical_layers(form, name):
    """Weights of terms and factors have the learning rate; on a manifold, none of them decays."""
    model = factorize(cnn.digitsnet(), "canonical", 8, skip=("block1", "fc"), form=form)
    optimizer = optimizers.build(name, model, lr=0.2, euclidean_lr=0.5, weight_decay=1e-3)
    own = {id(weight) for _, _, weights in canonical_weights(model) for weight in weights}
    decay = {"euclidean": 1e-3, "oblique": 0}[form]
    seen = {id(w): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for w in group["params"]}
    assert seen == {id(p): (0.2, decay) if id(p) in own else (0.5, 1e-3) for p in model.parameters()}
    manifolds = {id(w): group.get("manifold") for group in optimizer.param_groups for w in group["params"]}
    for _, _, (scale, *factors) in canonical_weights(model):
        assert manifolds[id(scale)] is None
        assert all((manifolds[id(rows)] is not None) == (form == "oblique") for rows in factors)


def test_rates_of_tensor_layers():
    model = factorize(cnn.digitsnet(), "cp", budget=0.3, init="kaiming", skip=("block1", "fc"))
    optimizer = optimizers.build("sgd", model, lr=0.2, euclidean_lr=0.5)
    cores = {id(core) for block in (model.block2, model.block3) for core in block[0].cores}
    seen = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert seen == {id(p): 0.2 if id(p) in cores else 0.5 for p in model.parameters()}


def test_options_of_before_there_were_budgets():
    """An older caller says nothing of budget and error."""
    old = {"factorize": "svdp", "rank": 8, "spectrum": None, "form": None, "skip": None}
    assert Factorization.of(fill_in(old)) == Factorization("svdp", 8, "free", "householder")
    assert Factorization.of({**old, "spectrum": "free", "form": "stiefel"}).form == "stiefel"


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "8"], "--rank given without --factorize svdp or sttp"),
        (["--budget", "0.1"], "--budget given without --factorize"),
        (["--form", "stiefel", "--skip", "fc"], "--form and --skip given without --factorize svdp or sttp"),
        (
            ["--factorize", "svd", "--rank", "8"],
            "--factorize must be one of svdp, sttp, canonical, lowrank, cp, tucker2",
        ),
        (["--factorize", "cp"], "--factorize cp needs one of --rank, --budget and --error, got none"),
        (
            ["--factorize", "cp", "--rank", "8", "--error", "0.1"],
            "needs one of --rank, --budget and --error, got --rank",
        ),
        (["--factorize", "lowrank"], "needs one of --rank, --budget and --energy, got none"),
        (["--factorize", "lowrank", "--error", "0.1"], "--error means nothing for --factorize lowrank"),
        (["--factorize", "cp", "--energy", "0.1"], "--energy means nothing for --factorize cp"),
        (["--factorize", "cp", "--rank", "8", "--form", "oblique"], "--form means nothing for --factorize cp"),
        (["--factorize", "canonical", "--rank", "8", "--spectrum", "free"], "--spectrum means nothing for --factorize"),
        (["--factorize", "canonical", "--rank", "8", "--form", "stiefel"], "--form must be one of euclidean, oblique"),
        (["--factorize", "svdp", "--rank", "8", "--budget", "0.1"], "--budget means nothing for --factorize svdp"),
        (["--factorize", "cp", "--budget", "1.5", "--skip", "fc"], "budget must be"),
        (["--factorize", "cp", "--error", "-1", "--skip", "fc"], "error must be"),
        (["--factorize", "svdp"], "--factorize svdp needs --rank"),
        ([*layers(spectrum="flat")], "--spectrum must be one of identity, free, lipschitz, bounded, got 'flat'"),
        ([*layers(form="polar")], "--form must be one of householder, stiefel, got 'polar'"),
        ([*layers(skip="head")], "'head' fits no layer"),
        ([*layers(skip="*")], "no layer to factorize"),
        (
            [*layers(form="stiefel"), "--optimizer", "sgd"],
            "sgd would leave the manifold of the layers: use riemannian-sgd",
        ),
        ([*layers(form="stiefel"), "--optimizer", "adamw"], "adamw would leave the manifold"),
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


@pytest.mark.parametrize("kind", SPECTRAL)
def test_inspect_a_model_of_the_zoo(kind):
    torch.manual_seed(0)
    status, output = invoke("inspect", "digitsnet", "--spectra", *layers(kind))
    assert status == 0
    for name in ("block1.0", "block2.0", "block3.0", "fc"):
        assert name in output
    assert output.count(kind) == 3
    assert "Z = " in output


@pytest.mark.parametrize(("kind", "size"), [("canonical", ("--rank", 8)), ("cp", ("--budget", 0.3))])
def test_inspect_other_kinds(kind, size):
    status, output = invoke("inspect", "digitsnet", "--spectra", "--factorize", kind, *size, "--skip", "block1,fc")
    assert status == 0, output
    assert output.count(kind) >= 2
    assert "Z = 100" not in output


def test_inspect_a_dense_model():
    status, output = invoke("inspect", "resnet20", "--spectra")
    assert status == 0
    assert "Z = 100.00 %" in output


@pytest.mark.parametrize("form", FORMS["svdp"])
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
