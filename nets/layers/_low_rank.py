"""What layers with a weight U V of low rank share, whatever their computation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retract.nets._unfolding import Unfolding
from retract.nets.init.tensor import tensor_kaiming_
from retract.nets.parametrizations._base import autocast_off

from .tensor_network import TensorNetwork

__all__ = ["LowRankLayer"]


class LowRankLayer(nn.Module):
    """What low-rank layers share: two factors, a bias, and the weight that they stand for.

    Attributes:
        left: U (rows, rank) of the matrix U V that ``unfolding`` makes of the weight; with several groups
            (groups, rows, rank).
        right: V (rank, columns), likewise. ``left @ right`` is the matrix of the weight, or the matrices.
        bias: (out,) or None.
        unfolding: how the weight lies in its matrix.
        network: the weight as a tensor network whose cores are the factors, for `retract.nets.init`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        unfolding: Unfolding,
        rank: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        unfolding.check_rank(rank)
        self.unfolding, self.rank = unfolding, rank
        self.network = _as_network(unfolding, rank)
        left, right = unfolding.factor_shapes(rank)
        self.left = nn.Parameter(torch.empty(left, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(right, device=device, dtype=dtype))
        empty = nn.Parameter(torch.empty(unfolding.weight_shape[0], device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors for the layer's fan-in and a ReLU, as semi-orthogonal maps of equal norms; zero the bias.

        The weight then has the second moment of He et al., ICCV 2015, at any rank.
        `retract.nets.init.tensor_kaiming_` draws for other nonlinearities, fans and distributions.
        """
        tensor_kaiming_(self)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def cores(self) -> list[Tensor]:
        """Views of the factors with one axis for each index of ``network``."""
        left, right = self.network.core_shapes
        return [self.left.view(left), self.right.view(right)]

    @property
    def weight(self) -> Tensor:
        """The weight (out, in / groups, *kernel), built from the factors; contiguous, differentiable."""
        with autocast_off(self.left):
            return self.unfolding.weight(self.left @ self.right)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The layer of `torch.nn` with this weight and a copy of the bias."""
        dense: nn.Module = self._dense()
        dense.get_parameter("weight").copy_(self.weight)
        if self.bias is not None:
            dense.get_parameter("bias").copy_(self.bias)
        dense.train(self.training)
        return dense

    def _dense(self) -> nn.Module:
        """The layer of `torch.nn` of this geometry, its parameters uninitialized."""
        raise NotImplementedError


def _as_network(unfolding: Unfolding, rank: int) -> TensorNetwork:
    """The weight as a network of two cores, of indices (group, out, kernel, rank) and (group, rank, in, kernel)."""
    group, kernel = "" if unfolding.groups == 1 else "g", "dhw"[5 - len(unfolding.weight_shape) :]
    out, *sizes = unfolding.weight_shape
    dims = dict(zip("oi" + kernel + "r", (out // unfolding.groups, *sizes, rank), strict=True))
    if group:
        dims[group] = unfolding.groups
    cores = (f"{group}o{kernel[: unfolding.split]}r", f"{group}ri{kernel[unfolding.split :]}")
    return TensorNetwork(cores, dims, inputs="i", outputs=group + "o", kernel=kernel)
