"""Which layers of a model an argument speaks of: by names and patterns, or by a function of name and module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TypeVar

from torch import nn

from ._layers import weight_layers

__all__ = ["PerLayer", "Selection", "Skip"]

Choice = TypeVar("Choice")
PerLayer = Mapping[str, Choice] | Callable[[str, nn.Module], Choice | None]
Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


class Selection:
    """The layers of a model, and the two ways to speak of some of them: by patterns, or by a function."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = weight_layers(model)
        names: dict[nn.Module, list[str]] = {module: [] for module in self.modules.values()}
        for name, module in model.named_modules(remove_duplicate=False):
            if module in names:
                names[module].append(name)
        self._names = {name: names[module] for name, module in self.modules.items()}

    def choose(self, argument: str, value: Choice | PerLayer[Choice] | None) -> dict[str, Choice]:
        """What an argument says for each layer; layers for which it is None are left out."""
        chosen: dict[str, Choice | None] = {}
        if isinstance(value, Mapping):
            for pattern, one in value.items():
                for name in self.fitting(argument, pattern):
                    chosen.setdefault(name, one)
        elif callable(value):
            chosen = {name: value(name, module) for name, module in self.modules.items()}
        else:
            chosen = dict.fromkeys(self.modules, value)
        return {name: one for name, one in chosen.items() if one is not None}

    def skipped(self, skip: Skip) -> list[str]:
        """Names of the layers that the argument says to leave."""
        if callable(skip):
            return [name for name, module in self.modules.items() if skip(name, module)]
        patterns = (skip,) if isinstance(skip, str) else skip
        return [name for pattern in patterns for name in self.fitting("skip", pattern)]

    def fitting(self, argument: str, pattern: str) -> list[str]:
        """Names of the layers of which one name, or that of a module around them, fits the pattern."""
        found = [name for name, names in self._names.items() if any(_fits(one, pattern) for one in names)]
        if not found:
            shown = ", ".join(list(self.modules)[:8]) + (", ..." if len(self.modules) > 8 else "")
            raise ValueError(f"{argument}: {pattern!r} fits no layer of the model, which has {shown or 'none'}")
        return found


def _fits(name: str, pattern: str) -> bool:
    ancestors = accumulate(name.split("."), "{}.{}".format)
    return any(fnmatchcase(ancestor, pattern) for ancestor in ancestors)
