"""What every network of the zoo shares: it knows which of its weights are scale-invariant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from retract.manifolds import PSI

from .._groups import named_groups, put_on_manifolds

__all__ = ["ConvBN", "ZooModel", "conv", "kaiming_fan_out_", "on_manifold"]

Manifold = Literal["psi"] | None


class ZooModel(nn.Module):
    """A network whose modules declare, as ``scale_invariant``, their layers that feed normalisations only."""

    def manifold_groups(self, euclidean_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for the PSI optimizers, from structure alone.

        Args:
            euclidean_lr: learning rate of the group of all other parameters, the optimizer's own if ``None``.

        Returns:
            What `retract.nets.scale_invariant_groups` measures: dictionaries with ``"params"``, a list of
            ``(name, parameter)``, and ``"manifold"`` except in the last.
        """
        return named_groups(self, self.manifolds(), euclidean_lr)

    def manifolds(self) -> dict[str, PSI]:
        """The manifold of every scale-invariant weight, by parameter name."""
        return {f"{name}.weight": PSI() for name in self._scale_invariant_layers()}

    def _scale_invariant_layers(self) -> Iterator[str]:
        for prefix, module in self.named_modules():
            for local in getattr(module, "scale_invariant", ()):
                yield f"{prefix}.{local}" if prefix else local


class ConvBN(nn.Sequential):
    """Convolution without bias, then BatchNorm: the convolution's filters are scale-invariant."""

    scale_invariant: ClassVar[tuple[str, ...]] = ("0",)

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int | None = None):
        super().__init__(
            conv(in_channels, out_channels, kernel, stride, padding),
            nn.BatchNorm2d(out_channels),
        )


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    """Convolution without bias, padded to keep the size at stride 1 unless said otherwise."""
    padding = kernel // 2 if padding is None else padding
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)


def kaiming_fan_out_(model: nn.Module) -> None:
    """Initialise convolutions by He's normal rule with fan-out; other layers keep torch's defaults.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, eq. (14).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


Model = TypeVar("Model", bound=ZooModel)


def on_manifold(model: Model, manifold: Manifold) -> Model:
    """For ``"psi"`` make the scale-invariant weights `geoopt.ManifoldParameter`; for ``None`` do nothing."""
    if manifold is None:
        return model
    if manifold != "psi":
        raise ValueError(f"manifold must be None or 'psi', got {manifold!r}")
    manifolds = model.manifolds()
    if not manifolds:
        raise ValueError(
            f"manifold='psi' needs scale-invariant weights; {type(model).__name__} has no normalisation layer"
        )
    put_on_manifolds(model, manifolds)
    return model
