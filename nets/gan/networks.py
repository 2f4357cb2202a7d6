"""Pairs of generator and discriminator by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ._base import GANModel
from .dcgan import DCGANDiscriminator, DCGANGenerator
from .sngan import SNGANDiscriminator, SNGANGenerator

__all__ = ["GANS", "GANArchitecture", "gan_pair"]


class Build(Protocol):
    """A network of chosen width; what is not given has the default of the network."""

    def __call__(self, *, width: int = ..., channels: int = ...) -> GANModel:
        """Build it."""


@dataclass(frozen=True)
class GANArchitecture:
    """A generator and a discriminator that fit together."""

    generator: Build
    discriminator: Build
    #: (channels, height, width) as built by default.
    image_shape: tuple[int, int, int]
    #: Dimension of the latent vectors.
    latent: int


def _dcgan(size: int, *, width: int, channels: int, latent: int) -> GANArchitecture:
    return GANArchitecture(
        partial(DCGANGenerator, size, width=width, channels=channels, latent=latent),
        partial(DCGANDiscriminator, size, width=width, channels=channels),
        (channels, size, size),
        latent,
    )


def _sngan(size: int) -> GANArchitecture:
    latent = 128
    return GANArchitecture(
        partial(SNGANGenerator, size, latent=latent), partial(SNGANDiscriminator, size), (3, size, size), latent
    )


GANS: dict[str, GANArchitecture] = {
    "digits": _dcgan(8, width=32, channels=1, latent=16),
    "dcgan28": _dcgan(28, width=64, channels=1, latent=64),
    "dcgan32": _dcgan(32, width=64, channels=3, latent=128),
    "sngan32": _sngan(32),
    "sngan48": _sngan(48),
}
"""Architectures by name, the number being the height and width of the images; ``digits`` is for 8x8."""


def gan_pair(
    name: str, *, width: int | None = None, generator_width: int | None = None, channels: int | None = None
) -> tuple[GANModel, GANModel]:
    """A generator and a discriminator, newly initialised and unconstrained.

    Args:
        name: of `GANS`.
        width: of the discriminator; the generator keeps its own.
        generator_width: of the generator.
        channels: of the images, for both.

    Returns:
        The generator, from (N, ``GANS[name].latent``) to images in (-1, 1), and the discriminator, to scores (N,).

    Raises:
        ValueError: an unknown name, or a width or number of channels that the networks do not allow.
    """
    if name not in GANS:
        raise ValueError(f"name must be one of {', '.join(GANS)}, got {name!r}")
    architecture = GANS[name]
    images = {} if channels is None else {"channels": channels}
    return (
        architecture.generator(**images, **_width(generator_width)),
        architecture.discriminator(**images, **_width(width)),
    )


def _width(width: int | None) -> dict[str, Any]:
    return {} if width is None else {"width": width}
