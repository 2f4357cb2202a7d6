"""The GAN training loop: its steps by hand, resuming to the bit, divergence and full disks."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retract.benchmarks.data import load
from retract.benchmarks.gan.training import GANTrainer
from retract.benchmarks.run_writing import RunFolderError
from retract.benchmarks.runs import Interrupted, Run
from retract.benchmarks.training import DivergedError
from retract.nets.gan.constraints import CONSTRAINTS, constrain
from retract.nets.gan.networks import gan_pair
from retract.nets.gan.spectra import spectrum_violation

STEPS = 5


@pytest.fixture(scope="module")
def images():
    return load("digits", subset=100).train_images


def trainer_for(images, constraint="svdp-l", form="householder", generator_constraint="none", **options):
    torch.manual_seed(0)
    generator, discriminator = gan_pair("digits", width=4, generator_width=4)
    constrain(discriminator, constraint, form=form)
    constrain(generator, generator_constraint)
    penalties = {"discriminator_penalty": CONSTRAINTS[constraint].penalty} if CONSTRAINTS[constraint].penalized else {}
    if CONSTRAINTS[generator_constraint].penalized:
        penalties["generator_penalty"] = CONSTRAINTS[generator_constraint].penalty
    chosen = {"steps": STEPS, "discriminator_steps": 2, "batch_size": 16, "log_every": 2, "ema": 0.5, **options}
    return GANTrainer(generator, discriminator, images, **penalties, **chosen)


def resumed(images, run, *arguments, **options):
    """A new trainer, whose random numbers have gone elsewhere meanwhile, and its run."""
    trainer, run = trainer_for(images, *arguments, **options), Run.open(run.folder)
    if (state := run.load_checkpoint()) is not None:
        torch.manual_seed(12345)
        trainer.load_state_dict(state)
    return trainer, run


def leaves(tree, path="state"):
    """{path: leaf} of nested dicts and lists; times aside."""
    if isinstance(tree, dict):
        pairs = [(key, value) for key, value in tree.items() if key != "seconds"]
    elif isinstance(tree, list | tuple):
        pairs = list(enumerate(tree))
    else:
        return {path: tree}
    return {name: leaf for key, value in pairs for name, leaf in leaves(value, f"{path}.{key}").items()}


def assert_same(a, b):
    """Equal to the bit."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        same = torch.equal(leaf, b[path]) if isinstance(leaf, torch.Tensor) else leaf == b[path]
        assert same, path


def interrupt_at(step):
    def on_step(trainer):
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


# --------------------------------------------------------------------------------------------------- its steps


def by_hand(images, *, loss, gamma, steps):
    """The same training in plain torch: separate passes, Adam, an average, a linear decay; one order of images."""
    torch.manual_seed(0)
    generator, discriminator = gan_pair("digits", width=4, generator_width=4)
    random = torch.Generator().manual_seed(3)
    order = iter(torch.randperm(len(images), generator=random).split(16))
    adams = [torch.optim.Adam(network.parameters(), 0.01, (0.0, 0.9)) for network in (discriminator, generator)]
    average = None

    def minimise(adam, value, factor):
        adam.param_groups[0]["lr"] = 0.01 * factor
        discriminator.zero_grad()
        generator.zero_grad()
        value.backward()
        adam.step()

    for step in range(steps):
        factor = 1 - step / STEPS
        for _ in range(2):
            real = (images[next(order)].float() / 127.5 - 1).requires_grad_()
            fake = generator(torch.randn(16, 16, generator=random)).detach()
            a, b = discriminator(real), discriminator(fake)
            if loss == "hinge":
                value = (1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean()
            else:
                value = -F.logsigmoid(a).mean() - F.logsigmoid(-b).mean()
            slopes = torch.autograd.grad(a.sum(), real, create_graph=True)[0]
            minimise(adams[0], value + gamma / 2 * slopes.pow(2).sum((1, 2, 3)).mean(), factor)
        scores = discriminator(generator(torch.randn(16, 16, generator=random)))
        minimise(adams[1], -scores.mean() if loss == "hinge" else -F.logsigmoid(scores).mean(), factor)
        state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
        average = state if average is None else {name: (average[name] + state[name]) / 2 for name in state}
    return generator, discriminator, average


@pytest.mark.parametrize(("loss", "gamma"), [("hinge", 0.0), ("non-saturating", 2.0)])
def test_steps_are_those_taken_by_hand(images, loss, gamma):
    trainer = trainer_for(images, "none", loss=loss, r1=gamma, lr=0.01, seed=3)
    for _ in range(3):
        trainer.train_step()
    generator, discriminator, average = by_hand(images, loss=loss, gamma=gamma, steps=3)
    for ours, theirs in ((trainer.generator, generator), (trainer.discriminator, discriminator)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)  # Adam magnifies rounding
    for name, tensor in trainer.sampler.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, average[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_record_holds_means_over_its_steps(images):
    records = []
    trainer = trainer_for(images, "none", log_every=4, lr=1e-9)  # nothing moves
    trainer.fit(on_record=records.append, measure=lambda trainer: {"steps": trainer.steps})
    assert [record["step"] for record in records] == [4, 5]
    assert all(record["steps"] == STEPS for record in records)
    whole = images.float() / 127.5 - 1
    with torch.no_grad():
        assert records[0]["real_score"] == pytest.approx(trainer.discriminator(whole).mean().item(), abs=0.02)
    for record in records:
        a, b = record["real_score"], record["generated_score"]
        assert record["discriminator_loss"] == pytest.approx(2 - a + b, abs=1e-4)  # scores within the hinge
        assert record["generator_loss"] == pytest.approx(-b, abs=0.05)
        assert record["gradient_penalty"] == 0


def test_without_an_average_the_generator_makes_the_samples(images):
    trainer = trainer_for(images, ema=None)
    trainer.train_step()
    assert trainer.sampler is trainer.generator


@pytest.mark.parametrize("form", ["householder", "stiefel"])
def test_training_stays_in_the_constraint_and_moves_every_weight(images, form):
    trainer = trainer_for(images, "svdp-l", form, manifold_lr=0.1)
    before = [parameter.detach().clone() for parameter in trainer.discriminator.parameters()]
    trainer.fit()
    assert spectrum_violation(trainer.discriminator) < 1e-5
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.discriminator.parameters(), strict=True)]
    # Of a weight with one row the left frame is a sign, and its only singular value is 1.
    assert all(m for m, a in zip(moved, before, strict=True) if a.numel() > 1)


def test_frozen_weights_stay_frozen(images):
    trainer = trainer_for(images, "none")
    frozen, *_ = trainer.discriminator.parameters()
    frozen.requires_grad_(False)
    again = GANTrainer(trainer.generator, trainer.discriminator, images, steps=1, batch_size=16, discriminator_steps=1)
    before = frozen.clone()
    again.train_step()
    assert torch.equal(frozen, before)
    assert [p.requires_grad for p in trainer.discriminator.parameters()][:2] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"loss": "wgan"}, "loss must be one of hinge, non-saturating, got 'wgan'"),
        ({"schedule": "cosine"}, "schedule must be one of linear, constant, got 'cosine'"),
        ({"r1": float("nan")}, "r1 must be finite and at least 0, got nan"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"manifold_lr": -1.0}, "manifold_lr must be positive and finite, got -1.0"),
        ({"betas": (0.0, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.0, 1.0\)"),
    ],
)
def test_arguments_out_of_range(images, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(images, "none", **options)


def test_images_that_do_not_fit(images):
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(N, C, H, W\), at least one, got torch.float32"):
        trainer_for(images.float())
    with pytest.raises(ValueError, match=r"images must have shape \(1, 8, 8\), which the generator makes"):
        trainer_for(images.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"at least one, got torch\.uint8 of"):
        trainer_for(images[:0])


def test_no_average_of_frames(images):
    generator, discriminator = gan_pair("digits", width=4, generator_width=4)
    constrain(generator, "svdp-c", form="stiefel")
    with pytest.raises(ValueError, match="ema must be None for a generator in Stiefel form"):
        GANTrainer(generator, discriminator, images, steps=1)
    GANTrainer(generator, discriminator, images, steps=1, ema=None, batch_size=16).train_step()


# ------------------------------------------------------------------------------------------ resume to the bit


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("none",), {"r1": 1.0, "loss": "non-saturating"}),
        (("sn",), {"amp": True}),
        (("sr",), {"ema": None}),
        (("sttp-r", "householder", "svdp-r"), {}),
        (("svdp-l", "stiefel"), {"betas": (0.5, 0.9)}),
        (("lipschitz-operator",), {"batch_size": 64}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "defaults",
)
def test_interrupted_after_a_step(images, tmp_path, arguments, options):
    """Within an interval, where a pass over the images ends too."""
    whole = Run.create(tmp_path / "whole", {})
    uninterrupted = trainer_for(images, *arguments, **options)
    uninterrupted.fit(whole)
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(Interrupted):
        trainer_for(images, *arguments, **options).fit(run, on_step=interrupt_at(3))
    trainer, run = resumed(images, run, *arguments, **options)
    assert trainer.step == 3
    trainer.fit(run)
    assert_same(trainer.state_dict(), uninterrupted.state_dict())
    assert_same(run.metrics(), whole.metrics())


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("moment", ["first step", "before the line", "after the line", "saving"])
def test_power_cut(images, tmp_path, monkeypatch, moment):
    """Nothing is saved at the cut itself: the run goes back to its last checkpoint, its metrics too."""

    def cut(*arguments):
        raise PowerCutError

    targets = {
        "before the line": (Run, "log"),
        "after the line": (Run, "save_checkpoint"),
        "saving": (os, "replace"),
    }
    uninterrupted = trainer_for(images)
    uninterrupted.fit(whole := Run.create(tmp_path / "whole", {}))
    run = Run.create(tmp_path / "run", {})
    with monkeypatch.context() as patched:
        callbacks = {"on_record": lambda record: patched.setattr(*targets[moment], cut)}
        if moment == "first step":
            callbacks = {"on_step": cut}
        with pytest.raises(PowerCutError):
            trainer_for(images).fit(run, **callbacks)
    trainer, run = resumed(images, run)
    assert trainer.step == (0 if moment == "first step" else 2)
    trainer.fit(run)
    assert_same(trainer.state_dict(), uninterrupted.state_dict())
    assert_same(run.metrics(), whole.metrics())


def test_other_images_are_refused(images, tmp_path):
    run = Run.create(tmp_path / "run", {})
    trainer_for(images, steps=1).fit(run)
    with pytest.raises(ValueError, match="the images are not those of the checkpoint: fingerprint"):
        resumed(images.flip(0), run, steps=1)


# ------------------------------------------------------------------------------------- divergence, full disks


@pytest.mark.parametrize("broken", ["generator", "discriminator"])
def test_divergence_ends_the_run_and_leaves_its_checkpoint(images, tmp_path, broken):
    run = Run.create(tmp_path / "run", {})

    def spoil(trainer):
        if trainer.step == 3:
            nn.init.constant_(next(getattr(trainer, broken).parameters()), float("nan"))

    with pytest.raises(DivergedError, match="training diverged by step 4: discriminator_loss is nan"):
        trainer_for(images, "none").fit(run, on_step=spoil)
    *_, last, end = run.metrics()
    assert last["step"] == 2
    assert end["step"] == 4 and "discriminator_loss is nan" in end["diverged"]
    trainer, run = resumed(images, run, "none")
    assert trainer.step == 2
    trainer.fit(run)
    assert [record["step"] for record in run.metrics()] == [2, 4, 5]


def test_a_measure_that_meets_nan_is_divergence(images):
    def measure(trainer):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    with pytest.raises(DivergedError, match="by step 2: the algorithm failed to converge"):
        trainer_for(images).fit(measure=measure)


@contextmanager
def full_disk(bytes_left):
    """No file grows beyond so many bytes: writes fail as on a full disk, in the kernel."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("bytes_left", [10, 4000], ids=["metrics", "checkpoint"])
def test_a_full_disk(images, tmp_path, bytes_left):
    uninterrupted = trainer_for(images)
    uninterrupted.fit(whole := Run.create(tmp_path / "whole", {}))
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(Interrupted):
        trainer_for(images).fit(run, on_step=interrupt_at(2))
    before = (run.folder / "checkpoint.pt").read_bytes()
    assert len(before) > 4000
    trainer, run = resumed(images, run)
    with full_disk(bytes_left), pytest.raises(RunFolderError, match=r"run cannot be written: .*\. Its last checkpoint"):
        trainer.fit(run)
    assert (run.folder / "checkpoint.pt").read_bytes() == before
    assert not list(run.folder.glob("*.part"))
    trainer, run = resumed(images, run)
    trainer.fit(run)
    assert_same(trainer.state_dict(), uninterrupted.state_dict())
    assert_same(run.metrics(), whole.metrics())


def test_a_folder_that_is_gone(images, tmp_path):
    run = Run.create(tmp_path / "run", {})
    (run.folder / "config.json").unlink()
    run.folder.rmdir()
    with pytest.raises(RunFolderError, match="run cannot be written: "):
        trainer_for(images).fit(run)
