"""PSIGD: full-batch gradient descent on weights that are scale-invariant (Yi, UAI 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._base import Params
from ._turning import check_scale_group, require_scale_groups
from .riemannian_descent import RiemannianGD

__all__ = ["PSIGD"]


class PSIGD(RiemannianGD):
    r"""Gradient descent for networks whose weights feed a normalisation: PSI-GD of the paper's Theorem 2.

    .. math::
        w_i \leftarrow \text{retr}(w_i, -t\,\gamma\,\|w_i\|^2 g_i), \qquad
        \theta \leftarrow \theta - t\,\gamma_\theta\, g_\theta

    with t = 1, or t common to all parameters and found by Armijo backtracking. With fixed steps at the
    inverse Lipschitz constants of the gradients at unit norms, the least squared gradient norm of T steps is
    at most 2 L (loss_0 - inf loss) / T (Theorem 2). The line search makes the loss fall at every step without
    knowing those constants. Neither steps nor the decisions of the line search depend on the scales of the
    weights.

    Arguments, closure, result and attributes are those of `RiemannianGD`; every manifold must have scale
    groups. Each filter keeps its norm, where the paper's norms grow: the points of the quotient are the same.

    Raises:
        ValueError: as `RiemannianGD`; no weight on a manifold, or one on a manifold without scale groups.

    Source: Yi 2022, Algorithm 1 with full batch and without momentum; Theorem 2.
    """

    def __init__(
        self, params: Params, lr: float | Tensor = 1.0, *, line_search: str | None = None, **options: Any
    ) -> None:
        super().__init__(params, lr, line_search=line_search, **options)
        require_scale_groups(self)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse what `RiemannianGD` refuses, and manifolds without scale groups."""
        super().check_group(group)
        check_scale_group(group)
