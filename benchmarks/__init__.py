"""Experiments: data sets, training loops, comparisons, reports, and the command ``retract``."""

from importlib.metadata import version

__all__: list[str] = []
__version__ = version("retract")
