"""How a convolution moves over its input: the arguments of `torch.nn.Conv2d` that say so, checked and written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

__all__ = ["ConvolutionGeometry", "PaddingMode", "padding_amounts", "positive", "shown"]

PaddingMode: TypeAlias = Literal["zeros", "circular", "reflect", "replicate"]


class ConvolutionGeometry(NamedTuple):
    """One number for each spatial dimension; ``amounts`` are those before and after it that ``padding`` means."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: PaddingMode
    amounts: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        kernel_size: int | Sequence[int],
        spatial: int,
        *,
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
        padding_mode: PaddingMode,
    ) -> ConvolutionGeometry:
        """From a layer's arguments, with ``spatial`` dimensions.

        Raises:
            ValueError: an argument that torch's convolutions do not take.
        """
        if padding_mode not in get_args(PaddingMode):
            allowed = ", ".join(map(repr, get_args(PaddingMode)))
            raise ValueError(f"padding_mode must be one of {allowed}, got {padding_mode!r}")
        kernel_size, stride, dilation = (
            positive(name, value, spatial)
            for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        amounts = padding_amounts(padding, kernel_size, dilation)
        if padding == "same" and any(step > 1 for step in stride):
            raise ValueError(f"padding must not be 'same' for a strided convolution, got stride {stride}")
        numbers = padding if isinstance(padding, str) else tuple(before for before, _ in amounts)
        return cls(kernel_size, stride, numbers, dilation, padding_mode, amounts)


def shown(layer: Any) -> str:
    """What `print` shows of a layer's geometry, but for the kernel: what is not torch's default."""
    count = len(layer.stride)
    defaults: dict[str, Any] = {"stride": (1,) * count, "padding": (0,) * count, "dilation": (1,) * count}
    defaults |= {"groups": 1, "padding_mode": "zeros"}
    found = {name: getattr(layer, name) for name in defaults}
    return "".join(f", {name}={value!r}" for name, value in found.items() if value != defaults[name])


def positive(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Positive integers, one for each dimension.

    Raises:
        ValueError: another count, or one below 1.
    """
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count or not all(isinstance(one, int) and one >= 1 for one in values):
        raise ValueError(f"{name} must be a positive integer, or {count} of them, got {value!r}")
    return values


def padding_amounts(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """What is added before and after each axis.

    Raises:
        ValueError: no such padding.
    """
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    count = len(kernel)
    values: tuple[object, ...] = (padding,) * count if isinstance(padding, int) else tuple(padding)
    numbers = [value for value in values if isinstance(value, int) and value >= 0]
    if len(values) != count or len(numbers) != count:
        raise ValueError(f"padding must be 'same', 'valid', a non-negative integer or {count} of them, got {padding!r}")
    return tuple((number, number) for number in numbers)
