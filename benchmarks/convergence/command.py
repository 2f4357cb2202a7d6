"""`retract bench convergence`: which optimizer gets there first, how sure that is, and whether the theory's rate shows.

Every protocol tunes every method first, then compares. All is kept in one store: the command can be stopped and goes
on, and a cell that is finished is never computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from retract.nets.cnn import MODELS

from ..experiment import DEFAULT_MODELS
from ..grid import compute, finished
from ..grid_command import show_end
from ..options import Amp, BatchSize, DataFolder, DataName, Device, ImageSize, Minutes, Processes, Subset
from ..training import SCHEDULES
from . import descent
from .equivariance import equivariance_cells, run_equivariance
from .methods import METHODS, STOCHASTIC, Setting, find_method
from .networks import BASE
from .robustness import map_cells
from .store import DATABASE, Store
from .training import Cell, Settings, load_data, make_network, train_cell
from .transfer import transfer_cells
from .tuning import TUNING_SEEDS, Trial, tune

__all__ = ["MAIN", "PROTOCOLS", "Benchmark", "convergence_command"]

THEORY = ("toy", "descent", "stochastic")
PROTOCOLS = (*THEORY, "training", "robustness", "transfer")
TRIALS = 36  # of 48 that a grid has
MAIN = (
    "SGD",
    "AdamW",
    "Muon",
    "SGDP",
    "geoopt RiemannianSGD (Sphere)",
    "unit norm",
    "PSISGD",
    "PSIAngular",
    "PSIAdam",
)
"""The methods of the protocols with most cells, robustness and transfer, where none are named."""


# -------------------------------------------------------------------------------------------------- the protocols


@dataclass(frozen=True)
class Benchmark:
    """What is compared, and how the cells are computed: ``options`` as of `.grid.compute`."""

    store: Store
    settings: Settings
    methods: Sequence[str] | None  # None: each protocol's own
    seeds: int
    trials: int
    options: Mapping[str, Any]

    def run(self, protocols: Sequence[str]) -> bool:
        """Compute the protocols one after the other.

        Returns:
            Whether all their cells are finished.
        """
        torch.set_num_threads(1)
        own = {"training": self._train, "robustness": self._map, "transfer": self._transfer}
        return all(own[name]() if name in own else self._descend(name) for name in protocols)

    def _compute(self, cells: Sequence[Any], work: Callable[..., dict[str, Any] | None]) -> bool:
        return compute(self.store, cells, work, **self.options)

    def _descend(self, protocol: str) -> bool:
        """What theorems speak of; methods that were named and that the protocol does not have are left out."""
        known = descent.PROTOCOLS[protocol].methods
        grids = {name: known[name].grid for name in known if self.methods is None or name in self.methods}
        tuned = self._tune(grids, partial(descent.tuning_cell, protocol), descent.run_cell, "loss")
        if tuned is None:
            return False
        final = descent.final_cells(protocol, tuned, self.seeds)
        return self._compute(final + descent.theorem_cells(protocol, self.seeds, list(grids)), descent.run_cell)

    def _train(self) -> bool:
        tuned = self._tune_training("training", self.settings.model, self.methods or list(STOCHASTIC))
        return tuned is not None and self._compute(final_cells(self.settings, tuned, self.seeds), self._training)

    def _map(self) -> bool:
        tuned = self._tune_training("training", self.settings.model, self.methods or MAIN)
        if tuned is None:
            return False
        return self._compute(
            equivariance_cells(self.settings, tuned), partial(run_equivariance, self.settings)
        ) and self._compute(map_cells(self.settings, tuned, self.seeds), self._training)

    def _transfer(self) -> bool:
        tuned = self._tune_training("transfer", BASE, self.methods or MAIN)
        return tuned is not None and self._compute(transfer_cells(self.settings, tuned, self.seeds), self._training)

    @property
    def _training(self) -> Callable[..., dict[str, Any] | None]:
        load_data(self.settings)  # before there are workers: they inherit it
        return partial(train_cell, self.settings, self.store.folder)

    def _tune_training(self, protocol: str, model: str, methods: Sequence[str]) -> dict[str, Setting] | None:
        """Every method by its loss on the validation split."""
        grids = {method: find_method(method).grid for method in methods}
        cell = partial(tuning_cell, self.settings, protocol, model)
        return self._tune(grids, cell, self._training, "unseen_loss")

    def _tune(
        self,
        grids: Mapping[str, Sequence[Setting]],
        cell: Callable[[str, Trial], Any],
        work: Callable[..., dict[str, Any] | None],
        result: str,
    ) -> dict[str, Setting] | None:
        """The best setting of every method; None if it was stopped first.

        Args:
            grids: by method.
            cell: of a method and a trial.
            work: computes a cell.
            result: of a cell, the lower the better; it has none if it diverged.
        """

        def losses(method: str, trials: list[Trial]) -> dict[Trial, float] | None:
            cells = {trial: cell(method, trial) for trial in trials}
            if not self._compute(list(cells.values()), work):
                return None
            records = finished(self.store, list(cells.values()))
            found = {trial: records[one][result] for trial, one in cells.items()}
            return {trial: math.inf if loss is None else loss for trial, loss in found.items()}

        best = {}
        for method, grid in grids.items():
            tuned = tune(grid, partial(losses, method), trials=self.trials, seeds=TUNING_SEEDS)
            if tuned is None:
                return None
            best[method] = tuned.setting
        return best


def tuning_cell(settings: Settings, protocol: str, model: str, method: str, trial: Trial) -> Cell:
    """The run of a trial."""
    setting, epochs = trial.setting, trial.part_of(settings.epochs)
    rates = (setting.lr, setting.euclidean_lr, setting.weight_decay)
    return Cell(protocol, method, settings.data, model, *rates, 1.0, trial.seed, "tuning", epochs)


def final_cells(settings: Settings, tuned: Mapping[str, Setting], seeds: int) -> list[Cell]:
    """Every method at its own setting, seed after seed: what is finished is comparable at any time."""
    return [
        Cell(
            "training",
            method,
            settings.data,
            settings.model,
            setting.lr,
            setting.euclidean_lr,
            setting.weight_decay,
            1.0,
            seed,
            "final",
            settings.epochs,
        )
        for seed in range(seeds)
        for method, setting in tuned.items()
    ]


# ---------------------------------------------------------------------------------------------------- the command


def convergence_command(
    protocols: Annotated[
        str, typer.Option(help=f"Comma-separated, of: {', '.join(PROTOCOLS)}.", metavar="NAMES")
    ] = ",".join(PROTOCOLS),
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=f"Semicolon-separated, of: {'; '.join(METHODS)}. Default: each protocol's own.",
            show_default=False,
        ),
    ] = None,
    data: DataName = "digits",
    data_dir: DataFolder = None,
    model: Annotated[
        str | None, typer.Option(help="Network of the zoo. Default: one for the data.", metavar="NAME")
    ] = None,
    subset: Subset = None,
    image_size: ImageSize = None,
    augment: Annotated[bool | None, typer.Option(help="Shift and mirror. Default: for cifar10.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a training run.", metavar="N")] = 9,
    batch_size: BatchSize = 64,
    schedule: Annotated[str, typer.Option(help=f"{', '.join(SCHEDULES)}.", metavar="NAME")] = "cosine",
    warmup: Annotated[
        float, typer.Option(min=0, help="Epochs of linear warm-up, of shorter runs the same part.", metavar="X")
    ] = 0.0,
    trials: Annotated[
        int, typer.Option(min=1, help="Settings that each method is tuned over, by successive halving.", metavar="N")
    ] = TRIALS,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of the comparisons.", metavar="N")] = 5,
    minutes: Minutes = None,
    processes: Processes = 2,
    device: Device = "cpu",
    amp: Amp = False,
    test_every: Annotated[
        int, typer.Option(min=1, help="Epochs from one look at the test images to the next.", metavar="N")
    ] = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help=f"For report.html and {DATABASE}.")] = Path(
        "runs/convergence"
    ),
) -> None:
    """Compare optimizers: gradient norms beside the theorems' rates, training, robustness, transfer.

    toy, descent, stochastic: gradient norms against iterations, on a toy regression and on digits. training: time and
    epochs to accuracies. robustness: initial scales over six decades, learning rates over four. transfer: one learning
    rate on other widths and depths. Each method has its learning rate of the scale-invariant weights, that of the
    others and its decay tuned, all in the same number of trials, on a tenth of the training images held out.
    "SGD, decay 5e-4" fixes the decay of a method. Ctrl-C stops, and the same command goes on.

    For example:

        retract bench convergence --protocols toy,descent,stochastic,robustness
        retract bench convergence --protocols training --data cifar10 --subset 20000 --methods "SGD;PSISGD" --minutes 60
    """
    from rich.console import Console

    from .report import write_convergence_report

    console = Console()
    chosen = _protocols(protocols)
    names = None if methods is None else [name.strip() for name in methods.split(";")]
    for name in names or ():
        find_method(name)
    settings = Settings(
        data=data,
        data_dir=None if data_dir is None else str(data_dir.expanduser().absolute()),
        subset=subset,
        image_size=image_size,
        augment=data == "cifar10" if augment is None else augment,
        model=DEFAULT_MODELS.get(data, "") if model is None else model,
        epochs=epochs,
        batch_size=batch_size,
        schedule=schedule,
        warmup=warmup,
        device=device,
        amp=amp,
        test_every=test_every,
    )
    _check(settings, chosen)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    store = Store.open_or_create(out, {**asdict(settings), "trials": trials})

    def show(record: dict[str, Any]) -> None:
        what = f"{record['protocol']}, {record['stage']}: {record['method']}, seed {record['seed']}"
        console.print(f"{what}: {record['status']}  ({record['seconds']:.1f} s)", highlight=False)

    options = {"processes": processes, "deadline": deadline, "on_record": show}
    done = Benchmark(store, settings, names, seeds, trials, options).run(chosen)
    facts = {"seeds": seeds, "trials": trials}
    report = write_convergence_report(out, store, description=convergence_command.__doc__ or "", facts=facts)
    show_end(console, [], report, done=done)


def _check(settings: Settings, protocols: Sequence[str]) -> None:
    """Raise for what cannot be trained, before there is a folder."""
    if settings.schedule not in SCHEDULES:
        raise ValueError(f"--schedule must be one of {', '.join(SCHEDULES)}, got {settings.schedule!r}")
    if set(protocols) <= set(THEORY):
        return
    data = load_data(settings)
    if settings.model not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {settings.model!r}")
    make_network(settings.model, data)


def _protocols(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in PROTOCOLS]:
        raise ValueError(f"--protocols must be of {', '.join(PROTOCOLS)}, got {', '.join(unknown)}")
    return names
