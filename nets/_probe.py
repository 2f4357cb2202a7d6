"""A float64 copy of a network in which invariance is exact, so that a measurement can settle it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ._exact import exact_conditions, float64_copy, make_exact, widened

__all__ = ["Probe", "float_tensors"]


class Probe:
    """A float64 copy of ``model``, its inputs, and the conditions of an exact measurement.

    The copy is in training mode. A model that is in training mode as a whole keeps the flag of each of its
    modules (a BatchNorm that the user froze by ``.eval()`` stays frozen); a model in eval mode is put into
    training mode whole. Dropout is off, every other random draw repeats, buffers start from the same values
    in each pass, and epsilons of normalisations are tiny: as attributes of modules and as arguments of
    `torch.nn.functional`. Casts to lower precision inside the network are lifted to float64.

    Args:
        model: any module; only copies of it run.
        example_input: the positional arguments of one forward pass.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model cannot be copied or run on ``example_input``, or the input cannot show anything.
    """

    def __init__(self, model: nn.Module, example_input: tuple[Any, ...]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        with torch.inference_mode(False):
            self.model = float64_copy(model)
            self.inputs = pytree.tree_map(_private_copy, example_input)
        self.parameters = dict(self.model.named_parameters())
        _check_varies(self.inputs)
        make_exact(self.model, all_training=not model.training)
        for parameter in self.parameters.values():
            parameter.requires_grad_(parameter.is_floating_point())
        self._start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self._ensure_variance()

    def outputs(self, seed: int = 0) -> list[Tensor]:
        """Floating-point tensors of one forward pass, complex ones as real pairs."""
        with self._conditions(seed):
            return [out.detach() for out in self._forward()]

    def gradients(self, seed: int) -> dict[str, Tensor]:
        """Gradient of a random linear function of the outputs, for every parameter that one reaches."""
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        with self._conditions(seed):
            outputs = [out for out in self._forward() if out.requires_grad]
            if not outputs:
                raise ValueError("model: no output depends on a parameter; return tensors that carry gradients")
            generator = torch.Generator().manual_seed(seed)
            scalar = sum(((out * _weights_like(out, generator)).sum() for out in outputs), outputs[0].new_zeros(()))
            values = torch.autograd.grad(scalar, [self.parameters[n] for n in names], allow_unused=True)
        found = zip(names, values, strict=True)
        return {name: g.to_dense() if g.is_sparse else g for name, g in found if g is not None}

    @torch.no_grad()
    def randomize(self, seed: int, *, signs: bool = False) -> None:
        """Move every parameter to a generic point near its start.

        Zero biases and gains, or equal ones, as at initialisation, hide what the network depends on: with a
        zero shift even the gain of a BatchNorm passes for scale-invariant. Random ``signs`` also bring dead
        units back to life, but may leave the domain of a parametrization.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.parameters.items():
            start = self._start[name]
            if not start.is_floating_point() or start.numel() == 0:
                continue
            size = float(start.square().mean().sqrt()) or 1.0
            factor = 0.75 + 0.5 * torch.rand(start.shape, generator=generator, dtype=torch.float64)
            if signs:
                factor *= 2 * torch.randint(0, 2, start.shape, generator=generator) - 1
            shift = 0.1 * size * torch.randn(start.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(torch.where(start == 0, shift.to(start), start * factor.to(start)))

    def reset(self) -> None:
        """Put every parameter back to the model's value."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._start[name])

    def _forward(self) -> list[Tensor]:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])
        try:
            result = self.model(*self.inputs)
        except Exception as error:
            raise ValueError(f"the model's forward pass failed on example_input in float64: {error}") from error
        tensors = list(float_tensors(result))
        if not tensors:
            raise ValueError(f"model: the forward pass returned no floating-point tensor but {type(result).__name__}")
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError("model: the outputs on example_input are not finite, so nothing can be measured")
        return tensors

    def _conditions(self, seed: int) -> AbstractContextManager[None]:
        return exact_conditions(seed, {p.device for p in self.parameters.values()})

    def _ensure_variance(self) -> None:
        """Grow the batch when a BatchNorm sees at most two values a channel.

        Two values normalise to -1 and 1 whatever the weights are, so no gradient passes.
        """
        if self._starved():
            self.inputs = pytree.tree_map(_grown, self.inputs)
            starved = self._starved()
            if starved:
                raise ValueError(
                    f"example_input: {starved} normalises two values or fewer per channel, which hides what "
                    "its weights do; give a larger batch or larger inputs"
                )

    def _starved(self) -> str | None:
        """Name of a BatchNorm in training mode that sees two values or fewer per channel, if there is one."""
        found: list[str] = []

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor) and args[0].numel() <= 2 * args[0].shape[1]:
                    found.append(name)

            return hook

        norms = [(n, m) for n, m in self.model.named_modules() if isinstance(m, _BatchNorm) and m.training]
        handles = [module.register_forward_pre_hook(watch(name)) for name, module in norms]
        try:
            self.outputs()
        except ValueError:
            if not found:
                raise
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None


def float_tensors(value: object) -> Iterator[Tensor]:
    """Floating-point tensors inside nested mappings, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        if value.is_complex():
            yield torch.view_as_real(value)
        elif value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from float_tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from float_tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from float_tensors(vars(value))


def _private_copy(value: object) -> object:
    return widened(value.detach().clone()) if isinstance(value, Tensor) else value


def _grown(value: object) -> object:
    """Four times the batch: noisy copies of real inputs, shifted copies of integer ones."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if not value.is_floating_point():
        return torch.cat([value.roll(shift, -1) for shift in range(4)])
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value) for _ in range(3)]
    return torch.cat([value, *(value + value.std() * n for n in noise)])


def _weights_like(out: Tensor, generator: torch.Generator) -> Tensor:
    size = float(out.detach().square().mean().sqrt()) or 1.0
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) / size


def _check_varies(inputs: object) -> None:
    tensors = list(float_tensors(inputs))
    if tensors and all(t.numel() == 0 or bool((t == t.flatten()[0]).all()) for t in tensors):
        raise ValueError("example_input is constant, so nothing can be measured on it; give a batch of data or noise")
