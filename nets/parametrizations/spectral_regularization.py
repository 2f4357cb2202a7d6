r"""Spectral regularization: spectral normalization that also keeps the lower singular values up.

Liu, Tang, Xie, Qiu, "Spectral regularization for combating mode collapse in GANs", ICCV 2019. With the singular value
decomposition :math:`W = \sum_k \sigma_k u_k v_k^\top` of the weight's matrix,

.. math:: W^{SR} = (W + \Delta W) / \sigma_1,  \quad  \Delta W = \sum_{k \geq 2} \Delta\sigma_k u_k v_k^\top.

Static compensation raises the first i values to the largest, :math:`\Delta\sigma_k = \sigma_1 - \sigma_k` for
:math:`k \leq i`. Dynamic compensation lets no value fall, relative to the largest:
:math:`\Delta\sigma_k = \gamma_k \sigma_1 - \sigma_k`, where :math:`\gamma_k` is the greatest ratio
:math:`\sigma_k / \sigma_1` so far.

The gradient is the paper's: that of the singular values, with the singular vectors held constant. The authors' code
takes other steps: it writes :math:`W + \Delta W` over the weight after each fifth update, and
normalises by power iteration.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._base import autocast_off, widened
from ._layout import MatrixLayout
from ._registration import layout_of

__all__ = ["SpectralRegularization", "spectral_regularization"]

Compensation = Literal["dynamic", "static"]
Layer = TypeVar("Layer", bound=nn.Module)


class SpectralRegularization(nn.Module):
    """Weight of spectral norm 1 whose lower singular values are compensated. Use `spectral_regularization`.

    Args:
        weight: the weight to start from; it is not kept.
        compensation: ``"dynamic"`` or ``"static"``.
        fraction: of the singular values that static compensation raises, i = fraction * min(out, fan_in), rounded down.
        transposed: the weight is (in, out, *kernel).

    Attributes:
        ratios: gamma of dynamic compensation, (min(out, fan_in),), a buffer. Grows in training mode alone.
    """

    ratios: Tensor

    def __init__(
        self,
        weight: Tensor,
        compensation: Compensation = "dynamic",
        fraction: float = 0.5,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if compensation not in ("dynamic", "static"):
            raise ValueError(f"compensation must be 'dynamic' or 'static', got {compensation!r}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction!r}")
        self.layout = MatrixLayout(tuple(weight.shape), transposed)
        self.compensation, self.fraction = compensation, fraction
        self.raised = max(1, int(fraction * min(self.layout.matrix_shape)))
        (matrix,) = widened((self.layout.matrix(weight.detach()),))
        if not bool(torch.isfinite(matrix).all()) or not bool(matrix.any()):
            raise ValueError("weight must be finite and not zero, to have a spectrum to start from")
        if compensation == "dynamic":
            s = torch.linalg.svdvals(matrix)
            self.register_buffer("ratios", s / s[0])

    def extra_repr(self) -> str:
        """Matrix and compensation."""
        how = f", raised={self.raised}" if self.compensation == "static" else ""
        return f"{self.layout.matrix_shape}, compensation={self.compensation!r}{how}"

    def forward(self, weight: Tensor) -> Tensor:
        """The compensated and normalised weight, in the dtype of the original."""
        (matrix,) = widened((self.layout.matrix(weight),))
        with autocast_off(matrix):
            u, _, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
            s = ((u.mT @ matrix) * vh).sum(-1)  # of this gradient: constant singular vectors
            lacking = self._targets(s / s[0]) - s / s[0]
            regularized = matrix / s[0] + (u * lacking) @ vh
        return self.layout.weight(regularized).to(weight.dtype)

    def _targets(self, relative: Tensor) -> Tensor:
        """What the singular values shall be, relative to the largest."""
        if self.compensation == "static":
            return torch.cat((torch.ones_like(relative[: self.raised]), relative[self.raised :]))
        ratios = torch.maximum(self.ratios, relative.detach())
        if self.training:
            with torch.no_grad():
                self.ratios.copy_(ratios)
        return ratios

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself, which the layer then keeps if it is normalised and has no value to be raised."""
        return weight


def spectral_regularization(
    module: Layer, compensation: Compensation = "dynamic", *, fraction: float = 0.5, name: str = "weight"
) -> Layer:
    """Regularize the spectrum of a dense layer's weight, in place: see this module for the definition.

    The layer keeps as many parameters as it had. Each use of the weight, also in evaluation mode, takes a
    singular value decomposition of its (out, fan_in) matrix; `torch.nn.utils.parametrize.cached` shares one among
    the passes of a step.

    Args:
        module: one of torch's Linear, Embedding, Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d, groups = 1.
        compensation: ``"dynamic"`` (better on many classes and large images, says the paper) or ``"static"``.
        fraction: of the singular values that static compensation raises to the largest; the paper takes one half,
            and reports overfitting of the discriminator with all.
        name: of the parameter.

    Returns:
        The module.

    Raises:
        TypeError: another module.
        ValueError: groups > 1, an unknown ``compensation``, ``fraction`` outside (0, 1], a zero or non-finite weight.
    """
    layout = layout_of(module, name)
    weight = module.get_parameter(name)
    regularization = SpectralRegularization(weight, compensation, fraction, transposed=layout.transposed)
    parametrize.register_parametrization(module, name, regularization)
    return module
