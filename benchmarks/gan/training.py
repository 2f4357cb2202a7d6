"""The training loop of `retract gan` and `retract bench gan`: a generator against a discriminator."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retract.nets.parametrizations.models import shared_frames

from ..run_writing import writing_to
from ..runs import Interrupted, Run, stop_on_signal
from ..training import NOT_FINITE, DivergedError
from .average import averaged
from .images import ImageStream
from .losses import LOSSES, gradient_penalty
from .optimizers import MANIFOLD_LR, NetworkOptimizer

__all__ = ["FIGURES", "GANTrainer"]

Penalty = Callable[[nn.Module], Tensor]

_POSITION = ("step", "interval", "seconds")
# Means over the steps since the last record. Penalties are included in the losses.
FIGURES = ("discriminator_loss", "real_score", "generated_score", "gradient_penalty", "generator_loss")


class GANTrainer:
    """Trains a generator and a discriminator, and can be saved and restored between any two steps.

    A step is ``discriminator_steps`` steps of the discriminator, each with a batch of images and of generated ones, and
    one of the generator. Images come in random order, anew for each pass over them; the last, incomplete batch of a
    pass is left out. The scores of real and generated images come from one forward pass, so the discriminator
    should treat the images of a batch apart from one another: no BatchNorm. All that decides the next step
    is in ``state_dict()``: a run that is restored goes on to the bit as one that never stopped.

    Args:
        generator: from standard normal latent vectors (N, ``generator.latent``) to images (N, C, H, W) in [-1, 1].
        discriminator: from such images to scores (N,).
        images: to learn, uint8 of shape (M, C, H, W); 0 becomes -1 and 255 becomes 1.
        steps: steps of the generator.
        loss: of `LOSSES`.
        discriminator_steps: a step of the generator.
        lr: learning rate of Adam.
        manifold_lr: learning rate of weights on manifolds (`NetworkOptimizer`).
        betas: of Adam.
        schedule: of the learning rates, over the steps: of `.optimizers.SCHEDULES`.
        batch_size: images a step, and as many generated ones; more than there are means all of them.
        ema: decay of the moving average of the generator that makes the samples; None for the generator itself.
        r1: gamma of the penalty R1 on real images, gamma times `gradient_penalty`, at each step of the discriminator.
        discriminator_penalty: of the network, added to its loss, as `retract.nets.gan.Constraint.penalty` is.
        generator_penalty: likewise.
        seed: of the order of the images and of the latent vectors.
        device: "cpu", "cuda", ...
        amp: compute the networks in bfloat16 where torch deems that safe.
        log_every: steps from one record of metrics, and one checkpoint, to the next; the last step always has both.

    Raises:
        ValueError: an argument out of range, images that are not uint8 or whose shape the generator does not
            produce, or an average of a generator in Stiefel form.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        images: Tensor,
        *,
        steps: int,
        loss: str = "hinge",
        discriminator_steps: int = 5,
        lr: float = 2e-4,
        manifold_lr: float = MANIFOLD_LR,
        betas: tuple[float, float] = (0.0, 0.9),
        schedule: str = "linear",
        batch_size: int = 64,
        ema: float | None = 0.999,
        r1: float = 0.0,
        discriminator_penalty: Penalty | None = None,
        generator_penalty: Penalty | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        amp: bool = False,
        log_every: int = 100,
    ) -> None:
        counts = {"steps": steps, "discriminator_steps": discriminator_steps, "log_every": log_every}
        for name, count in {**counts, "batch_size": batch_size}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if not 0 <= r1 < math.inf:
            raise ValueError(f"r1 must be finite and at least 0, got {r1}")
        self.device = torch.device(device)
        self.generator, self.discriminator = generator.to(self.device), discriminator.to(self.device)
        self.average = None if ema is None else averaged(self.generator, ema)
        self.latent = int(generator.latent)  # type: ignore[arg-type]  # of the zoo's generators, and yours
        self.random = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
        self.images = ImageStream(images, batch_size, self.random, self.device)
        _check_shape(images, self.sampler, self.latent)
        self.steps, self.discriminator_steps, self.log_every = steps, discriminator_steps, log_every
        self.r1, self.amp = r1, amp
        self._loss = LOSSES[loss]
        self._discriminator_penalty, self._generator_penalty = discriminator_penalty, generator_penalty
        build = partial(NetworkOptimizer, lr=lr, manifold_lr=manifold_lr, betas=betas, schedule=schedule, steps=steps)
        self.optimizers = (build(self.discriminator), build(self.generator))
        self._trained = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]

        self.step = 0  # finished steps
        self._begin_interval()

    @property
    def sampler(self) -> nn.Module:
        """The network that samples are made with: the averaged generator if there is one."""
        return self.generator if self.average is None else self.average.module

    def _begin_interval(self) -> None:
        self.interval, self.seconds = 0, 0.0  # steps since the last record, and what they took
        self.totals = torch.zeros(len(FIGURES), device=self.device)

    # ---------------------------------------------------------------------------------------------- training

    def fit(
        self,
        run: Run | None = None,
        *,
        measure: Callable[[GANTrainer], dict[str, Any]] = lambda trainer: {},
        on_step: Callable[[GANTrainer], None] = lambda trainer: None,
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        """Train to the end, writing metrics and a checkpoint to ``run`` every ``log_every`` steps.

        Ctrl-C or SIGTERM finish the step under way, write a checkpoint, and raise `Interrupted`.

        Args:
            run: the run folder.
            measure: called before each record is written; what it returns is added to the record. It must leave
                the trainer, and torch's random numbers, as they are.
            on_step: called after each step.
            on_record: called with each record once it and its checkpoint are on disk.

        Raises:
            DivergedError: a loss is no longer finite. Metrics then end with a record of it; the checkpoint is older.
            RunFolderError: the folder cannot be written. The last checkpoint is whole.
        """
        with stop_on_signal() as stop:
            try:
                while self.step < self.steps:
                    self.train_step()
                    on_step(self)
                    if self.step % self.log_every == 0 or self.step == self.steps:
                        on_record(self._finish_interval(run, measure))
                    stop.check()
            except Interrupted:
                self._save(run)
                raise
            except DivergedError as error:
                if run is not None:
                    with writing_to(run.folder):
                        run.log({"step": self.step, "diverged": str(error)})
                raise

    def train_step(self) -> None:
        """Take one step: ``discriminator_steps`` of the discriminator, one of the generator."""
        start = time.perf_counter()
        self.generator.train()
        self.discriminator.train()
        try:
            for _ in range(self.discriminator_steps):
                self._step_discriminator()
            self._step_generator()
        except NOT_FINITE as error:
            raise self._diverged(str(error)) from error
        if self.average is not None:
            self.average.update_parameters(self.generator)
        for optimizer in self.optimizers:
            optimizer.advance()
        self.step += 1
        self.interval += 1
        self.seconds += time.perf_counter() - start

    def _step_discriminator(self) -> None:
        real = self.images.next().requires_grad_(self.r1 > 0)
        with torch.no_grad(), self._forward(self.generator):
            generated = self.generator(self._latents())
        with self._forward(self.discriminator):
            scores = self.discriminator(torch.cat((real, generated.float())))
        real_scores, generated_scores = scores.float().chunk(2)
        penalty = gradient_penalty(real_scores, real) if self.r1 else real_scores.new_zeros(())
        loss = self._loss.discriminator(real_scores, generated_scores) + self.r1 * penalty
        if self._discriminator_penalty is not None:
            loss = loss + self._discriminator_penalty(self.discriminator)
        self.optimizers[0].minimise(loss)
        figures = torch.stack((loss, real_scores.mean(), generated_scores.mean(), penalty)).detach()
        self.totals[:4] += figures / self.discriminator_steps

    def _step_generator(self) -> None:
        for parameter in self._trained:  # the gradients of the discriminator are not wanted, and cost as much again
            parameter.requires_grad_(False)
        with self._forward(self.generator):
            generated = self.generator(self._latents())
        with self._forward(self.discriminator):
            scores = self.discriminator(generated.float())
        loss = self._loss.generator(scores.float())
        if self._generator_penalty is not None:
            loss = loss + self._generator_penalty(self.generator)
        self.optimizers[1].minimise(loss)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self.totals[4] += loss.detach()

    def _latents(self) -> Tensor:
        latents = torch.randn(self.images.batch_size, self.latent, generator=self.random)
        return latents.to(self.device, non_blocking=True)

    @contextmanager
    def _forward(self, network: nn.Module) -> Iterator[None]:
        with shared_frames(network), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            yield

    # --------------------------------------------------------------------------------------------- recording

    def _finish_interval(self, run: Run | None, measure: Callable[[GANTrainer], dict[str, Any]]) -> dict[str, Any]:
        means = dict(zip(FIGURES, (self.totals.double() / self.interval).tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            raise self._diverged(", ".join(f"{name} is {value:g}" for name, value in means.items()))
        try:
            measured = measure(self)
        except NOT_FINITE as error:
            raise self._diverged(str(error)) from error
        record = {"step": self.step, **means, **measured, "seconds": round(self.seconds, 3)}
        self._begin_interval()
        if run is not None:
            with writing_to(run.folder):
                run.log(record)
        self._save(run)
        return record

    def _save(self, run: Run | None) -> None:
        if run is not None:
            with writing_to(run.folder):
                run.save_checkpoint(self.state_dict())

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(f"training diverged by step {self.step}: {what}. Lower the learning rates")

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "position": {key: getattr(self, key) for key in _POSITION},
            "images": self.images.state_dict(),
            "totals": self.totals,
            "random": self.random.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a trainer that was built the same way.

        Raises:
            ValueError: it was trained on other images.
        """
        self.images.load_state_dict(state["images"])
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for key in _POSITION:
            setattr(self, key, state["position"][key])
        self.totals = state["totals"].to(self.device)
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


@torch.no_grad()
def _check_shape(images: Tensor, generator: nn.Module, latent: int) -> None:
    mode, parameter = generator.training, next(generator.parameters())
    made = tuple(generator.eval()(parameter.new_zeros(1, latent)).shape[1:])
    generator.train(mode)
    if made != tuple(images.shape[1:]):
        raise ValueError(f"images must have shape {made}, which the generator makes, got {tuple(images.shape[1:])}")
