"""From a run's options to its data, network, optimizer and training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retract.nets import scale_invariant_groups
from retract.nets.cnn import INPUT_SHAPES, MODELS

from . import optimizers
from .data import DATASETS, Dataset, load
from .factorization import Factorization, fill_in
from .runs import Run
from .training import SCHEDULES, Trainer

__all__ = ["Config", "build_trainer", "default_folder", "load_model", "plain", "read_config", "resolve"]

DEFAULT_MODELS = {"digits": "digitsnet", "mnist": "lenet5_bn", "cifar10": "resnet20", "svhn": "resnet20"}
ON_MANIFOLDS = ("stiefel", "oblique")  # forms of factored layers whose weights are points of a manifold
CHANNELS, CLASSES = {"digits": 1, "mnist": 1, "cifar10": 3, "svhn": 3}, 10
EXAMPLES = 32  # images to measure a network with


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run, as kept in config.json.

    What has a default here came later than the first runs, whose config.json lacks it.
    """

    data: str
    data_dir: str | None
    subset: int | None
    image_size: int | None
    augment: bool
    model: str
    canonical: bool
    optimizer: str
    lr: float
    euclidean_lr: float | None
    momentum: float
    weight_decay: float
    epochs: int
    batch_size: int
    schedule: str
    warmup: float
    label_smoothing: float
    seed: int
    device: str
    threads: int
    amp: bool
    factorize: str | None = None
    rank: int | None = None
    spectrum: str | None = None
    form: str | None = None
    skip: str | None = None
    budget: float | None = None
    error: float | None = None
    energy: float | None = None


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON holds them; paths absolute, so that a run can be resumed from anywhere."""
    return {
        name: str(value.expanduser().absolute()) if isinstance(value, Path) else value
        for name, value in options.items()
    }


def resolve(options: Mapping[str, Any]) -> Config:
    """The options with their defaults filled in. ValueError for a name that is unknown, or what cannot be combined."""
    chosen = fill_in(plain(options))
    chosen["model"] = chosen["model"] or DEFAULT_MODELS.get(chosen["data"])
    chosen["optimizer"] = chosen["optimizer"] or _default_optimizer(chosen["factorize"], chosen["form"])
    names = {"data": DATASETS, "optimizer": optimizers.OPTIMIZERS, "schedule": SCHEDULES, "model": MODELS}
    for option, allowed in names.items():
        if chosen[option] not in allowed:
            raise ValueError(f"--{option} must be one of {', '.join(allowed)}, got {chosen[option]!r}")
    choice = optimizers.OPTIMIZERS[chosen["optimizer"]]
    defaults = {
        "lr": choice.lr,
        "augment": chosen["data"] == "cifar10",
        "canonical": choice.manifold in ("psi", "any") and chosen["factorize"] is None,
        "threads": torch.get_num_threads(),
    }
    return Config(**{**chosen, **{name: value for name, value in defaults.items() if chosen[name] is None}})


def _default_optimizer(factorize: str | None, form: str | None) -> str:
    if factorize is None:
        return "psisgd"
    return "riemannian-sgd" if form in ON_MANIFOLDS else "sgd"


def read_config(run: Run, moved: Mapping[str, Any]) -> Config:
    """The options of a run that is there, with those that may change."""
    try:
        return Config(**{**run.config, **moved})
    except TypeError as error:
        raise ValueError(f"{run.folder} holds no run of `retract train`: {error}") from error


def default_folder(config: Config) -> Path:
    """Where a run goes that names no folder."""
    sizes = {"": config.rank, "budget": config.budget, "error": config.error, "energy": config.energy}
    size = "".join(f"{name}{value:g}" for name, value in sizes.items() if value is not None)
    layers = f"{config.factorize}{size}-" if config.factorize else ""
    return Path("runs") / f"{config.data}-{config.model}-{layers}{config.optimizer}-{config.seed}"


def build_trainer(config: Config) -> Trainer:
    """Data, network, optimizer and loop of a run, all from its options."""
    torch.set_num_threads(config.threads)
    device = usable_device(config.device)
    dataset = load(config.data, config.data_dir, subset=config.subset, seed=config.seed, image_size=config.image_size)
    torch.manual_seed(config.seed)
    model = build_model(config, dataset).to(device)
    optimizer = optimizers.build(
        config.optimizer,
        model,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        euclidean_lr=config.euclidean_lr,
    )
    return Trainer(
        model,
        optimizer,
        dataset,
        epochs=config.epochs,
        batch_size=config.batch_size,
        schedule=config.schedule,
        warmup=config.warmup,
        label_smoothing=config.label_smoothing,
        augment=config.augment,
        seed=config.seed,
        device=device,
        amp=config.amp,
    )


def usable_device(name: str) -> torch.device:
    """The device of this name. ValueError when torch knows none such, or cannot reach it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":  # the same sums in the same order, so that a resumed run is the same to the bit
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return device


def build_model(config: Config, dataset: Dataset) -> nn.Module:
    """The network, tried on a few images, so that a size it cannot take is an error that says so."""
    channels, height, width = dataset.image_shape
    model: nn.Module = MODELS[config.model](num_classes=len(dataset.classes), in_channels=channels)
    spread = max(1, len(dataset.train_images) // EXAMPLES)  # images may be sorted by class
    example = dataset.normalizer()(dataset.train_images[::spread][:EXAMPLES])
    try:
        with torch.no_grad():
            model.eval()(example)
    except RuntimeError as error:
        usual = INPUT_SHAPES[config.model][-1]
        raise ValueError(
            f"{config.model} cannot take images of {height}x{width} pixels: try --image-size {usual}"
        ) from error
    if config.canonical:
        scale_invariant_groups(model, example, canonical=True)
    return factorized(config, model)


def factorized(config: Config, model: nn.Module) -> nn.Module:
    """The network with its layers factored in place, if the run asks for it."""
    layers = Factorization.of(asdict(config))
    if layers is not None:
        layers.apply(model)
    return model


def load_model(run: Run) -> nn.Module:
    """The network of a run as its last checkpoint left it; needs no data.

    Raises:
        ValueError: the folder holds no run of `retract train`, or no checkpoint yet.
    """
    config = read_config(run, {})
    state = run.load_checkpoint()
    if state is None:
        raise ValueError(f"{run.folder} has no checkpoint yet")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)  # the ranks of a decomposition to an error are those of the first weights
        model = factorized(config, MODELS[config.model](num_classes=CLASSES, in_channels=CHANNELS[config.data]))
    model.load_state_dict(state["model"])
    return model
