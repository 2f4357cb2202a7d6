"""What generators and discriminators share: they know which of their weights live on which manifold."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..parametrizations.models import manifold_groups

__all__ = ["GANModel", "check_positive"]


class GANModel(nn.Module):
    """A generator or a discriminator."""

    def manifold_groups(self, euclidean_lr: float | None = None) -> list[dict[str, Any]]:
        """Param groups for the optimizers of `retract.optim`, from the constraint that the weights are under.

        Args:
            euclidean_lr: learning rate of the group of all other parameters, the optimizer's own if ``None``.

        Returns:
            One group with its manifold for each weight in Stiefel form (`retract.nets.gan.constrain`), then one with
            all other parameters, as pairs ``(name, parameter)``.
        """
        return manifold_groups(self, euclidean_lr)


def check_positive(**positive: int) -> None:
    """Refuse sizes below one, by the names of the arguments."""
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value!r}")
