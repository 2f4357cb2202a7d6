"""From the options of `retract gan` to data, networks and training loop, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retract.nets.gan.constraints import CONSTRAINTS, constrain
from retract.nets.gan.networks import GANS, gan_pair

from ..data import DATASETS, Dataset, load
from ..data.folder import read_folder
from ..experiment import plain, usable_device
from ..runs import Run
from ..samples.inception import require_inception
from ..samples.metrics import FEWEST
from .losses import LOSSES
from .optimizers import SCHEDULES
from .training import GANTrainer

__all__ = [
    "FOLDER",
    "GANConfig",
    "build_gan",
    "default_folder",
    "default_network",
    "load_data",
    "read_config",
    "resolve",
]

FOLDER = "folder"
AVERAGED = 10  # the average of the generator goes over a tenth of a short run
FORMS = ("householder", "stiefel")


@dataclass(frozen=True)
class GANConfig:
    """All that decides the result of a run, as kept in config.json."""

    data: str
    data_dir: str | None
    subset: int | None
    network: str
    width: int | None
    generator_width: int | None
    constraint: str
    rank: int | None
    form: str
    generator_constraint: str
    generator_rank: int | None
    loss: str
    r1: float
    steps: int
    discriminator_steps: int
    batch_size: int
    lr: float
    manifold_lr: float
    schedule: str
    ema: float
    seed: int
    device: str
    threads: int
    amp: bool
    log_every: int
    samples_every: int
    metric_samples: int
    inception: str | None


def resolve(options: Mapping[str, Any]) -> GANConfig:
    """The options with their defaults filled in. ValueError for an unknown name, or what cannot be combined."""
    chosen = plain(options)
    names: dict[str, Any] = {
        "data": (*DATASETS, FOLDER),
        "constraint": CONSTRAINTS,
        "generator_constraint": CONSTRAINTS,
        "loss": LOSSES,
        "schedule": SCHEDULES,
        "form": FORMS,
    }
    defaults = {
        "network": default_network(chosen["data"]),
        "ema": min(0.999, max(0.0, 1 - AVERAGED / chosen["steps"])),
        "samples_every": max(chosen["log_every"], chosen["steps"] // 10),
        "threads": torch.get_num_threads(),
    }
    chosen |= {name: value for name, value in defaults.items() if chosen[name] is None}
    for option, allowed in {**names, "network": GANS}.items():
        if chosen[option] not in allowed:
            raise ValueError(
                f"--{option.replace('_', '-')} must be one of {', '.join(allowed)}, got {chosen[option]!r}"
            )
    if chosen["data"] == FOLDER and chosen["data_dir"] is None:
        raise ValueError("--data folder needs --data-dir, the folder of images")
    if chosen["data"] == FOLDER and chosen["subset"] is not None:
        raise ValueError("--subset means nothing for --data folder: all of its images are used")
    if 0 < chosen["metric_samples"] < FEWEST:
        raise ValueError(f"--metric-samples must be 0 or at least {FEWEST}, got {chosen['metric_samples']}")
    if chosen["inception"] is not None:
        if not chosen["metric_samples"]:
            raise ValueError("--inception needs samples to compare: --metric-samples is 0")
        try:
            require_inception(chosen["inception"])
        except ImportError as error:
            raise ValueError(f"--inception: {error}") from error
    if chosen["samples_every"] % chosen["log_every"]:
        every = f"{chosen['samples_every']} and {chosen['log_every']}"
        raise ValueError(f"--samples-every must be a multiple of --log-every, got {every}")
    return GANConfig(**chosen)


def default_network(data: str) -> str:
    """The pair for images of a data set."""
    return {"digits": "digits", "mnist": "dcgan28"}.get(data, "dcgan32")


def read_config(run: Run, moved: Mapping[str, Any]) -> GANConfig:
    """The options of a run that is there, with those that may change."""
    try:
        return GANConfig(**{**run.config, **moved})
    except TypeError as error:
        raise ValueError(f"{run.folder} holds no run of `retract gan`: {error}") from error


def default_folder(config: GANConfig) -> Path:
    """Where a run goes that names no folder."""
    rank = "" if config.rank is None else f"{config.rank}"
    form = "-stiefel" if config.form == "stiefel" else ""
    return Path("runs") / f"gan-{config.data}-{config.network}-{config.constraint}{rank}{form}-{config.seed}"


def load_data(config: GANConfig) -> Dataset:
    """The images, resized to those of the network."""
    channels, size, _ = GANS[config.network].image_shape
    if config.data == FOLDER:
        assert config.data_dir is not None  # `resolve` has seen to it
        return read_folder(Path(config.data_dir), size, channels)
    return load(config.data, config.data_dir, subset=config.subset, seed=config.seed, image_size=size)


def build_gan(config: GANConfig, data: Dataset) -> GANTrainer:
    """Networks under their constraints, and the loop that trains them."""
    torch.set_num_threads(config.threads)
    device = usable_device(config.device)
    torch.manual_seed(config.seed)
    generator, discriminator = gan_pair(
        config.network, width=config.width, generator_width=config.generator_width, channels=data.image_shape[0]
    )
    constrain(discriminator, config.constraint, rank=config.rank, form=config.form)  # type: ignore[arg-type]
    constrain(generator, config.generator_constraint, rank=config.generator_rank)
    return GANTrainer(
        generator,
        discriminator,
        data.train_images,
        steps=config.steps,
        loss=config.loss,
        discriminator_steps=config.discriminator_steps,
        lr=config.lr,
        manifold_lr=config.manifold_lr,
        schedule=config.schedule,
        batch_size=config.batch_size,
        ema=config.ema or None,
        r1=config.r1,
        discriminator_penalty=_penalty(config.constraint),
        generator_penalty=_penalty(config.generator_constraint),
        seed=config.seed,
        device=device,
        amp=config.amp,
        log_every=config.log_every,
    )


def _penalty(constraint: str) -> Any:
    chosen = CONSTRAINTS[constraint]
    return chosen.penalty if chosen.penalized else None
