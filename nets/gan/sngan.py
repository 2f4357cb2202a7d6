"""Residual generator and discriminator of spectrally normalized GANs (Miyato et al., ICLR 2018), unconditional.

The networks are plain: no spectral normalization is built in. A constraint is put on the discriminator from
outside, by `retract.nets.gan.constrain` or `retract.nets.factorize`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ._base import GANModel, check_positive

__all__ = ["SNGANDiscriminator", "SNGANGenerator"]


class GeneratorBlock(nn.Module):
    """Doubles the size: BatchNorm, ReLU, nearest upsampling, 3x3, BatchNorm, ReLU, 3x3; the shortcut is 1x1."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, 2 H, 2 W)."""
        out = self.conv1(_upsample(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        # The published order is to upsample first; a 1x1 convolution commutes with it and is four times cheaper here.
        total: Tensor = out + _upsample(self.shortcut(x))
        return total


class DiscriminatorBlock(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, and average pooling if it ``halves`` the size; the hidden width is the input's.

    The shortcut is a 1x1 convolution where size or width changes, the identity elsewhere.
    """

    def __init__(self, in_channels: int, out_channels: int, *, halves: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        changes = halves or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W), or half that height and width."""
        out = self.conv2(F.relu(self.conv1(F.relu(x))))
        if self.halves:  # the published shortcut pools after its 1x1 convolution; the two commute
            out, x = F.avg_pool2d(out, 2), F.avg_pool2d(x, 2)
        total: Tensor = out + self.shortcut(x)
        return total


class FirstDiscriminatorBlock(nn.Module):
    """3x3, ReLU, 3x3, average pooling: no ReLU before it, since its input is an image."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
        out = self.conv2(F.relu(self.conv1(x)))
        total: Tensor = F.avg_pool2d(out, 2) + self.shortcut(F.avg_pool2d(x, 2))
        return total


class SNGANGenerator(GANModel):
    """Residual generator: a linear layer to 4x4 (6x6) maps, three blocks that double them, BatchNorm, ReLU, 3x3, tanh.

    Weights are initialised by Glorot's uniform rule, with gain sqrt(2) on the residual branches; biases are zero.

    Args:
        size: height and width of the images, 32 or 48.
        width: channels of the first maps ("ngf"): 256 at size 32, where all maps have as many, and 512 at size 48,
            where every block halves them; a multiple of 8 there.
        latent: dimension of the latent vectors ("nz").
        channels: channels of the images.

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial Networks", ICLR 2018,
    appendix B.4, tables 4 (CIFAR-10) and 5 (STL-10).
    """

    def __init__(self, size: int = 32, width: int | None = None, *, latent: int = 128, channels: int = 3) -> None:
        super().__init__()
        _check(size, width, divisor=8 if size == 48 else 1, latent=latent, channels=channels)
        width = width or {32: 256, 48: 512}[size]
        widths = [width] * 4 if size == 32 else [width, width // 2, width // 4, width // 8]
        self.latent, self.first_size = latent, size // 8
        self.linear = nn.Linear(latent, width * self.first_size**2)
        self.blocks = nn.Sequential(*(GeneratorBlock(a, b) for a, b in pairwise(widths)))
        self.bn = nn.BatchNorm2d(widths[-1])
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1)
        _glorot_(self)

    def forward(self, z: Tensor) -> Tensor:
        """Latent vectors (N, latent), standard normal in the paper, to images (N, channels, size, size) in (-1, 1)."""
        x = self.linear(z).unflatten(1, (-1, self.first_size, self.first_size))
        return F.tanh(self.conv(F.relu(self.bn(self.blocks(x)))))


class SNGANDiscriminator(GANModel):
    """Residual discriminator: blocks without normalisation, ReLU, sum over positions, a linear layer without bias.

    At size 32 four blocks of equal width, of which the first two halve the map; at size 48 five blocks that double the
    width, of which the first four halve the map. Initialised as the generator.

    Args:
        size: height and width of the images, 32 or 48.
        width: channels of the last maps ("ndf"): 128 at size 32, 1024 at size 48, a multiple of 16 there.
        channels: channels of the images.

    Source: as for `SNGANGenerator`. With the default widths 1,053,824 and 10,141,440 parameters, as Obukhov et al.,
    AISTATS 2021, report; their reduced networks have width 32 at size 32 (66,848) and width 64 at size 48 (40,080).
    """

    def __init__(self, size: int = 32, width: int | None = None, *, channels: int = 3) -> None:
        super().__init__()
        _check(size, width, divisor=16 if size == 48 else 1, channels=channels)
        width = width or {32: 128, 48: 1024}[size]
        widths = [width] * 4 if size == 32 else [width // 16, width // 8, width // 4, width // 2, width]
        halving = 2 if size == 32 else 4
        self.blocks = nn.Sequential(
            FirstDiscriminatorBlock(channels, widths[0]),
            *(DiscriminatorBlock(a, b, halves=i < halving) for i, (a, b) in enumerate(pairwise(widths), start=1)),
        )
        self.linear = nn.Linear(width, 1, bias=False)
        _glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, size, size) to scores (N,): higher means more like the data."""
        scores: Tensor = self.linear(F.relu(self.blocks(x)).sum((2, 3)))
        return scores.squeeze(1)


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _glorot_(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            residual = name.endswith(("conv1", "conv2"))
            nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2) if residual else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check(size: int, width: int | None, divisor: int, **positive: int) -> None:
    if size not in (32, 48):
        raise ValueError(f"size must be 32 or 48, got {size!r}")
    if width is not None and (width < 1 or width % divisor):
        allowed = "positive" if divisor == 1 else f"a positive multiple of {divisor} at size {size}"
        raise ValueError(f"width must be {allowed}, got {width!r}")
    check_positive(**positive)
