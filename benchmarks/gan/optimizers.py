"""The optimizers of one network of a GAN: Adam, and RiemannianSGD for weights that are points of a manifold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from retract.nets.parametrizations.models import manifold_groups
from retract.optim import RiemannianSGD

__all__ = ["MANIFOLD_LR", "SCHEDULES", "NetworkOptimizer"]

MANIFOLD_LR = 0.1

# Factor of the learning rates at a fraction of the steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


class NetworkOptimizer:
    """Steps every parameter of a network, each by the optimizer that is made for it.

    Args:
        network: generator or discriminator, its constraint already on it.
        lr: of Adam, which steps all parameters but points of manifolds, Householder coordinates among them.
        betas: of Adam; the first is the momentum of RiemannianSGD too.
        manifold_lr: of RiemannianSGD, which steps weights in Stiefel form. It multiplies a gradient, where ``lr`` is
            about the length of a step: it is the larger one.
        schedule: of `SCHEDULES`: by what both learning rates are multiplied.
        steps: of the whole schedule. The last step of "linear" is taken with 1 / steps of the first one's rates.

    Raises:
        ValueError: an unknown schedule, a learning rate that is not positive and finite, or betas outside [0, 1).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.0, 0.9),
        manifold_lr: float = MANIFOLD_LR,
        schedule: str = "linear",
        steps: int,
    ) -> None:
        for name, value in (("lr", lr), ("manifold_lr", manifold_lr)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        groups = manifold_groups(network)
        points = [group for group in groups if "manifold" in group]
        others = [parameter for group in groups if "manifold" not in group for _, parameter in group["params"]]
        self.optimizers: list[Optimizer] = []
        if others:
            self.optimizers.append(Adam(others, lr, betas, fused=True))
        if points:
            self.optimizers.append(RiemannianSGD(points, manifold_lr, momentum=betas[0]))
        curve = SCHEDULES[schedule]
        self._schedulers = [LambdaLR(optimizer, lambda step: curve(step / steps)) for optimizer in self.optimizers]
        self._parts: tuple[Any, ...] = (*self.optimizers, *self._schedulers)

    def minimise(self, loss: Tensor) -> None:
        """Take one step against the gradient of ``loss``."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def advance(self) -> None:
        """Go on to the learning rates of the next step of the schedule."""
        for scheduler in self._schedulers:
            scheduler.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of every optimizer, then of every scheduler."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take up the state of one that was built the same way."""
        for part, saved in zip(self._parts, state, strict=True):
            part.load_state_dict(saved)
