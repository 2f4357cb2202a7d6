"""``retract inspect MODEL``: which weights of a network are scale-invariant, the spectra of its layers, by what they
multiply the variance of signals and gradients, or what they would be with weights of low rank.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .model_argument import load_model, load_model_and_input

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from retract.nets import Invariance

__all__ = ["inspect_command", "invariance_table"]

LAYERS = {"rich_help_panel": "Factored layers"}
_ANSWER = {
    "filter": "per filter",
    "group": "per group",
    "whole": "as a whole",
    "bias": "with bias",
    "none": "no",
}


def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model of the zoo (resnet20, ...), path/to/file.py:NAME or package.module:NAME. NAME is a "
            "torch module, or a callable that returns one, or returns a pair (module, example_input). "
            "With --spectra also the folder of a run.",
        ),
    ],
    input_shape: Annotated[
        str | None,
        typer.Option(help="Shape of one input, such as 3,32,32. Models of the zoo have a default."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs in the batch, drawn from a standard normal law.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    spectra: Annotated[
        bool,
        typer.Option(
            "--spectra", help="Show ranks, degrees of freedom, cost and singular values of the layers instead."
        ),
    ] = False,
    variance: Annotated[
        bool,
        typer.Option(
            "--variance", help="Show by what each layer multiplies the variance of signals and of gradients instead."
        ),
    ] = False,
    lowrank: Annotated[
        bool,
        typer.Option(
            "--lowrank",
            help="Show what layers of low rank would cost instead, and how far each initialization of them is from "
            "the function of the layer: with --rank, --budget (default 0.25) or --energy.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --variance, draw it to a file: .png, .svg, .pdf.", metavar="FILE", show_default=False),
    ] = None,
    factorize: Annotated[
        str | None,
        typer.Option(
            help="With --spectra or --variance, factor the layers first, as `retract train` does.",
            metavar="NAME",
            **LAYERS,
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="As for `retract train`.", metavar="R", **LAYERS)] = None,
    budget: Annotated[float | None, typer.Option(help="As for `retract train`.", metavar="X", **LAYERS)] = None,
    error: Annotated[float | None, typer.Option(help="As for `retract train`.", metavar="X", **LAYERS)] = None,
    energy: Annotated[float | None, typer.Option(help="As for `retract train`.", metavar="X", **LAYERS)] = None,
    unfolding: Annotated[
        str | None,
        typer.Option(
            help="With --lowrank: the matrix of a convolution, of its output channels (output, the default), with all "
            "axes of the kernel on their side (input), or one (separable).",
            metavar="NAME",
            **LAYERS,
        ),
    ] = None,
    spectrum: Annotated[str | None, typer.Option(help="As for `retract train`.", metavar="NAME", **LAYERS)] = None,
    form: Annotated[str | None, typer.Option(help="As for `retract train`.", metavar="NAME", **LAYERS)] = None,
    skip: Annotated[str | None, typer.Option(help="As for `retract train`.", metavar="PATTERNS", **LAYERS)] = None,
) -> None:
    """Show which parameters can be rescaled without changing the network: those that PSI optimizers turn.

    With --spectra, show what its layers hold and cost, and their largest and smallest singular values. With --variance,
    show second moments of every layer's output and of its gradient, each over that of the layer before: a deep network
    without normalisation trains if they are near one. With --lowrank, show rank, parameters and errors of the layer of
    low rank that could take the place of each layer.

    For example:

    retract inspect resnet20

    retract inspect resnet20 --spectra --factorize sttp --rank 16 --skip conv1,fc

    retract inspect --spectra runs/digits-digitsnet-svdp8-sgd-0

    retract inspect cifar_alexnet --variance --plot variance.png

    retract inspect resnet20 --lowrank --budget 0.3
    """
    sizes = {"rank": rank, "budget": budget, "error": error, "energy": energy}
    options = {"factorize": factorize, **sizes, "spectrum": spectrum, "form": form, "skip": skip}
    tables = {"--spectra": spectra, "--variance": variance, "--lowrank": lowrank}
    if sum(tables.values()) > 1:
        asked = " and ".join(name for name, wanted in tables.items() if wanted)
        raise typer.BadParameter("ask for two tables: choose one", param_hint=asked)
    if unfolding is not None and not lowrank:
        raise typer.BadParameter("means something only with --lowrank", param_hint="--unfolding")
    if plot is not None and not variance:
        raise typer.BadParameter("means something only with --variance", param_hint="--plot")
    if lowrank:
        from .inspect_lowrank import lowrank_text

        typer.echo(lowrank_text(model, input_shape, batch, {**options, "unfolding": unfolding}, as_json))
        return
    if spectra:
        typer.echo(_spectra(model, options, as_json))
        return
    if variance:
        typer.echo(_variance(model, input_shape, batch, options, plot, as_json))
        return
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise typer.BadParameter("means something only with --spectra or --variance", param_hint=" and ".join(given))
    from rich.console import Console

    from retract.nets import find_scale_invariant

    network, example_input = load_model_and_input(model, input_shape, batch)
    try:
        if as_json:
            typer.echo(json.dumps(_as_dict(network, find_scale_invariant(network, *example_input)), indent=2))
        else:
            Console().print(invariance_table(network, example_input, title=model))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from error


def _spectra(spec: str, options: dict[str, Any], as_json: bool) -> str:
    """What `retract.nets.summary` says of a model, factored as the options say, or of a run's: a table or JSON."""
    from retract.nets.summary import summary

    from .experiment import load_model as load_model_of_run
    from .factorization import Factorization, fill_in
    from .runs import Run

    layers = Factorization.of(fill_in(options))
    if Path(spec).is_dir():
        if layers is not None:
            raise typer.BadParameter("the layers of a run are as they are", param_hint="--factorize")
        network = load_model_of_run(Run.open(spec))
    else:
        network, _ = load_model(spec)
        if layers is not None:
            layers.apply(network)
    found = summary(network)
    if not as_json:
        return str(found)
    totals = {"degrees_of_freedom": found.degrees_of_freedom, "elements": found.elements, "z": found.compression}
    return json.dumps({"layers": [asdict(layer) for layer in found.layers], **totals}, indent=2)


def _variance(
    spec: str, input_shape: str | None, batch: int, options: dict[str, Any], plot: Path | None, as_json: bool
) -> str:
    """What `retract.nets.init.variance_report` says of a model, its weights drawn with a seed: a table or JSON."""
    import torch

    from retract.nets.init.variance_report import variance_report

    from .factorization import Factorization, fill_in

    layers = Factorization.of(fill_in(options))
    torch.manual_seed(0)
    network, example_input = load_model_and_input(spec, input_shape, batch)
    if layers is not None:
        layers.apply(network)
    try:
        found = variance_report(network, *example_input)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from error
    if plot is not None:
        try:
            found.plot(plot)
        except (OSError, ValueError) as error:  # no such folder, or a suffix that matplotlib does not know
            raise typer.BadParameter(str(error), param_hint="--plot") from error
    if not as_json:
        return str(found)
    rows = [{name: _finite(value) for name, value in asdict(layer).items()} for layer in found.layers]
    means = {name: [_finite(mean) for mean in getattr(found, name)] for name in ("forward", "backward")}
    return json.dumps({"layers": rows, **means}, indent=2)


def _finite(value: Any) -> Any:
    """What JSON has no word for is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def invariance_table(model: nn.Module, example_input: Any, title: str | None = None) -> Table:
    """Table of every parameter of ``model``: shape, what it is invariant to, manifold, residual.

    Args:
        model: any network.
        example_input: one tensor, or the tuple of positional arguments of a forward pass.
        title: title of the table.

    Raises:
        ValueError: as `retract.nets.find_scale_invariant`.
    """
    from rich.table import Table
    from rich.text import Text

    from retract.nets import find_scale_invariant

    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    found = find_scale_invariant(model, *inputs)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    invariant = {name: i.manifold for name, i in found.items() if i.manifold is not None}
    entries = sum(math.prod(shapes[name]) for name in invariant)
    total = sum(math.prod(shape) for shape in shapes.values())
    scales = sum(manifold.num_scales(shapes[name]) for name, manifold in invariant.items())

    table = Table(
        title=title and Text(title),
        caption=f"{len(invariant)} of {len(found)} parameters are scale-invariant: "
        f"{entries:,} of {total:,} entries, {scales:,} scales.",
    )
    for heading in ("parameter", "shape", "scale-invariant", "manifold"):
        table.add_column(heading, no_wrap=heading == "parameter", overflow="fold")
    table.add_column("|cos|", justify="right")
    for name, i in found.items():
        shape = "x".join(map(str, shapes[name])) or "scalar"
        answer = ", ".join(filter(None, (_ANSWER[i.kind], i.reason)))
        row = (name, shape, answer, str(i.manifold or ""), _figure(i.residual))
        table.add_row(*map(Text, row), style="bold" if i.manifold is not None else None)
    return table


def _as_dict(model: nn.Module, found: dict[str, Invariance]) -> dict[str, Any]:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return {
        name: {
            "shape": shapes[name],
            "kind": i.kind,
            "manifold": None if i.manifold is None else {"name": i.manifold.name, **i.manifold.arguments},
            "partner": i.partner,
            "residual": None if math.isnan(i.residual) else i.residual,
            "reason": i.reason,
        }
        for name, i in found.items()
    }


def _figure(residual: float) -> str:
    return "" if math.isnan(residual) else f"{residual:.1e}"
