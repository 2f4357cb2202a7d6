"""What is measured while a GAN trains, and the pictures that it leaves in its run folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..run_writing import writing_to
from ..samples.classifier import FeatureClassifier, feature_classifier
from ..samples.inception import inception_metrics
from ..samples.metrics import evaluate_samples
from .experiment import GANConfig
from .samples import (
    BETWEEN,
    GRID,
    fixed_latents,
    generate,
    interpolated,
    picture,
    random_images,
    save_picture,
)
from .spectra import spectra
from .training import GANTrainer

__all__ = ["LATENTS", "SAMPLES", "Observer", "pictures", "remove_pictures"]

LATENTS, SAMPLES = "latents.pt", "samples"


class Observer:
    """Measures spectra for every record, and at some steps also makes pictures and compares samples with data.

    Pictures go to ``samples/step-0000100.png``, a grid of images of the same latent vectors each time, and
    ``samples/step-0000100-paths.png``, rows of images from one latent vector to another; ``latents.pt`` holds the
    vectors. ``samples/data.png`` is a grid of the data.

    Args:
        folder: of the run.
        data: the images. Those of one class have no classifier to compare by, and are compared by an Inception file
            alone.
        trainer: whose generator is looked at.
        config: of the run: how often there is a look at samples (the last step always has one), how many are compared
            with the data (0 for none), by which Inception file after the last step, and the seed of latent vectors.

    Raises:
        RunFolderError: the folder cannot be written.
    """

    def __init__(self, folder: Path, data: Dataset, trainer: GANTrainer, config: GANConfig) -> None:
        self.folder, self.data, self.latent, self.device = folder, data, trainer.latent, trainer.device
        self.samples_every, self.seed = config.samples_every, config.seed
        self.metric_samples, self.inception = config.metric_samples, config.inception
        self._latents = fixed_latents(trainer.latent, config.seed)
        with writing_to(folder):
            (folder / SAMPLES).mkdir(exist_ok=True)
            torch.save(self._latents, folder / LATENTS)
            save_picture(picture(_some(data), GRID), folder / SAMPLES / "data.png")

    def looks(self, trainer: GANTrainer) -> bool:
        """Whether samples are looked at after this step."""
        return trainer.step % self.samples_every == 0 or trainer.step == trainer.steps

    def measure(self, trainer: GANTrainer) -> dict[str, Any]:
        """The callback of `GANTrainer.fit`."""
        record = spectra(trainer.discriminator, self.data.image_shape)
        if self.looks(trainer):
            self._draw(trainer.sampler, trainer.step)
            if self.metric_samples:
                record |= self._compare(trainer.sampler, last=trainer.step == trainer.steps)
        return record

    def _compare(self, generator: nn.Module, *, last: bool) -> dict[str, Any]:
        samples = random_images(generator, self.latent, self.metric_samples, self.seed + 1)
        found = {}
        if len(self.data.classes) > 1:
            found["metrics"] = evaluate_samples(samples, self.data, classifier=self._classifier).as_dict()
        if last and self.inception is not None:
            found["inception"] = inception_metrics(samples.to(self.device), self.data, self.inception).as_dict()
        return found

    @cached_property
    def _classifier(self) -> FeatureClassifier:
        return feature_classifier(self.data, device=self.device)

    def _draw(self, generator: nn.Module, step: int) -> None:
        grid = picture(generate(generator, self._latents["grid"]), GRID)
        starts, ends = self._latents["ends"].unbind()
        between = interpolated(starts, ends, BETWEEN)
        paths = picture(generate(generator, between.flatten(0, 1)), BETWEEN)
        with writing_to(self.folder):
            save_picture(grid, self.folder / SAMPLES / f"step-{step:07d}.png")
            save_picture(paths, self.folder / SAMPLES / f"step-{step:07d}-paths.png")


def pictures(folder: Path) -> list[Path]:
    """The grids of samples in a run folder, from the first step to the last; those of interpolations end in -paths."""
    return sorted(path for path in (folder / SAMPLES).glob("step-*.png") if not path.stem.endswith("-paths"))


def remove_pictures(folder: Path) -> None:
    """Remove the pictures of a run that a new one replaces."""
    for path in (folder / SAMPLES).glob("step-*.png"):
        path.unlink()


def _some(data: Dataset) -> Tensor:
    """Training images from all over the set, which may be sorted by class."""
    spread = max(1, len(data.train_images) // GRID**2)
    return data.train_images[::spread][: GRID**2]
