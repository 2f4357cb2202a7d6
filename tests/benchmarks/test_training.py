"""The training loop: what it computes, when its rates fall, and how it stops."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retract.benchmarks.data import load
from retract.benchmarks.training import SCHEDULES, DivergedError, Trainer, schedule_factor
from retract.nets.parametrizations import svdp
from retract.nets.parametrizations._charts import evaluate


@pytest.fixture(scope="module")
def data():
    return load("digits", subset=130)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def trainer(data, model=None, lr=0.1, **options):
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Trainer(model, optimizer, data, **{"epochs": 2, "batch_size": 32, "schedule": "constant", **options})


# -------------------------------------------------------------------------------------------------- schedules


def test_cosine_from_one_to_zero():
    factor = schedule_factor("cosine", 100)
    assert factor(0) == 1
    assert factor(50) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0)
    assert factor(25) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


def test_step_drops_where_the_paper_drops():
    """Epochs 60, 120 and 160 of 200, times 0.2 each."""
    factor = schedule_factor("step", 200)
    values = [factor(step) for step in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert values == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_warm_up_is_linear_and_then_the_schedule_begins(name):
    factor = schedule_factor(name, 110, warmup_steps=10)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert [factor(10 + step) for step in range(100)] == [schedule_factor(name, 100)(step) for step in range(100)]


@pytest.mark.parametrize(("name", "warmup", "message"), [("linear", 0, "schedule must"), ("cosine", 11, "0 to 10")])
def test_wrong_schedules(name, warmup, message):
    with pytest.raises(ValueError, match=message):
        schedule_factor(name, 10, warmup)


def test_every_group_follows_the_schedule_at_its_own_rate(data):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": 0.3}]
    loop = Trainer(model, torch.optim.SGD(groups, lr=0.1), data, epochs=2, batch_size=13, schedule="cosine", warmup=1)
    rates, records = [], []
    loop.fit(
        on_step=lambda it: rates.append([group["lr"] for group in it.optimizer.param_groups]),
        on_epoch=records.append,
    )
    factor = schedule_factor("cosine", 20, 10)
    expected = [[lr * factor(step + 1) for lr in (0.1, 0.3)] for step in range(20)]  # seen after the step
    assert rates == [pytest.approx(rate) for rate in expected]
    assert records[1]["learning_rates"] == pytest.approx([lr * factor(19) for lr in (0.1, 0.3)])


# ------------------------------------------------------------------------------------------------ the numbers


def test_it_is_plain_training(data):
    """The same losses as a loop written out, on the batches that the seed says."""
    loop = trainer(data, label_smoothing=0.1, seed=3)
    records = []
    loop.fit(on_epoch=records.append)

    model, generator = network(), torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = ((data.train_images.double() - data.mean[0]) / data.std[0]).float()
    test = ((data.test_images.double() - data.mean[0]) / data.std[0]).float()
    for record in records:
        model.train()
        losses, correct = [], 0
        order = torch.randperm(130, generator=generator)
        for batch in order[:128].split(32):
            logits = model(images[batch])
            loss = F.cross_entropy(logits, data.train_labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            correct += (logits.argmax(1) == data.train_labels[batch]).sum().item()
        model.eval()
        with torch.no_grad():
            logits = model(test)
        assert record["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
        assert record["train_accuracy"] == pytest.approx(correct / 128, abs=2 / 128)
        assert record["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-3)
        accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
        assert record["test_accuracy"] == pytest.approx(accuracy, abs=2 / 450)
    assert [record["step"] for record in records] == [4, 8]
    assert loop.evaluate() == (records[-1]["test_loss"], records[-1]["test_accuracy"])


def test_the_seed_decides_the_batches(data):
    states = []
    for seed in (0, 0, 1):
        loop = trainer(data, seed=seed, augment=True)
        loop.fit()
        states.append(loop.model[0].weight.detach().clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_it_learns(data):
    loop = trainer(load("digits"), epochs=3, schedule="cosine")
    loop.fit()
    assert loop.evaluate()[1] > 0.93


def test_evaluation_in_parts_is_evaluation_of_all(data, monkeypatch):
    loop = trainer(data)
    whole = loop.evaluate()
    monkeypatch.setattr("retract.benchmarks.training.EVAL_BATCH", 77)
    assert loop.evaluate() == pytest.approx(whole, rel=1e-6)


def test_a_batch_larger_than_the_data_is_all_of_them(data):
    loop = trainer(data, batch_size=1000, epochs=1)
    assert (loop.batch_size, loop.steps_per_epoch) == (130, 1)
    loop.fit()


def test_augmentation_mirrors_only_where_the_data_allow_it(data):
    """With a single image and all its crops and mirrors, the batches show which occur."""
    lopsided = data.train_images[:1].repeat(400, 1, 1, 1) * 0
    lopsided[:, :, 4, 1] = 255
    one = replace(data, train_images=lopsided, train_labels=data.train_labels[:1].repeat(400))
    for flip in (False, True):
        columns = set()

        class Spy(nn.Module):
            def __init__(self):
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(10))

            def forward(self, images):
                if self.training:
                    columns.update(images.flatten(1).argmax(1).remainder(8).tolist())  # noqa: B023 (used at once)
                return self.bias.expand(len(images), 10)

        trainer(replace(one, flip=flip), Spy(), augment=True, epochs=1, batch_size=400).fit()
        assert columns == ({0, 1, 2, 5, 6, 7} if flip else {0, 1, 2})


def test_bfloat16_forward_passes_are_close(data):
    plain, low = trainer(data, epochs=1), trainer(data, epochs=1, amp=True)
    for loop in (plain, low):
        loop.fit()
    assert low.model[0].weight.dtype == torch.float32
    difference = (plain.model[0].weight - low.model[0].weight).norm() / plain.model[0].weight.norm()
    assert 0 < difference < 0.05


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("lr", [1e30, float("inf")])
def test_divergence_stops_with_the_first_bad_step(data, lr):
    with pytest.raises(DivergedError, match=r"diverged at step 2 of epoch 1 .*the training loss is (nan|inf)"):
        trainer(data, lr=lr).fit()


def test_a_test_loss_that_is_not_finite_stops_too(data):
    class Shy(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1)) + (0 if self.training else math.inf)

    with pytest.raises(DivergedError, match=r"diverged at step 4 of epoch 1 .*the test loss is nan"):
        trainer(data, Shy(64, 10)).fit()


def test_an_optimizer_that_refuses_a_gradient_stops_too(data):
    class Refusing(torch.optim.SGD):
        def step(self, closure=None):
            raise FloatingPointError("gradient of w is not finite")

    model = network()
    loop = Trainer(model, Refusing(model.parameters(), lr=0.1), data, epochs=1, batch_size=32)
    with pytest.raises(DivergedError, match=r"diverged at step 1 of epoch 1 .*gradient of w is not finite"):
        loop.fit()


def test_the_test_images_are_looked_at_every_so_often_and_at_the_end(data):
    records = {}
    for test_every in (1, 2):
        records[test_every] = []
        trainer(data, epochs=3, test_every=test_every).fit(on_epoch=records[test_every].append)
    tested = [record["epoch"] for record in records[2] if "test_loss" in record]
    assert tested == [2, 3]
    for rare, often in zip(records[2], records[1], strict=True):
        assert (rare.keys() ^ often.keys()) <= {"test_loss", "test_accuracy"}
        assert all(often[key] == value for key, value in rare.items() if key != "seconds")


def test_frames_of_factored_layers_are_made_once_a_step(data, monkeypatch):
    """For all layers together, and once for all test images; no layer makes its own."""
    model, made = network(), []
    svdp(model[0], 4)
    svdp(model[4], 4)

    def count(charts, coordinates):
        made.append(len(charts))
        return evaluate(charts, coordinates)

    monkeypatch.setattr("retract.nets.parametrizations.models.evaluate", count)
    monkeypatch.delattr("retract.nets.parametrizations._base.evaluate")
    training = trainer(data, model, epochs=1)
    training.fit()
    assert made == [4] * (training.steps_per_epoch + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs, batch size and test_every must be at least 1, got 0, 32 and 1"),
        ({"batch_size": 0}, "epochs, batch size and test_every"),
        ({"test_every": 0}, "epochs, batch size and test_every"),
        ({"label_smoothing": 1.0}, "label smoothing"),
        ({"label_smoothing": math.nan}, "label smoothing"),
        ({"schedule": "wave"}, "schedule must be one of constant, cosine, step, got 'wave'"),
        ({"warmup": 3}, "warm-up"),
        ({"warmup": -1}, "warm-up"),
    ],
)
def test_wrong_options(data, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(data, **options)
