"""The training loop of `retract train` and of the benchmarks: whole data sets as tensors, on the CPU or on a
GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from retract.nets.parametrizations import shared_frames

from .data import Dataset, pad_crop_flip
from .runs import Interrupted, Run, Stop, stop_on_signal

__all__ = ["SCHEDULES", "DivergedError", "Trainer", "schedule_factor"]

EVAL_BATCH = 1000
# What optimizers raise that look at their gradients, and linear algebra.
NOT_FINITE = (FloatingPointError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # not in torch's __all__
STEPS_BETWEEN_CHECKS = 50  # looking at a loss waits for the GPU

# Factor of the learning rate at a fraction of the steps after the warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Times 0.2 at 30, 60 and 80 % of the run [Yi22, section 6: epochs 60, 120 and 160 of 200].
    "step": lambda progress: 0.2 ** sum(progress >= drop for drop in (0.3, 0.6, 0.8)),
}


def schedule_factor(name: str, total_steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """The factor of the learning rate at each step: linear from 1/warmup_steps to 1, then as
    ``SCHEDULES[name]``.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warm-up must be 0 to {total_steps} steps (the whole run), got {warmup_steps}")
    curve = SCHEDULES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return curve((step - warmup_steps) / max(1, total_steps - warmup_steps))

    return factor


class DivergedError(ValueError):
    """The loss became NaN or infinite, or an optimizer met a gradient that is."""


class Trainer:
    """Trains a classifier on a :class:`Dataset`, and can be saved and restored between any two steps.

    Every epoch draws a permutation of the training images from a generator of its own; the last, incomplete
    batch is left out. All that decides the next step is in ``state_dict()``.

    Args:
        model: from normalized float images (N, C, H, W) to logits (N, classes).
        optimizer: of ``model``'s parameters; its learning rates at construction are the highest of the
            schedule.
        data: the data set.
        epochs: how long to train.
        batch_size: images a step; more than there are means all of them.
        schedule: "constant", "cosine" or "step".
        warmup: epochs (a fraction may be) of linear warm-up.
        label_smoothing: of the training loss.
        augment: random shifts by up to an eighth of the height, and mirroring where ``data.flip`` says so.
        seed: of the order of the images and of the augmentation.
        device: "cpu", "cuda", ...
        amp: compute the forward pass in bfloat16 where torch deems that safe.
        test_every: epochs from one look at the test images to the next; the last epoch always has one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Dataset,
        *,
        epochs: int,
        batch_size: int,
        schedule: str = "cosine",
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
        augment: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
        amp: bool = False,
        test_every: int = 1,
    ) -> None:
        if min(epochs, batch_size, test_every) < 1:
            given = f"{epochs}, {batch_size} and {test_every}"
            raise ValueError(f"epochs, batch size and test_every must be at least 1, got {given}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label smoothing must be in [0, 1), got {label_smoothing}")
        self.device = torch.device(device)
        self.model, self.optimizer, self.data = model.to(self.device), optimizer, data
        self.epochs, self.test_every = epochs, test_every
        self.batch_size = min(batch_size, len(data.train_labels))
        self.label_smoothing, self.augment, self.amp = label_smoothing, augment, amp

        self.steps_per_epoch = len(data.train_labels) // self.batch_size
        warmup_steps = round(warmup * self.steps_per_epoch)
        self._factor = schedule_factor(schedule, epochs * self.steps_per_epoch, warmup_steps)
        self.scheduler = LambdaLR(optimizer, self._factor)
        self._train = (data.train_images.to(self.device), data.train_labels.to(self.device))
        self._test = (data.test_images.to(self.device), data.test_labels.to(self.device))
        self._normalize = data.normalizer(self.device)
        self._fingerprint = data.fingerprint

        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self.seconds = 0.0  # spent on the steps of the epoch under way
        self.generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.order = torch.randperm(len(self.data.train_labels), generator=self.generator).to(self.device)
        self.losses = torch.zeros(self.steps_per_epoch, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)

    # ---------------------------------------------------------------------------------------------- training

    def fit(
        self,
        run: Run | None = None,
        *,
        on_step: Callable[[Trainer], None] = lambda trainer: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        """Train to the end, writing metrics and a checkpoint to ``run`` after every epoch.

        Ctrl-C or SIGTERM finish the step under way, write a checkpoint, and raise :class:`Interrupted`.

        Raises:
            DivergedError: the training or the test loss is no longer finite.
        """
        with stop_on_signal() as stop:
            try:
                while self.epoch < self.epochs:
                    self._train_epoch(stop, on_step)
                    record = self._finish_epoch(stop)
                    if run is not None:
                        run.log(record)
                        run.save_checkpoint(self.state_dict())
                    on_epoch(record)
            except Interrupted:
                if run is not None:
                    run.save_checkpoint(self.state_dict())
                raise

    def _train_epoch(self, stop: Stop, on_step: Callable[[Trainer], None]) -> None:
        self.model.train()
        while self.step < self.steps_per_epoch:
            start = time.perf_counter()
            self._train_step()
            self.seconds += time.perf_counter() - start
            if self.step % STEPS_BETWEEN_CHECKS == 0 or self.step == self.steps_per_epoch:
                self._require_finite()
            on_step(self)
            stop.check()

    def _train_step(self) -> None:
        batch = self.order[self.step * self.batch_size : (self.step + 1) * self.batch_size]
        images, labels = (tensor[batch] for tensor in self._train)
        if self.augment:
            padding = max(1, images.shape[2] // 8)
            images = pad_crop_flip(images, padding=padding, flip=self.data.flip, generator=self.generator)
        self.optimizer.zero_grad()
        with shared_frames(self.model), self._autocast():
            logits = self._logits(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        loss.backward()
        self.losses[self.step] = loss.detach()
        self.correct += (logits.argmax(1) == labels).sum()
        self.step += 1
        try:
            self.optimizer.step()
        except NOT_FINITE as error:
            raise self._diverged(self.step, str(error)) from error
        self.scheduler.step()

    def _logits(self, images: Tensor) -> Tensor:
        inputs = self._normalize(images)
        if self.device.type == "cpu":  # convolutions run 1.2 to 1.4 times as fast
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.model(inputs)
        return logits

    def _finish_epoch(self, stop: Stop) -> dict[str, Any]:
        last_step = (self.epoch + 1) * self.steps_per_epoch - 1
        record = {
            "epoch": self.epoch + 1,
            "step": last_step + 1,
            "train_loss": self.losses.double().mean().item(),
            "train_accuracy": self.correct.item() / (self.steps_per_epoch * self.batch_size),
            **self._test_results(stop),
            "learning_rates": [rate * self._factor(last_step) for rate in self.scheduler.base_lrs],
            "seconds": round(self.seconds, 3),
        }
        self.epoch += 1
        self._begin_epoch()
        return record

    def _test_results(self, stop: Stop) -> dict[str, float]:
        """Loss and accuracy on the test images; nothing after an epoch that is not to be tested."""
        finished = self.epoch + 1
        if finished % self.test_every and finished < self.epochs:
            return {}
        loss, accuracy = self.evaluate(stop)
        if not math.isfinite(loss):
            raise self._diverged(self.step, f"the test loss is {loss}")
        return {"test_loss": loss, "test_accuracy": accuracy}

    def _require_finite(self) -> None:
        finite = self.losses[: self.step].isfinite()
        if not finite.all():
            step = int((~finite).nonzero()[0]) + 1
            raise self._diverged(step, f"the training loss is {self.losses[step - 1].item()}")

    def _diverged(self, step: int, what: str) -> DivergedError:
        rates = ", ".join(f"{group['lr']:.3g}" for group in self.optimizer.param_groups)
        return DivergedError(
            f"training diverged at step {step} of epoch {self.epoch + 1} (learning rates {rates}): {what}. "
            "Lower the learning rates, or warm up for longer"
        )

    # -------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, stop: Stop | None = None) -> tuple[float, float]:
        """Mean cross entropy and accuracy on the test images, in eval mode."""
        self.model.eval()
        images, labels = self._test
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        with shared_frames(self.model):
            for batch, target in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
                with self._autocast():
                    logits = self._logits(batch)
                loss += F.cross_entropy(logits.float(), target, reduction="sum")
                correct += (logits.argmax(1) == target).sum()
                if stop is not None:
                    stop.check()
        return loss.item() / len(labels), correct.item() / len(labels)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "position": {"epoch": self.epoch, "step": self.step, "seconds": self.seconds},
            "epoch": {"order": self.order, "losses": self.losses, "correct": self.correct},
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": self._cuda_rng(),
            "data": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a trainer that was built the same way.

        Raises:
            ValueError: it was trained on other data.
        """
        if state["data"] != self._fingerprint:
            fingerprints = f"fingerprint {self._fingerprint}, expected {state['data']}"
            raise ValueError(f"the data are not those of the checkpoint: {fingerprints}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step, self.seconds = (state["position"][key] for key in ("epoch", "step", "seconds"))
        self.order, self.losses, self.correct = (
            state["epoch"][key].to(self.device) for key in ("order", "losses", "correct")
        )
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _cuda_rng(self) -> Tensor | None:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
