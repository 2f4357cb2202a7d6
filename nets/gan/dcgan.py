"""Deep convolutional generator and discriminator (Radford, Metz, Chintala, ICLR 2016) for small images.

The discriminator has no normalisation, where the published one has BatchNorm: a constraint on its spectra takes that
place, put on from outside by `retract.nets.gan.constrain`. The generator keeps its BatchNorm.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from ._base import GANModel, check_positive

__all__ = ["DCGANDiscriminator", "DCGANGenerator"]

#: Height and width of the smallest maps, by those of the images; strided convolutions lie between the two.
_SMALLEST = {8: 2, 28: 7, 32: 4}
_SLOPE = 0.2


class DCGANGenerator(GANModel):
    """A linear layer to the smallest maps, BatchNorm, ReLU, then transposed convolutions that double them.

    The smallest maps are 2x2, 7x7 or 4x4, for images of 8, 28 or 32. The convolutions have 4x4 kernels of stride 2,
    with BatchNorm and ReLU after all but the last, which has a bias and tanh.
    Weights start normal with standard deviation 0.02, as published; the gains of BatchNorm around 1 likewise.

    Args:
        size: height and width of the images: 8, 28 or 32.
        width: channels of the largest maps before the images ("ngf"); each smaller map has twice as many.
        latent: dimension of the latent vectors ("nz").
        channels: channels of the images.
    """

    def __init__(self, size: int = 32, width: int = 64, *, latent: int = 128, channels: int = 3) -> None:
        super().__init__()
        _check_size(size)
        check_positive(width=width, latent=latent, channels=channels)
        widths = _widths(size, width)[::-1]
        self.latent, self.first_size = latent, _SMALLEST[size]
        self.linear = nn.Linear(latent, widths[0] * self.first_size**2, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        doubling = [
            layer
            for a, b in pairwise(widths)
            for layer in (nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b))
        ]
        self.maps = nn.Sequential(*doubling, nn.ReLU())
        self.image = nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)
        nn.init.zeros_(self.image.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, z: Tensor) -> Tensor:
        """Latent vectors (N, latent), standard normal, to images (N, channels, size, size) in (-1, 1)."""
        x = self.linear(z).unflatten(1, (-1, self.first_size, self.first_size))
        images: Tensor = self.image(self.maps(self.bn(x))).tanh()
        return images


class DCGANDiscriminator(GANModel):
    """4x4 convolutions of stride 2 with leaky ReLU (0.2), down to 2x2, 7x7 or 4x4 maps, then one linear layer.

    Weights start by He's normal rule for that slope, biases at zero: without BatchNorm the published standard
    deviation of 0.02 would let signals fade in narrow networks.

    Args:
        size: height and width of the images: 8, 28 or 32.
        width: channels after the first convolution ("ndf"); each further one doubles them.
        channels: channels of the images.
    """

    def __init__(self, size: int = 32, width: int = 64, *, channels: int = 3) -> None:
        super().__init__()
        _check_size(size)
        check_positive(width=width, channels=channels)
        widths = [channels, *_widths(size, width)]
        halving = [layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(_SLOPE))]
        self.maps = nn.Sequential(*halving, nn.Flatten())
        self.linear = nn.Linear(widths[-1] * _SMALLEST[size] ** 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, _SLOPE)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every layer has one

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, size, size) to scores (N,): higher means more like the data."""
        scores: Tensor = self.linear(self.maps(x))
        return scores.squeeze(1)


def _widths(size: int, width: int) -> list[int]:
    """Channels from the largest maps to the smallest."""
    halvings = (size // _SMALLEST[size]).bit_length() - 1
    return [width * 2**i for i in range(halvings)]


def _check_size(size: int) -> None:
    if size not in _SMALLEST:
        raise ValueError(f"size must be one of {', '.join(map(str, _SMALLEST))}, got {size!r}")
