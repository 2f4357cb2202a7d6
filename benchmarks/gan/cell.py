"""One training run of `retract bench gan`: a GAN whose discriminator is under one constraint."""

from __future__ import annotations

import signal
import statistics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from retract.nets.gan.constraints import CONSTRAINTS
from retract.nets.summary import summary

from ..cells import TrainingCell, open_cell
from ..data import Dataset
from ..grid import Stopping
from ..runs import Interrupted, Run
from ..samples.metrics import evaluate_samples
from ..training import DivergedError
from .experiment import GANConfig, build_gan
from .experiment import load_data as load_data_of
from .observer import Observer
from .samples import random_images
from .training import GANTrainer

__all__ = ["METHODS", "STIEFEL", "Cell", "Settings", "config_of", "load_data", "train_cell"]

STIEFEL = " (Stiefel)"
#: Constraints, and those that are factored in their other form too.
METHODS = (
    *CONSTRAINTS,
    *(f"{name}{STIEFEL}" for name, constraint in CONSTRAINTS.items() if constraint.factored),
)
#: The rate of RiemannianSGD over Adam's: it multiplies a gradient, where Adam's is about the length of a step.
MANIFOLD_RATIO = 200.0


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid have in common; the names are those of `retract gan`."""

    data: str
    data_dir: str | None
    subset: int | None
    network: str
    width: int | None
    generator_width: int | None
    rank: int | None  # of factored weights
    loss: str
    steps: int
    tuning_steps: int
    discriminator_steps: int
    batch_size: int
    ema: float
    metric_samples: int
    looks: int  # at samples, a run
    device: str
    amp: bool


@dataclass(frozen=True)
class Cell(TrainingCell):
    """One training run. A tuning run is shorter; its samples are compared with training images alone."""

    method: str
    lr: float
    seed: int
    tuning: bool = False

    @property
    def name(self) -> str:
        """A name for its folder."""
        words = self.method.replace(STIEFEL, "-stiefel")
        return f"{words}-{self.lr:g}-{'tuning' if self.tuning else 'final'}-{self.seed}"


def config_of(settings: Settings, cell: Cell) -> GANConfig:
    """The options of `retract gan` for one cell."""
    constraint, stiefel, _ = cell.method.partition(STIEFEL)
    steps = settings.tuning_steps if cell.tuning else settings.steps
    every = max(1, steps // settings.looks)
    return GANConfig(
        data=settings.data,
        data_dir=settings.data_dir,
        subset=settings.subset,
        network=settings.network,
        width=settings.width,
        generator_width=settings.generator_width,
        constraint=constraint,
        rank=settings.rank if CONSTRAINTS[constraint].factored else None,
        form="stiefel" if stiefel else "householder",
        generator_constraint="none",
        generator_rank=None,
        loss=settings.loss,
        r1=0.0,
        steps=steps,
        discriminator_steps=settings.discriminator_steps,
        batch_size=settings.batch_size,
        lr=cell.lr,
        manifold_lr=MANIFOLD_RATIO * cell.lr,
        schedule="linear",
        ema=settings.ema,
        seed=cell.seed,
        device=settings.device,
        threads=1,
        amp=settings.amp,
        log_every=every,
        samples_every=every,
        metric_samples=settings.metric_samples,
        inception=None,
    )


def train_cell(settings: Settings, folder: Path, cell: Cell, stopping: Stopping) -> dict[str, Any] | None:
    """Train one cell in a folder of its own, from its last checkpoint if it was begun before, and measure it.

    The folder keeps the metrics of the run and its pictures.

    Returns:
        ``metrics`` of the last samples, against test images (of a tuning run, training images), None if it diverged;
        ``unseen_loss``, their Fréchet distance; ``curve`` of (step, Fréchet distance to training images);
        ``spectra`` and ``lipschitz_bound`` of the last record; ``violation``, the largest of all records; ``z``,
        ``steps_per_second`` and ``seconds``. None if it was stopped first.
    """
    config, data = config_of(settings, cell), load_data(settings)
    trainer = build_gan(config, data)
    compression = summary(trainer.discriminator).compression
    run = open_cell(folder, cell, trainer)
    observer = Observer(run.folder, data, trainer, config)

    def look(trainer: GANTrainer) -> None:
        if stopping():
            raise Interrupted(signal.SIGINT)

    metrics = None
    try:
        trainer.fit(run, measure=observer.measure, on_step=look)
        samples = random_images(trainer.sampler, trainer.latent, config.metric_samples, config.seed + 2)
        split = "train" if cell.tuning else "test"
        metrics = evaluate_samples(samples, data, split=split).as_dict()
    except Interrupted:
        return None
    except DivergedError:
        pass
    run.remove_checkpoint()
    distance = None if metrics is None else metrics["frechet_distance"]
    return {"metrics": metrics, "unseen_loss": distance, **_followed(run, config), "z": compression}


def _followed(run: Run, config: GANConfig) -> dict[str, Any]:
    """What the records of a run tell of it."""
    records = [record for record in run.metrics() if "diverged" not in record]
    seconds = [record["seconds"] for record in records]
    curve = [(record["step"], record["metrics"]["frechet_distance"]) for record in records if "metrics" in record]
    return {
        "curve": curve,
        "spectra": records[-1]["spectra"] if records else None,
        "lipschitz_bound": records[-1]["lipschitz_bound"] if records else None,
        "violation": max((record["spectrum_violation"] for record in records), default=None),
        "steps_per_second": config.log_every / statistics.median(seconds) if seconds else None,
        "seconds": sum(seconds),
    }


@lru_cache(maxsize=1)
def load_data(settings: Settings) -> Dataset:
    """The images of all cells, read once a process."""
    return load_data_of(config_of(settings, Cell("none", 1e-3, seed=0)))
