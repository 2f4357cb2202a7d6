"""Generators and discriminators."""

from .sngan import SNGANDiscriminator, SNGANGenerator

__all__ = ["SNGANDiscriminator", "SNGANGenerator"]
