"""Exact arithmetic for networks that were not written for it: float64, tiny epsilons, repeatable draws."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["exact_conditions", "float64_copy", "make_exact", "widened"]

# Far below the float64 rounding of any variance a network meets, yet 1 / eps is finite: a channel without
# variance then yields large numbers, not infinities.
TINY = 1e-60
_EPSILONS = ("eps", "epsilon", "variance_epsilon", "norm_eps")
_NORMALIZATIONS = (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm, F.normalize)
_NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)
_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in float64; a ValueError says why there is none."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise ValueError(f"model: {name} is not initialised yet; run one forward pass of the lazy model first")
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device and has no values; materialise the model first")
    try:
        return copy.deepcopy(model).double()
    except Exception as error:
        raise ValueError(
            f"model: it cannot be copied into float64 ({error}); models that hold computed tensors, such as "
            "the old torch.nn.utils.weight_norm, have a form in torch.nn.utils.parametrizations that can"
        ) from error


def make_exact(model: nn.Module, *, all_training: bool) -> None:
    """Set epsilons that modules hold to `TINY`, switch dropout off and, if asked, the rest to training."""
    if all_training:
        model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        for name in _EPSILONS:
            value = getattr(module, name, None)
            if isinstance(value, float) and 0 < value <= 1e-2:
                setattr(module, name, TINY)


@contextmanager
def exact_conditions(seed: int, devices: set[torch.device]) -> Iterator[None]:
    """Run what is inside with gradients, in float64, without autocast or compilation, from seeded generators.

    The caller's contexts, default type and random states come back afterwards.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(device.type for device in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_default_dtype(torch.float64))
        stack.enter_context(_seeded(seed, [d for d in devices if d.type == "cuda"]))
        stack.enter_context(_Float64())
        yield


class _Float64(TorchFunctionMode):
    """Lift every type that a network names to float64, and every epsilon of a function to `TINY`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _NARROWING:
            return args[0].double()
        kwargs = kwargs or {}
        if func in _NORMALIZATIONS:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.arguments["eps"] = TINY
            args, kwargs = bound.args, bound.kwargs
        args, kwargs = pytree.tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


def widened(value: object) -> object:
    """A type, or a tensor that is neither parameter nor buffer, in float64."""
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, Tensor) and value.dtype in _WIDER:
        return value.to(_WIDER[value.dtype])
    return value


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _seeded(seed: int, cuda_devices: list[torch.device]) -> Iterator[None]:
    """Seed the generators of torch, Python and NumPy, and put their states back afterwards."""
    # NumPy's legacy state is the one that networks draw from.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[d.index or 0 for d in cuda_devices]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        for device in cuda_devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
