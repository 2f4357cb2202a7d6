"""``retract inspect MODEL``: which weights of a network are scale-invariant, or the spectra of its layers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    factorize: Annotated[
        str | None,
        typer.Option(help="With --spectra, factor the layers first: svdp or sttp.", metavar="NAME", **LAYERS),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="As for `retract train`.", metavar="R", **LAYERS)] = None,
    spectrum: Annotated[str | None, typer.Option(help="As for `retract train`.", metavar="NAME", **LAYERS)] = None,
    form: Annotated[str | None, typer.Option(help="As for `retract train`.", metavar="NAME", **LAYERS)] = None,
    skip: Annotated[str | None, typer.Option(help="As for `retract train`.", metavar="PATTERNS", **LAYERS)] = None,
) -> None:
    """Show which parameters can be rescaled without changing the network: those that PSI optimizers turn.

    With --spectra, show what its layers hold and cost, and their largest and smallest singular values.

    For example:

    retract inspect resnet20

    retract inspect resnet20 --spectra --factorize sttp --rank 16 --skip conv1,fc

    retract inspect --spectra runs/digits-digitsnet-svdp8-sgd-0
    """
    options = {"factorize": factorize, "rank": rank, "spectrum": spectrum, "form": form, "skip": skip}
    if spectra:
        typer.echo(_spectra(model, options, as_json))
        return
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise typer.BadParameter("means something only with --spectra", param_hint=" and ".join(given))
    from rich.console import Console

    from retract.nets import find_scale_invariant

    network, example_input = _model_and_input(model, input_shape, batch)
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

    from .experiment import load_model
    from .factorization import Factorization, fill_in
    from .runs import Run

    layers = Factorization.of(fill_in(options))
    if Path(spec).is_dir():
        if layers is not None:
            raise typer.BadParameter("the layers of a run are as they are", param_hint="--factorize")
        network = load_model(Run.open(spec))
    else:
        network, _ = _model(spec)
        if layers is not None:
            layers.apply(network)
    found = summary(network)
    if not as_json:
        return str(found)
    totals = {"degrees_of_freedom": found.degrees_of_freedom, "elements": found.elements, "z": found.compression}
    return json.dumps({"layers": [asdict(layer) for layer in found.layers], **totals}, indent=2)


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


def _model_and_input(spec: str, input_shape: str | None, batch: int) -> tuple[nn.Module, tuple[Any, ...]]:
    import torch

    from retract.nets import cnn

    shape = cnn.INPUT_SHAPES.get(spec) if input_shape is None else _shape(input_shape)
    model, example_input = _model(spec)
    if shape is not None:
        example_input = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    if example_input is None:
        raise typer.BadParameter(f"{spec} has no default input: say --input-shape 3,32,32", param_hint="--input-shape")
    return model, example_input if isinstance(example_input, tuple) else (example_input,)


def _model(spec: str) -> tuple[nn.Module, Any]:
    """The network that a specification names, and the example input if it brings one."""
    import torch

    from retract.nets import cnn

    made = cnn.MODELS[spec]() if spec in cnn.MODELS else _made(spec)
    model, example_input = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise typer.BadParameter(f"{spec} gave a {type(model).__name__}, not a torch.nn.Module", param_hint="MODEL")
    return model, example_input


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(f"got {text!r}, want positive sizes such as 3,32,32", param_hint="--input-shape")
    return shape


def _made(spec: str) -> Any:
    """What ``path/to/file.py:NAME`` or ``package.module:NAME`` gives."""
    source, _, name = spec.rpartition(":")
    if not source:
        from retract.nets import cnn

        raise typer.BadParameter(
            f"{spec!r} is no model of the zoo ({', '.join(cnn.MODELS)}), nor of the form "
            "path/to/file.py:NAME or package.module:NAME",
            param_hint="MODEL",
        )
    module = _module_from_file(Path(source)) if source.endswith(".py") else _module_by_name(source)
    if not hasattr(module, name):
        raise typer.BadParameter(f"{source} has no {name!r}", param_hint="MODEL")
    found = getattr(module, name)
    # A module is callable too, but it is the answer already.
    return found() if (callable(found) and not hasattr(found, "state_dict")) or isinstance(found, type) else found


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}", param_hint="MODEL")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module_by_name(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"cannot import {name}: {error}", param_hint="MODEL") from error
