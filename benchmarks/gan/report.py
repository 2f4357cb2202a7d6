"""The page of a run of `retract gan`: samples, spectra, losses and metrics over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import Dataset
from ..provenance import provenance
from ..report import SERIES, Figure, Section, Table, figure_style, write_report
from ..runs import Run
from .observer import SAMPLES, pictures
from .spectra import LAYER_FIGURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["REPORT", "write_gan_report"]

REPORT = "report.html"
NAMES = {"largest": "largest singular value", "least": "least singular value", "stable_rank": "stable rank"}
METRICS = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "mode_coverage": "classes found",
    "class_divergence": "class divergence",
    "classifier_score": "classifier score",
}


def write_gan_report(run: Run, data: Dataset) -> Path:
    """Write ``report.html`` into the run's folder, from its metrics so far, and return its path."""
    records = [record for record in run.metrics() if "diverged" not in record]
    looks = [record for record in records if record.get("metrics")]
    config = run.config
    sections = [Section("Samples", _SAMPLES_TEXT, _sample_figures(run))]
    if records:
        sections.append(Section("Spectra of the discriminator", _SPECTRA_TEXT, _spectra_items(records)))
        sections.append(Section("Losses", _LOSSES_TEXT, [_losses(records)]))
    if looks:
        sections.insert(1, Section("Metrics", _metrics_text(looks[-1]["metrics"]), [_metrics(looks)]))
    elif len(data.classes) < 2:
        sections.insert(1, Section("Metrics", _NO_METRICS))
    if records and (found := records[-1].get("inception")):
        rows = [[name.replace("_", " "), str(value)] for name, value in found.items()]
        sections.insert(2, Section("Inception network", items=[Table(["", "value"], rows)]))
    return write_report(
        run.folder / REPORT,
        title=f"{config['network']} on {config['data']}, discriminator under {_constraint(config)}",
        summary=_summary(records, looks, config["steps"]),
        sections=sections,
        facts=provenance(
            seed=config["seed"],
            data=f"{data.name}, {len(data.train_images)} images, fingerprint {data.fingerprint}",
            options=", ".join(f"{name} {value}" for name, value in config.items() if value is not None),
        ),
    )


def _constraint(config: dict[str, Any]) -> str:
    rank = f" of rank {config['rank']}" if config["rank"] is not None else ""
    return f"{config['constraint']}{rank}" + (" in Stiefel form" if config["form"] == "stiefel" else "")


def _summary(records: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]], steps: int) -> str:
    if not records:
        return f"No step of {steps} is recorded yet."
    last = records[-1]
    violation = max(record["spectrum_violation"] for record in records)
    text = (
        f"After {last['step']} of {steps} steps. Singular values were at most {violation:.2g} off what the constraint "
        f"allows, at every record; the discriminator's Lipschitz bound is {last['lipschitz_bound']:.3g}."
    )
    if looks:
        found = looks[-1]["metrics"]
        text += (
            f" Fréchet distance {found['frechet_distance']:.4g}, precision {found['precision']:.2f}, recall "
            f"{found['recall']:.2f}, {100 * found['mode_coverage']:.0f} % of the classes."
        )
    return text


# -------------------------------------------------------------------------------------------------------- samples


def _sample_figures(run: Run) -> list[Figure]:
    folder = run.folder / SAMPLES
    figures = []
    if found := pictures(run.folder):
        step = int(found[-1].stem.removeprefix("step-"))
        figures.append(Figure(_pictures(("data", folder / "data.png"), (f"step {step}", found[-1])), _GRID_CAPTION))
        paths = found[-1].with_name(f"{found[-1].stem}-paths.png")
        figures.append(Figure(_pictures((f"step {step}", paths)), _PATHS_CAPTION))
    if len(found) > 1:
        shown = [found[i * (len(found) - 1) // 3] for i in range(4)] if len(found) > 4 else found[:-1]
        titled = [(f"step {int(path.stem.removeprefix('step-'))}", path) for path in shown]
        figures.append(Figure(_pictures(*titled), "The same latent vectors at other steps of the run."))
    return figures


def _pictures(*titled: tuple[str, Path]) -> MatplotlibFigure:
    from matplotlib import pyplot

    with figure_style():
        figure, axes = pyplot.subplots(1, len(titled), figsize=(9.2, 9.2 / max(2, len(titled)) + 0.4), squeeze=False)
        for ax, (title, path) in zip(axes[0], titled, strict=True):
            ax.imshow(pyplot.imread(path), cmap="gray", interpolation="nearest")
            ax.set_title(title)
            ax.axis("off")
    pyplot.close(figure)
    return figure


# -------------------------------------------------------------------------------------------------------- spectra


def _spectra_items(records: Sequence[dict[str, Any]]) -> list[Figure | Table]:
    last = records[-1]["spectra"]
    rows = [[name, *(f"{figures[key]:.4g}" for key in LAYER_FIGURES)] for name, figures in last.items()]
    header = ["layer", *(NAMES[key] for key in LAYER_FIGURES)]
    bound = Figure(_lipschitz(records), "Bound on the discriminator's Lipschitz constant, from its layers' norms.")
    return [
        Figure(_layers(records), "Each line is a layer of the discriminator: dark the first, light the last."),
        bound,
        Table(header, rows, f"At step {records[-1]['step']}."),
    ]


def _layers(records: Sequence[dict[str, Any]]) -> MatplotlibFigure:
    from matplotlib import colormaps, pyplot

    names = list(records[-1]["spectra"])
    steps = [record["step"] for record in records]
    with figure_style():
        figure, axes = pyplot.subplots(1, len(LAYER_FIGURES), figsize=(9.2, 3.6), layout="constrained")
        for ax, key in zip(axes, LAYER_FIGURES, strict=True):
            ax.set_ylim(0, 1.08 * max(record["spectra"][name][key] for record in records for name in names) or 1)
            for i, name in enumerate(names):
                colour = colormaps["viridis"](0.1 + 0.75 * i / max(1, len(names) - 1))
                values = [record["spectra"][name][key] for record in records]
                ax.plot(steps, values, color=colour, linewidth=1.3, label=name, marker=_marker(steps))
            ax.set(title=NAMES[key], xlabel="step")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    pyplot.close(figure)
    return figure


def _lipschitz(records: Sequence[dict[str, Any]]) -> MatplotlibFigure:
    from matplotlib import pyplot

    with figure_style():
        figure, ax = pyplot.subplots(figsize=(9.2, 2.8), layout="constrained")
        _draw(ax, records, [record["lipschitz_bound"] for record in records], 0, "Lipschitz bound")
        ax.set(xlabel="step", yscale="log")
    pyplot.close(figure)
    return figure


# --------------------------------------------------------------------------------------------- losses and metrics


def _losses(records: Sequence[dict[str, Any]]) -> Figure:
    from matplotlib import pyplot

    panels = (
        {"discriminator_loss": "discriminator", "generator_loss": "generator"},
        {"real_score": "data", "generated_score": "samples"},
    )
    with figure_style():
        figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained")
        for ax, title, names in zip(axes, ("losses", "mean scores"), panels, strict=True):
            for i, (key, label) in enumerate(names.items()):
                _draw(ax, records, [record[key] for record in records], i, label)
            ax.set(title=title, xlabel="step")
            ax.legend()
    pyplot.close(figure)
    return Figure(figure, "Means over the steps since the record before.")


def _metrics(looks: Sequence[dict[str, Any]]) -> Figure:
    from matplotlib import pyplot

    with figure_style():
        figure, axes = pyplot.subplots(3, 3, figsize=(9.2, 7.2), layout="constrained", sharex=True)
        for ax, (key, title) in zip(axes.flat, METRICS.items(), strict=True):
            _draw(ax, looks, [look["metrics"][key] for look in looks], 0, title)
            ax.set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel("step")
    pyplot.close(figure)
    return Figure(figure, "Distances and class divergence: less is better. The others: more is better.")


def _draw(ax: Axes, records: Sequence[dict[str, Any]], values: Sequence[float], series: int, label: str) -> None:
    steps = [record["step"] for record in records]
    ax.plot(steps, values, color=SERIES[series], linewidth=1.5, label=label, marker=_marker(steps))


def _marker(steps: Sequence[int]) -> str:
    return "." if len(steps) < 3 else ""  # a line through one point is not seen


def _metrics_text(found: dict[str, Any]) -> str:
    return f"""
{found["samples"]} samples against the training images, in the features of
`{found["classifier"]}` trained on the same data (test accuracy {100 * found["classifier_accuracy"]:.2f} %, weights
SHA-256 `{found["classifier_hash"]}`). Figures of other classifiers, or of other numbers of samples, do not compare.
"""


_NO_METRICS = "There are no metrics: images of one class train no classifier to compare them by."
_SAMPLES_TEXT = (
    "The pictures are in the folder `samples`, those of other steps too; `latents.pt` holds their latent vectors."
)
_GRID_CAPTION = "Images of the data, and as many samples."
_PATHS_CAPTION = "Along each row the latent vector moves evenly from one to another."
_SPECTRA_TEXT = """
Singular values of each weight as the network uses it, as the matrix (out, fan-in); the least is, of a weight of rank
r, the r-th. The stable rank is the sum of their squares over the largest square: near 1, a layer sees its input along
one direction, and the spectrum has collapsed.
"""
_LOSSES_TEXT = "Losses include their penalties."
