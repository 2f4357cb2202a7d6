"""The cells of `retract bench convergence` that theorems speak of: gradient norms against iterations.

Three protocols. ``toy``: full-batch descent on the regression of [Yi22, Figure 4]. ``descent``: the same on digits
(Theorems 2 and 4: O(1/T)). ``stochastic``: batches of digits, with steps in proportion to 1/sqrt(T) and a run for
every T (Theorems 3 and 5: O(1/sqrt(T))). The theorems are of methods without momentum; others stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from .. import optimizers
from ..cells import TrainingCell
from ..grid import Stopping
from ..training import NOT_FINITE
from .methods import FULL_BATCH, STOCHASTIC, Method, Setting
from .problems import Problem, make_problem
from .smoothness import Smoothness, smoothness
from .trace import Trace
from .tuning import Trial

__all__ = ["PROTOCOLS", "DescentCell", "Protocol", "final_cells", "run_cell", "theorem_cells", "tuning_cell"]

BATCH = 64
LOOKS = 64  # at the full gradient in a stochastic run of any length: its least value is then over as many
STEPS_BETWEEN_STOPS = 50
SMOOTHNESS_LOOKS = (1 / 64, 1 / 8, 1)  # parts of a theorem's run after which constants are estimated again


@dataclass(frozen=True)
class DescentCell(TrainingCell):
    """One run. At the stage ``theorem`` learning rates are in units of the theorem's step sizes."""

    protocol: str  # of `PROTOCOLS`
    method: str  # of the protocol's methods
    stage: str  # "tuning", "final" or "theorem"
    lr: float  # of the scale-invariant weights
    euclidean_lr: float  # of the others
    seed: int
    steps: int
    start: str = "usual"  # of `.problems.STARTS`
    data: str = "digits"  # of `.problems.PROBLEMS`
    model: str = "perceptron"
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Protocol:
    """What is minimised, by which methods, for how long."""

    data: str
    methods: Mapping[str, Method]
    tuning_steps: int  # of a whole run
    steps: tuple[int, ...]  # of the final runs
    exponent: float  # of T in the theorem's bound of the squared gradient norm
    theorem_methods: tuple[str, ...] = ()  # those that also run by the theorem's step sizes

    def rate_factor(self, steps: int) -> float:
        """Of the tuned learning rates, in a run of so many steps: a fixed step, or one of order 1/sqrt(T)."""
        return math.sqrt(self.tuning_steps / steps) if self.exponent == -0.5 else 1.0


def _for_regression(method: Method) -> Method:
    """Its output layer sees 100 features of one sign: it takes steps ten times smaller than a classifier's."""
    if method.optimizer == "adam":
        return method
    return replace(method, euclidean_lrs=tuple(rate / 10 for rate in method.euclidean_lrs))


_BATCHES = ("SGD", "Adam", "PSISGD without momentum", "PSISGD", "PSIAngular")
PROTOCOLS = {
    "toy": Protocol(
        "toy regression",
        {name: _for_regression(method) for name, method in FULL_BATCH.items()},
        tuning_steps=1000,
        steps=(1000,),
        exponent=-1.0,
        theorem_methods=("GD", "PSIGD"),
    ),
    "descent": Protocol(
        "digits",
        # On PSI weights RiemannianGD takes the steps of PSIGD, which the toy regression shows.
        {name: method for name, method in FULL_BATCH.items() if name != "RiemannianGD"},
        tuning_steps=1000,
        steps=(2000,),
        exponent=-1.0,
        theorem_methods=("GD", "PSIGD"),
    ),
    "stochastic": Protocol(
        "digits",
        {
            "SGD without momentum": FULL_BATCH["GD"],
            **{name: replace(STOCHASTIC[name], weight_decays=(0.0,)) for name in _BATCHES},
        },
        tuning_steps=512,
        steps=(64, 256, 1024, 4096),
        exponent=-0.5,
    ),
}


# ------------------------------------------------------------------------------------------------------- the cells


def tuning_cell(protocol: str, method: str, trial: Trial) -> DescentCell:
    """The run of a trial."""
    found = PROTOCOLS[protocol]
    setting, steps = trial.setting, trial.part_of(found.tuning_steps)
    return DescentCell(protocol, method, "tuning", setting.lr, setting.euclidean_lr, trial.seed, steps, data=found.data)


def final_cells(protocol: str, tuned: Mapping[str, Setting], seeds: int) -> list[DescentCell]:
    """Every method at its own learning rates, from every seed; in the stochastic protocol for every number of steps."""
    found = PROTOCOLS[protocol]
    cells = []
    for (name, setting), seed, steps in product(tuned.items(), range(seeds), found.steps):
        factor = found.rate_factor(steps)
        rates = (setting.lr * factor, setting.euclidean_lr * factor)
        cells.append(DescentCell(protocol, name, "final", *rates, seed, steps, data=found.data))
    return cells


def theorem_cells(protocol: str, seeds: int, methods: Sequence[str]) -> list[DescentCell]:
    """Those of the methods that Theorems 2 and 4 speak of, by their step sizes, from unit norms: there the first steps
    are equal.
    """
    found = PROTOCOLS[protocol]
    return [
        DescentCell(protocol, name, "theorem", 1.0, 1.0, seed, steps, "unit", found.data)
        for name, seed, steps in product(found.theorem_methods, range(seeds), found.steps)
        if name in methods
    ]


# ------------------------------------------------------------------------------------------------------ their runs


def run_cell(cell: DescentCell, stopping: Stopping) -> dict[str, Any] | None:
    """Minimise, and watch the gradient.

    Returns:
        What `.trace.Trace.results` says; of a theorem's run also ``smoothness``, the constant L at the
        start; ``step`` and ``euclidean_step``, the learning rates; ``bound``, 2 L loss_0 / T, since no loss is below
        zero; and the curve ``smoothness``, L along the run, for the theorem asks that no later one is larger. None
        if it was stopped first.
    """
    torch.set_num_threads(1)
    problem = make_problem(cell.data, cell.seed, cell.start)
    trace = Trace(problem, keep_curves=cell.stage != "tuning")
    known = smoothness(problem) if cell.stage == "theorem" else None
    steps = (cell.lr, cell.euclidean_lr)
    if known is not None:
        steps = (cell.lr * known.step, cell.euclidean_lr * known.euclidean_step)
        trace.add("smoothness", 0, known.largest)
    try:
        optimizer = _optimizer(cell, problem, *steps)
        minimise = _minimise_batches if cell.protocol == "stochastic" else _minimise
        if not minimise(cell, problem, optimizer, trace, stopping):
            return None
    except NOT_FINITE:
        trace.diverged = True
    return {**trace.results(), **_theorem_facts(cell, trace, known)}


def _optimizer(cell: DescentCell, problem: Problem, lr: float, euclidean_lr: float) -> torch.optim.Optimizer:
    """As `Method.build`, but the norms stay those of the start: gradients with respect to weights depend on them."""
    method = PROTOCOLS[cell.protocol].methods[cell.method]
    optimizer = optimizers.build(
        method.optimizer, problem.model, lr=lr, momentum=method.momentum, euclidean_lr=euclidean_lr
    )
    for group in optimizer.param_groups:
        group.update(method.options)
    return optimizer


def _minimise(
    cell: DescentCell, problem: Problem, optimizer: torch.optim.Optimizer, trace: Trace, stopping: Stopping
) -> bool:
    """Full-batch steps, to the end or until the loss is not finite; False if it was stopped."""
    again = {round(part * (cell.steps - 1)) for part in SMOOTHNESS_LOOKS} if cell.stage == "theorem" else set()
    for step in range(cell.steps):
        if step % STEPS_BETWEEN_STOPS == 0 and stopping():
            return False
        loss = _backward(problem, optimizer)
        if not trace.look(step, loss):
            break
        if step in again:
            trace.add("smoothness", step, smoothness(problem).largest)
        optimizer.step()
    return True


def _minimise_batches(
    cell: DescentCell, problem: Problem, optimizer: torch.optim.Optimizer, trace: Trace, stopping: Stopping
) -> bool:
    """The same by batches, which the seed draws; the full gradient is looked at now and then."""
    generator = torch.Generator().manual_seed(cell.seed)
    looks = {look * cell.steps // LOOKS for look in range(LOOKS)}
    for step in range(cell.steps):
        if step % STEPS_BETWEEN_STOPS == 0 and stopping():
            return False
        if step in looks and not trace.look(step, _backward(problem, optimizer)):
            break
        batch = torch.randint(len(problem.targets), (BATCH,), generator=generator)
        _backward(problem, optimizer, batch)
        optimizer.step()
    return True


def _backward(problem: Problem, optimizer: torch.optim.Optimizer, batch: torch.Tensor | None = None) -> float:
    optimizer.zero_grad()
    loss = problem.loss(batch)
    loss.backward()
    return loss.item()


def _theorem_facts(cell: DescentCell, trace: Trace, known: Smoothness | None) -> dict[str, Any]:
    if known is None:
        return {}
    bound = None if trace.diverged else 2 * known.largest * trace.first_loss / cell.steps
    steps = {"step": known.step, "euclidean_step": known.euclidean_step}
    return {"smoothness": known.largest, **steps, "bound": bound}
