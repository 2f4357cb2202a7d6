"""What a calibration did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from retract.nets._text_table import text_table

__all__ = ["CalibratedLayer", "Calibration"]


@dataclass(frozen=True)
class CalibratedLayer:
    """One fitted layer. Outputs are meant after what follows it: normalization and rectifier.

    Errors and energies are mean squares over rows that the layer was not fitted on, divided by that of the dense
    network's outputs. A normalization has statistics of the layer's own output in all of them, before and after.
    """

    name: str
    rank: int
    #: ``"BatchNorm"``, ``"ReLU"``, both, a leaky ReLU with its slope, or nothing.
    following: str
    #: |s(y) - t|² / |t|² of the outputs with the factors that the layer had.
    error_before: float
    #: With those that it has.
    error: float
    #: |s(y)|² / |t|² with the factors that the layer had.
    energy_before: float
    #: With those that it has.
    energy: float
    #: Positions that the layer was fitted on.
    rows: int
    #: Positions that the figures are of; all that there are if they are fewer than 5.
    held_out: int


@dataclass(frozen=True)
class Calibration:
    """The fitted layers of a model, in the order of their calls. ``str`` is a table."""

    layers: tuple[CalibratedLayer, ...]

    def __str__(self) -> str:
        header = ("layer", "followed by", "rank", "rows", "error", "was", "energy", "was")
        return "\n".join(text_table([header, *(_cells(layer) for layer in self.layers)], 2))


def _cells(layer: CalibratedLayer) -> tuple[str, ...]:
    figures = (layer.error, layer.error_before, layer.energy, layer.energy_before)
    place = (layer.name or "(model)", layer.following, f"{layer.rank}", f"{layer.rows:,}")
    return *place, *(f"{figure:.4g}" for figure in figures)
