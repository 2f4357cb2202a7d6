"""The argument MODEL of a command: a network of the zoo, or one that a file or a package holds."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load_model", "load_model_and_input"]


def load_model_and_input(spec: str, input_shape: str | None, batch: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """The network that a specification names, and the positional arguments of one forward pass.

    Args:
        spec: as for `load_model`.
        input_shape: of one input, such as "3,32,32"; None: that of the zoo, or the input that the network comes with.
        batch: inputs in the batch, drawn from a standard normal law with a seed of their own.

    Raises:
        typer.BadParameter: as `load_model`, or there is no input.
    """
    import torch

    from retract.nets import cnn

    shape = cnn.INPUT_SHAPES.get(spec) if input_shape is None else _shape(input_shape)
    model, example_input = load_model(spec)
    if shape is not None:
        example_input = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    if example_input is None:
        raise typer.BadParameter(f"{spec} has no default input: say --input-shape 3,32,32", param_hint="--input-shape")
    return model, example_input if isinstance(example_input, tuple) else (example_input,)


def load_model(spec: str) -> tuple[nn.Module, Any]:
    """The network that a specification names, and the example input if it brings one.

    Args:
        spec: a name of the zoo, ``path/to/file.py:NAME`` or ``package.module:NAME``, where NAME is a module, a callable
            that returns one, or one that returns a pair (module, example input).

    Raises:
        typer.BadParameter: it names nothing, or no `torch.nn.Module`.
    """
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
