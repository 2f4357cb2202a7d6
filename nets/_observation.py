"""What one forward pass shows of layers: sizes of inputs and outputs, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._following import Following, following

__all__ = ["Observation", "observe"]

#: Dimensions of the output of a layer whose channels are where batch normalizations look for them, behind the batch.
_BATCHED: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}


@dataclass(frozen=True)
class Observation:
    """What a forward pass has shown of one layer."""

    #: Shapes of input and output, of each call.
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]]
    #: The batch normalization and the rectifier after the first call, if they are there.
    following: Following


@torch.no_grad()
def observe(model: nn.Module, layers: Mapping[str, nn.Module], example_input: Any) -> dict[str, Observation]:
    """Run a model once in evaluation mode and look at some of its layers. The model is left as it was.

    Args:
        model: a network.
        layers: those to look at, by name: linear layers and convolutions of torch.
        example_input: one tensor, or the tuple of positional arguments of a forward pass.

    Raises:
        ValueError: the forward pass fails, or does not call one of the layers.
    """
    calls: dict[nn.Module, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {layer: [] for layer in layers.values()}

    def look_at(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        (given,) = (*arguments, *named.values())
        calls[layer].append((tuple(given.shape), tuple(output.shape)))

    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as undo:
        for layer in layers.values():
            undo.callback(layer.register_forward_hook(look_at, with_kwargs=True).remove)
        try:
            model.eval()
            found = following(layers, lambda: model(*inputs))
        except Exception as error:
            raise ValueError(f"example_input: the model's forward pass failed on it: {error}") from error
        finally:
            for module, training in modes:
                module.training = training
    if missed := [name for name, layer in layers.items() if not calls[layer]]:
        raise ValueError(f"example_input: the forward pass on it does not call {', '.join(missed)}")
    return {
        name: Observation(calls[layer], _of_channels(found[name], layer, calls[layer]))
        for name, layer in layers.items()
    }


def _of_channels(after: Following, layer: nn.Module, calls: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Following:
    """What follows, without a normalization that is of other axes than the layer's outputs."""
    return after if len(calls[0][1]) == _BATCHED[type(layer)] else replace(after, normalization=None)
