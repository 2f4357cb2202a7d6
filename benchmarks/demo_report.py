"""What ``retract demo`` shows: two tables, and a page with the loss curves and the distance between them."""

from __future__ import annotations

from itertools import accumulate, product
from math import nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from .demo import INITS, OPTIMIZERS, Precision, Run, Settings
from .provenance import provenance
from .report import SERIES, Figure, Section, Table, figure_style, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["differences", "first_split", "tables", "write_demo_report"]

COLOURS = dict(zip(OPTIMIZERS, SERIES, strict=False))
SPLIT = 1e-3  # losses this far apart are seen as two curves


def differences(runs: list[Run], optimizer: str, precision: Precision) -> list[float]:
    """|loss from the usual init - loss from the rescaled init| at every step."""
    one, other = (_pick(runs, optimizer, init, precision).losses for init in INITS)
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def first_split(gaps: list[float]) -> int | None:
    """The first step (from 1) whose losses lie more than ``SPLIT`` apart; None if there is none."""
    return next((step for step, gap in enumerate(gaps, 1) if gap > SPLIT), None)


def tables(runs: list[Run]) -> list[Table]:
    """How each run went, and how far apart the two runs of each optimizer are."""
    return [_training_table(runs), _difference_table(runs)]


def write_demo_report(path: Path, runs: list[Run], settings: Settings) -> Path:
    """Write the page and return its path."""
    training, difference = tables(runs)
    curves = Figure(
        _curves_figure(runs),
        f"Loss of every batch, {runs[0].precision}: usual initialization wide, rescaled filters dashed.",
    )
    gaps = Figure(
        _differences_figure(runs),
        "Largest difference so far of the two losses on one batch, usual against rescaled initialization.",
    )
    return write_report(
        path,
        title="One function, two initializations: SGD and PSISGD",
        summary=_summary(runs),
        sections=[
            Section("What was done", _method_text(settings)),
            Section("The loss curves", _CURVES_TEXT, [curves, training]),
            Section("How far apart the two curves of an optimizer are", _DIFFERENCES_TEXT, [gaps, difference]),
        ],
        facts=provenance(seed=settings.seed),
    )


def _summary(runs: list[Run]) -> str:
    return "\n\n".join(_finding(runs, optimizer) for optimizer in OPTIMIZERS)


def _finding(runs: list[Run], optimizer: str) -> str:
    gaps = " and ".join(f"{max(differences(runs, optimizer, p)):.2g} in {p}" for p in _precisions(runs))
    return f"{optimizer}: the two loss curves differ by at most {gaps}."


def _method_text(settings: Settings) -> str:
    return f"""
A small convolutional network with BatchNorm was trained on the 8x8 digits of scikit-learn: {settings.epochs}
epochs, batches of {settings.batch_size}, learning rate {settings.lr:g} with a cosine schedule, momentum
{settings.momentum:g}, no weight decay, the same batches in every run.

BatchNorm divides each channel by its standard deviation, so multiplying a filter by a positive number
changes nothing that the network computes. The usual initialization is the network's own. The rescaled one
is the same, with every filter multiplied by its own 10^u, u uniform in [-1.5, 1.5]: as functions the two
are equal (up to BatchNorm's epsilon), as tensors they are not.

`torch.optim.SGD` works on the tensors: a filter ten times larger gets a gradient ten times smaller, and
turns a hundred times more slowly. `PSISGD` works on what a filter stands for, a direction, and takes the
same step at every scale. The change in code is `register_scale_invariant(model, example, canonical=True)`,
and `PSISGD` in place of `SGD`.

The learning rate was tuned for neither: this page shows which curves coincide, not which optimizer is
faster.
"""


_CURVES_TEXT = """
The two runs of an optimizer are drawn over one another. Where one curve is seen, the dashes lie on the wide
line.
"""

_DIFFERENCES_TEXT = """
In exact arithmetic PSISGD's two runs are equal, so that rounding alone can part them. It mostly stays
rounding, until a difference of it carries some activation across the kink of a ReLU: there the gradient
jumps, and the runs go on as different ones. In float32 that happens sooner or later, the sooner the higher
the learning rate (try `--lr 0.3`); in float64, where rounding is 10^9 times smaller, hardly ever. SGD's
two runs are different trainings in either precision.
"""


def _precisions(runs: list[Run]) -> list[Precision]:
    return list(dict.fromkeys(run.precision for run in runs))


def _pick(runs: list[Run], optimizer: str, init: str, precision: Precision) -> Run:
    return next(run for run in runs if (run.optimizer, run.init, run.precision) == (optimizer, init, precision))


def _training_table(runs: list[Run]) -> Table:
    rows = [
        [
            run.optimizer,
            run.init,
            f"{fmean(run.epochs[0]):.4f}",
            f"{fmean(run.epochs[-1]):.4f}",
            f"{100 * run.accuracy:.2f}",
        ]
        for run in runs
        if run.precision == runs[0].precision
    ]
    header = [
        "optimizer",
        "filters",
        "loss, epoch 1",
        f"loss, epoch {len(runs[0].epochs)}",
        "test accuracy, %",
    ]
    return Table(header, rows, f"In {runs[0].precision}. Losses are means over the batches of that epoch.")


def _difference_table(runs: list[Run]) -> Table:
    rows = []
    for precision, optimizer in product(_precisions(runs), OPTIMIZERS):
        gaps = differences(runs, optimizer, precision)
        split = first_split(gaps)
        rows.append([optimizer, precision, f"{max(gaps):.2g}", "–" if split is None else str(split)])
    header = ["optimizer", "precision", "largest difference of loss", f"first step over {SPLIT:g}"]
    return Table(header, rows, f"Over all {len(gaps)} steps; – where the losses never differ by more than {SPLIT:g}.")


def _curves_figure(runs: list[Run]) -> MatplotlibFigure:
    from matplotlib import pyplot

    with figure_style():
        figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.8), sharey=True, layout="constrained")
        for ax, optimizer in zip(axes, OPTIMIZERS, strict=True):
            usual, rescaled = (_pick(runs, optimizer, init, runs[0].precision).losses for init in INITS)
            steps = range(1, len(usual) + 1)
            ax.semilogy(steps, usual, color=COLOURS[optimizer], linewidth=4, alpha=0.35, label="usual initialization")
            ax.semilogy(
                steps,
                rescaled,
                color=COLOURS[optimizer],
                linewidth=1.4,
                dashes=(3, 1.5),
                label="rescaled filters",
            )
            ax.set(title=optimizer, xlabel="step")
            ax.legend(loc="lower left")
        axes[0].set_ylabel("training loss of the batch")
    pyplot.close(figure)
    return figure


def _differences_figure(runs: list[Run]) -> MatplotlibFigure:
    from matplotlib import pyplot

    styles = dict(zip(_precisions(runs), ("-", "--"), strict=False))
    with figure_style():
        figure, ax = pyplot.subplots(figsize=(9.2, 3.6), layout="constrained")
        for optimizer, precision in product(OPTIMIZERS, styles):
            gaps = [gap or nan for gap in accumulate(differences(runs, optimizer, precision), max)]
            label = f"{optimizer}, {precision}"
            ax.semilogy(range(1, len(gaps) + 1), gaps, styles[precision], color=COLOURS[optimizer], label=label)
        ax.set(xlabel="step", ylabel="largest difference of the losses")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    pyplot.close(figure)
    return figure
