"""`retract bench digits`: every optimizer at its own best learning rates, from usual and from rescaled weights.

The learning rate of the scale-invariant weights and that of the others are tuned apart, with the same grid and the
same number of trials for every method, on a validation split; the test images are looked at once, at the end.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from retract.nets import scale_invariant_groups
from retract.nets.cnn import MODELS

from . import optimizers
from .data import digits
from .demo import rescale_filters
from .options import Processes
from .provenance import provenance
from .report import Section, Table, write_report

__all__ = ["METHODS", "Result", "Trial", "digits_command", "tune_and_compare"]

Make = Callable[[nn.Module, Tensor], torch.optim.Optimizer]

METHODS: dict[str, tuple[str, float]] = {
    "SGD": ("sgd", 0.0),
    "SGD, decay 5e-4": ("sgd", 5e-4),
    "SGDP, decay 5e-4": ("sgdp", 5e-4),
    "geoopt Sphere": ("geoopt-sphere", 0.0),
    "PSISGD": ("psisgd", 0.0),
    "PSIAngular": ("psiangular", 0.0),
    "PSIAdam": ("psiadam", 0.0),
}
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
EUCLIDEAN_RATES = (0.1, 0.3, 1.0)
INITS = ("usual", "filters", "layers")
EPOCHS, BATCH, VALIDATION = 12, 64, 270
TUNING_SEEDS = (1000, 1001, 1002)


@dataclass(frozen=True)
class Trial:
    """One training run of DigitsNet (momentum 0.9, cosine schedule)."""

    method: str
    lr: float
    euclidean_lr: float
    init: str
    seed: int
    tuning: bool  # train on less, and measure on the validation split


@dataclass(frozen=True)
class Result:
    """Mean training loss of the first and of the last epoch; then loss and accuracy on images not trained on."""

    first_loss: float
    last_loss: float
    unseen_loss: float
    accuracy: float  # percent


FAILED = Result(*[float("nan")] * 4)


def train(trial: Trial, make: Make | None = None) -> Result:
    """Run one trial on one thread, with the optimizer that ``make`` builds of a model and a batch, or the method's own.

    The same trial gives the same result to the bit.

    A learning rate that the method refuses (PSIAngular takes no right angle) is a trial that failed: its loss is NaN.
    """
    torch.set_num_threads(1)
    data = digits.read()
    images, labels = data.normalizer()(data.train_images), data.train_labels
    unseen = (data.normalizer()(data.test_images), data.test_labels)
    if trial.tuning:
        unseen = (images[:VALIDATION], labels[:VALIDATION])
        images, labels = images[VALIDATION:], labels[VALIDATION:]
    torch.manual_seed(trial.seed)
    model = MODELS["digitsnet"]()
    _rescale(model, trial)
    try:
        optimizer = (make or _maker(trial))(model, images[:BATCH])
    except ValueError:
        return FAILED
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    generator, losses = torch.Generator().manual_seed(trial.seed), []
    for _ in range(EPOCHS):
        order, total = torch.randperm(len(images), generator=generator)[: steps * BATCH], 0.0
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / steps)
    return Result(losses[0], losses[-1], *_evaluate(model, *unseen))


@torch.no_grad()
def _rescale(model: Any, trial: Trial) -> None:
    """Multiply each filter by its own 10^U(-1.5, 1.5), or layers in turn by 100 and 1/100. BatchNorm undoes both."""
    groups = model.manifold_groups()
    if trial.init == "filters":
        rescale_filters(groups, torch.Generator().manual_seed(trial.seed))
    elif trial.init == "layers":
        weights = [weight for group in groups if "manifold" in group for _, weight in group["params"]]
        for index, weight in enumerate(weights):
            weight.mul_(100.0 if index % 2 == 0 else 0.01)


def _maker(trial: Trial) -> Make:
    name, decay = METHODS[trial.method]

    def make(model: nn.Module, example: Tensor) -> torch.optim.Optimizer:
        if optimizers.OPTIMIZERS[name].manifold == "psi":
            scale_invariant_groups(model, example, canonical=True)
        options = {"lr": trial.lr, "euclidean_lr": trial.euclidean_lr, "weight_decay": decay}
        return optimizers.build(name, model, example, **options)

    return make


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    logits = model.eval()(images)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return F.cross_entropy(logits, labels).item(), 100 * accuracy


def _tuning(methods: list[str]) -> list[Trial]:
    grid = product(methods, RATES, EUCLIDEAN_RATES, TUNING_SEEDS)
    return [Trial(method, lr, other, "usual", seed, True) for method, lr, other, seed in grid]


def _validation_losses(results: list[tuple[Trial, Result]]) -> dict[Trial, float]:
    """Mean over tuning seeds for each setting (its trial with seed 0); where one diverged, infinity."""
    losses: dict[Trial, list[float]] = {}
    for trial, result in results:
        if trial.tuning:
            losses.setdefault(replace(trial, seed=0), []).append(result.unseen_loss)
    means = {trial: statistics.mean(values) for trial, values in losses.items()}
    return {trial: mean if math.isfinite(mean) else math.inf for trial, mean in means.items()}


def _best(results: list[tuple[Trial, Result]]) -> dict[str, Trial]:
    """For each method the setting of the lowest validation loss."""
    losses = _validation_losses(results)
    return {trial.method: trial for trial in sorted(losses, key=losses.__getitem__, reverse=True)}


def tune_and_compare(methods: list[str], seeds: int, processes: int) -> Iterator[tuple[Trial, Result]]:
    """Tune every method, then train it ``seeds`` times from each initialization; yields every trial as it ends."""
    tuning, tuned = _tuning(methods), []
    with ProcessPoolExecutor(processes) as pool:
        for found in zip(tuning, pool.map(train, tuning), strict=True):
            tuned.append(found)
            yield found
        best = _best(tuned)
        final = [
            replace(best[method], init=init, seed=seed, tuning=False)
            for method, init, seed in product(methods, INITS, range(seeds))
        ]
        yield from zip(final, pool.map(train, final), strict=True)


def count_trials(methods: list[str], seeds: int) -> int:
    """How many trials `tune_and_compare` yields."""
    return len(_tuning(methods)) + len(methods) * len(INITS) * seeds


def tables(trials: list[tuple[Trial, Result]]) -> list[Table]:
    """Losses and accuracies (mean ± standard deviation over seeds) of every method from each initialization."""
    header = ("method", "lr, others", "init", "first loss", "last loss", "test loss", "test accuracy %")
    rows, differences = [], []
    results = [(trial, result) for trial, result in trials if not trial.tuning]
    for method in dict.fromkeys(trial.method for trial, _ in results):
        by_init = {init: [(t, r) for t, r in results if t.method == method and t.init == init] for init in INITS}
        for init, found in by_init.items():
            trial = found[0][0]
            cells = [
                _spread([getattr(r, name) for _, r in found], digits)
                for name, digits in (("first_loss", 2), ("last_loss", 4), ("unseen_loss", 3), ("accuracy", 2))
            ]
            rows.append([method, f"{trial.lr:g}, {trial.euclidean_lr:g}", init, *cells])
        usual = [r for _, r in by_init["usual"]]
        for init in INITS[1:]:
            pairs = list(zip(usual, (r for _, r in by_init[init]), strict=True))
            loss = _spread([b.last_loss - a.last_loss for a, b in pairs], 4)
            accuracy = _spread([b.accuracy - a.accuracy for a, b in pairs], 2)
            differences.append([method, init, loss, accuracy])
    caption = "Rescaled less usual, by seed, at the same learning rates."
    return [
        Table(header, rows, "First and last loss: mean training loss of that epoch. ±: standard deviation over seeds."),
        Table(("method", "init", "last loss", "test accuracy, points"), differences, caption),
        _sensitivity(trials),
    ]


def _sensitivity(trials: list[tuple[Trial, Result]]) -> Table:
    """What the learning rate of the other parameters is worth: the best validation loss that each of them allows."""
    losses = _validation_losses(trials)
    rows = []
    for method in dict.fromkeys(trial.method for trial in losses):
        best = [min(x for t, x in losses.items() if (t.method, t.euclidean_lr) == (method, e)) for e in EUCLIDEAN_RATES]
        rows.append([method, *(f"{x:.3f}" for x in best)])
    header = ("method", *(f"others at {rate:g}" for rate in EUCLIDEAN_RATES))
    return Table(header, rows, "Validation loss at the best learning rate of the scale-invariant weights.")


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def digits_command(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the comparison, from each initialization.")] = 5,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help=f"Semicolon-separated, of: {'; '.join(METHODS)}. Default: all.", show_default=False
        ),
    ] = None,
    processes: Processes = 2,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For report.html and results.jsonl.")] = Path(
        "runs/digits"
    ),
) -> None:
    """Tune every optimizer on 8x8 digits, then compare them from usual and from rescaled weights.

    Each method gets 18 settings of its two learning rates, 3 seeds each, judged on a validation split from the usual
    start. Then it trains, at these rates, from weights that compute the same function but for BatchNorm's epsilon: each
    filter multiplied by its own 10^U(-1.5, 1.5), or layers multiplied in turn by 100 and 1/100.

    For example:

        retract bench digits --methods "SGD;PSISGD" --seeds 3
    """
    from rich import print as show
    from rich.progress import track

    chosen = methods.split(";") if methods else list(METHODS)
    if unknown := [name for name in chosen if name not in METHODS]:
        raise ValueError(f"--methods must be of {'; '.join(METHODS)}, got {'; '.join(unknown)}")
    trials = tune_and_compare(chosen, seeds, processes)
    results = list(track(trials, "training", count_trials(chosen, seeds), transient=True))
    found = tables(results)
    facts = provenance(seeds=seeds, tuning_seeds=len(TUNING_SEEDS), epochs=EPOCHS, batch_size=BATCH)
    report = write_report(
        out / "report.html",
        title="Optimizers on 8x8 digits",
        summary="Every method at the best of 18 settings of its two learning rates, tuned on a validation split.",
        sections=[Section("Results", digits_command.__doc__ or "", found)],
        facts=facts,
    )
    with (out / "results.jsonl").open("w", encoding="utf-8") as file:
        for trial, result in results:
            file.write(json.dumps({**asdict(trial), **asdict(result)}) + "\n")
    for table in found:
        show(table.rich())
    show(f"Report: {report}")
