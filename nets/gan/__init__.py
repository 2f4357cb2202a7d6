"""Generators and discriminators, constraints on the spectra of their weights, and what these are."""

from .constraints import CONSTRAINTS, Constraint, constrain
from .dcgan import DCGANDiscriminator, DCGANGenerator
from .lipschitz import lipschitz_bound
from .networks import GANS, GANArchitecture, gan_pair
from .sngan import SNGANDiscriminator, SNGANGenerator
from .spectra import singular_values, spectrum_violation

__all__ = [
    "CONSTRAINTS",
    "GANS",
    "Constraint",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "GANArchitecture",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "constrain",
    "gan_pair",
    "lipschitz_bound",
    "singular_values",
    "spectrum_violation",
]
