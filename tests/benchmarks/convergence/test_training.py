"""Cells of the convergence benchmark that train: what they return, how they stop, and what their starts share."""

import dataclasses
import statistics

import pytest
import torch

from retract.benchmarks.convergence import training as convergence_training
from retract.benchmarks.convergence.equivariance import STARTS, equivariance_cells, run_equivariance
from retract.benchmarks.convergence.methods import STOCHASTIC, Setting
from retract.benchmarks.convergence.networks import BASE, SIZED, sized_cnn
from retract.benchmarks.convergence.robustness import FACTORS, SCALES, map_cells
from retract.benchmarks.convergence.training import (
    Cell,
    Settings,
    begin,
    first_reaching,
    load_data,
    make_network,
    scale_weights_,
    train_cell,
)
from retract.benchmarks.convergence.transfer import transfer_cells
from retract.nets import CANONICAL_NORM, find_scale_invariant

SETTINGS = Settings("digits", None, 200, None, False, "digitsnet", 3, 64, "cosine", 0.0, "cpu", False)
CELL = Cell("training", "SGD", "digits", "digitsnet", 0.1, 0.1, 5e-4, 1.0, 0, "final", 3)
TUNED = {"SGD": Setting(0.1, 0.3, 5e-4), "PSISGD": Setting(0.1, 0.3, 0.0)}


def never():
    return False


def train(tmp_path, stopping=never, **changes):
    return train_cell(SETTINGS, tmp_path, dataclasses.replace(CELL, **changes), stopping)


def without_times(result):
    curves = {name: [point[:2] for point in points] for name, points in result["curves"].items()}
    return {**result, "curves": curves, "seconds": None}


# ------------------------------------------------------------------------------------------------------- training


def test_what_a_cell_returns(tmp_path):
    result = train(tmp_path)
    accuracies = [value for _, value, _ in result["curves"]["accuracy"]]
    seconds = [point[2] for point in result["curves"]["train_loss"]]
    assert [point[0] for point in result["curves"]["train_loss"]] == [1, 2, 3]
    assert (result["accuracy"], result["best_accuracy"]) == (accuracies[-1], max(accuracies))
    assert result["area"] == pytest.approx(statistics.mean(accuracies))
    assert (result["train_loss"], result["unseen_loss"]) == tuple(
        result["curves"][name][-1][1] for name in ("train_loss", "unseen_loss")
    )
    assert result["status"] == "finished" and result["reason"] is None
    assert seconds == sorted(seconds) and seconds[-1] == result["seconds"] > 0
    assert without_times(train(tmp_path)) == without_times(result)
    assert without_times(train(tmp_path, seed=1)) != without_times(result)
    assert list(tmp_path.iterdir()) == []


def test_looks_may_be_epochs_apart(tmp_path):
    """The curve of the accuracy has the looks alone, the last epoch among them, and is otherwise the same."""
    every = train(tmp_path)
    some = train_cell(dataclasses.replace(SETTINGS, test_every=2), tmp_path, CELL, lambda: False)
    assert [step for step, _, _ in some["curves"]["accuracy"]] == [2, 3]
    assert [point[:2] for point in some["curves"]["accuracy"]] == [p[:2] for p in every["curves"]["accuracy"][1:]]
    assert [point[:2] for point in some["curves"]["train_loss"]] == [p[:2] for p in every["curves"]["train_loss"]]
    assert (some["accuracy"], some["unseen_loss"]) == (every["accuracy"], every["unseen_loss"])
    assert some["area"] == pytest.approx(statistics.mean(value for _, value, _ in some["curves"]["accuracy"]))


def test_a_shorter_run_warms_up_for_the_same_part():
    """A run of one epoch that warmed up for the whole of it would tell nothing of its learning rate."""
    settings = dataclasses.replace(SETTINGS, subset=None, epochs=6, warmup=2.0)
    steps = {}
    for epochs in (6, 3, 1):
        trainer = begin(settings, dataclasses.replace(CELL, epochs=epochs))
        rates = [trainer.scheduler.lr_lambdas[0](step) for step in range(epochs * trainer.steps_per_epoch)]
        steps[epochs] = rates.index(max(rates)) / len(rates)
    assert steps == pytest.approx(dict.fromkeys(steps, 1 / 3), abs=0.05)


def test_tuning_never_sees_the_test_images():
    data = load_data(SETTINGS)
    tuning = begin(SETTINGS, dataclasses.replace(CELL, stage="tuning")).data
    assert len(tuning.test_labels) == 20 and len(tuning.train_labels) == 180
    together = torch.cat([tuning.train_images, tuning.test_images])
    assert torch.equal(
        together.flatten(1).double().sum(1).sort()[0], data.train_images.flatten(1).double().sum(1).sort()[0]
    )
    assert torch.equal(begin(SETTINGS, CELL).data.test_images, data.test_images)


def test_methods_of_a_seed_start_alike_and_see_the_same_batches():
    trainers = [begin(SETTINGS, dataclasses.replace(CELL, method=name)) for name in ("SGD", "PSIAngular", "Muon")]
    for trainer in trainers[1:]:
        assert torch.equal(trainer.order, trainers[0].order)
        assert torch.equal(trainer.model.fc.weight, trainers[0].model.fc.weight)
        cosines = torch.cosine_similarity(
            trainer.model.block2[0].weight.flatten(1), trainers[0].model.block2[0].weight.flatten(1)
        )
        torch.testing.assert_close(cosines, torch.ones_like(cosines))


@pytest.mark.parametrize(
    ("method", "lr", "reason"),
    [("SGD", 1e30, "training diverged at step"), ("PSIAngular", 2.0, r"lr must be in \[0, 1.5708\), got 2.0")],
)
def test_divergence_is_a_result(tmp_path, method, lr, reason):
    result = train(tmp_path, method=method, lr=lr, euclidean_lr=0.1)
    assert result["status"] == "diverged"
    assert [result[name] for name in ("accuracy", "best_accuracy", "area", "train_loss", "unseen_loss")] == [None] * 5
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(result["reason"])


def test_what_cannot_be_built_is_an_error_and_no_divergence(tmp_path):
    for model, message in (("mnist_convnet", "has none"), ("lenet6", "name must be one of cnn, width 8")):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, model=model)


def test_a_long_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    whole = train(tmp_path)
    monkeypatch.setattr(convergence_training, "CHECKPOINTED", 0)
    calls = []
    assert train(tmp_path, lambda: len(calls) == 4 or calls.append(1)) is None  # in the second epoch of three steps
    assert (tmp_path / "cells" / CELL.name / "checkpoint.pt").exists()
    steps = []
    assert without_times(train(tmp_path, lambda: bool(steps.append(1)))) == without_times(whole)
    assert len(steps) == 4  # it stopped after the fifth step of nine
    assert not (tmp_path / "cells" / CELL.name / "checkpoint.pt").exists()


def test_first_reaching():
    points = [(1, 0.2, 1.0), (2, None, 2.0), (3, 0.6, 3.0), (4, 0.5, 4.0), (5, 0.9, None)]
    assert first_reaching(points, 0.6) == (3, 3.0)
    assert first_reaching(points, 0.7) == (5, None)
    assert first_reaching(points, 0.95) is None and first_reaching([], 0.1) is None


# ----------------------------------------------------------------------------------------------------- robustness


def test_the_map_covers_six_decades_of_scales_and_four_of_rates():
    cells = map_cells(SETTINGS, TUNED, 2)
    assert len(set(cells)) == len(cells) == 2 * 2 * len(SCALES) * len(FACTORS)
    own = {(cell.start, cell.lr) for cell in cells if cell.method == "SGD"}
    assert {start for start, _ in own} == {10.0**power for power in range(-3, 4)}
    rates = sorted({lr for _, lr in own})
    assert rates[-1] / rates[0] == pytest.approx(1e4) and 0.1 in rates
    assert {(cell.euclidean_lr, cell.weight_decay, cell.epochs) for cell in cells} == {(0.3, 5e-4, 1), (0.3, 0.0, 1)}
    assert {cell.seed for cell in map_cells(SETTINGS, TUNED, 9)} == {0, 1, 2}


def test_a_scaled_start_is_the_same_function_and_only_manifolds_train_alike(tmp_path):
    model = make_network("digitsnet", load_data(SETTINGS)).double()
    images = load_data(SETTINGS).normalizer()(load_data(SETTINGS).train_images[:32]).double()
    before = model(images)
    norm = model.block1[0].weight.norm()
    scale_weights_(model, 100.0)
    torch.testing.assert_close(model.block1[0].weight.norm(), 100 * norm)
    torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-4)
    apart = {}
    for method in ("SGD", "PSISGD"):
        ends = [train(tmp_path, method=method, start=start)["train_loss"] for start in (1.0, 100.0)]
        apart[method] = abs(ends[0] - ends[1])
    assert apart["PSISGD"] < 1e-3 < 0.05 < apart["SGD"]


@pytest.mark.parametrize(
    ("method", "norm"), [("PSISGD", CANONICAL_NORM), ("PSIAngular", CANONICAL_NORM), ("unit norm", 1.0), ("SGD-G", 1.0)]
)
def test_methods_on_manifolds_begin_at_norms_of_their_own(method, norm):
    for start in (0.001, 1000.0):
        model = begin(SETTINGS, dataclasses.replace(CELL, method=method, start=start)).model
        for group in model.manifold_groups():
            for _, weight in group["params"] if "manifold" in group else ():
                torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.full((len(weight),), float(norm)))


@pytest.mark.parametrize("method", ["SGD", "PSISGD", "unit norm", "SGD-G", "geoopt RiemannianSGD (Sphere)"])
def test_a_scaled_start_is_evaluated_as_the_usual_one(method):
    """BatchNorm's statistics are those of the weights as they are, whatever the method made of their norms."""
    outputs = []
    for start in (1.0, 10.0, 1000.0):
        trainer = begin(SETTINGS, dataclasses.replace(CELL, method=method, start=start))
        images = trainer.data.normalizer()(trainer.data.test_images[:50])
        train_mode = trainer.model(images)
        trainer = begin(SETTINGS, dataclasses.replace(CELL, method=method, start=start))
        outputs.append(trainer.model.eval()(images))
        assert (outputs[-1] - train_mode).norm() < 0.5 * train_mode.norm()
    for other in outputs[1:]:
        assert (other - outputs[0]).norm() < 1e-2 * outputs[0].norm()


# ---------------------------------------------------------------------------------------------------- equivariance


@pytest.mark.parametrize(
    ("method", "equivariant"),
    [(name, True) for name in ("PSISGD", "PSISGD (paper)", "PSIAngular", "PSIAdam")]
    + [("SGD", False), ("Muon", False)],
)
def test_equivariance_to_the_bit_under_powers_of_two(method, equivariant):
    assert STOCHASTIC[method].equivariant == equivariant
    rates = STOCHASTIC[method]
    setting = Setting(rates.lrs[2], rates.euclidean_lrs[1], 0.0)
    powers, filters = equivariance_cells(SETTINGS, {method: setting})
    assert (powers.start, filters.start) == STARTS
    for cell, exact in ((powers, True), (filters, False)):
        result = run_equivariance(SETTINGS, dataclasses.replace(cell, steps=10), never)
        usual, rescaled = ([value for _, value in result["curves"][name]] for name in ("usual", "rescaled"))
        assert len(usual) == 10 and usual[0] == pytest.approx(rescaled[0], rel=1e-12)
        largest = max(abs(a - b) for a, b in zip(usual, rescaled, strict=True)) / usual[0]
        assert result["max_difference"] == pytest.approx(largest)
        assert result["equal"] == (equivariant and exact)
        assert result["max_difference"] < 1e-10 if equivariant else result["max_difference"] > 1e-3


def test_equivariance_of_a_run_that_diverges():
    (cell, _) = equivariance_cells(SETTINGS, {"SGD": Setting(1e300, 1e300, 0.0)})
    result = run_equivariance(SETTINGS, dataclasses.replace(cell, steps=5), never)
    assert result["status"] == "diverged" and not result["equal"]
    assert run_equivariance(SETTINGS, cell, lambda: True) is None


# -------------------------------------------------------------------------------------------------------- transfer


@pytest.mark.parametrize("name", [*SIZED])
def test_sized_networks_know_their_scale_invariant_weights(name):
    width, depth = SIZED[name]
    torch.manual_seed(0)
    model = sized_cnn(name)()
    inputs = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    measured = {key for key, found in find_scale_invariant(model, inputs).items() if found.manifold is not None}
    assert measured == set(model.manifolds()) and len(measured) == 2 * depth
    assert model(inputs).shape == (8, 10) and model.fc.in_features == 2 * width


def test_transfer_crosses_networks_with_all_rates():
    cells = transfer_cells(SETTINGS, TUNED, 5)
    assert len(set(cells)) == len(cells) == 2 * len(SIZED) * 6 * 3
    assert BASE in SIZED and len(SIZED) == 5
    assert {cell.lr for cell in cells if cell.method == "SGD"} == set(STOCHASTIC["SGD"].lrs)
