"""What an initialization of a tensorial convolution does to its weight's variance, and to signals in a deep network.

The networks are those of Pan et al., "A unified weight initialization paradigm for tensorial convolutional neural
networks", ICML 2022, or of the same kinds, for a convolution of 64 to 64 channels, with 9 to 18 % of its parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from retract.nets.init.variance_report import variance_report
from retract.nets.layers.tensor import TensorConv2d
from retract.nets.layers.tensor_formats import tensor_network
from retract.nets.layers.tensor_network import TensorNetwork

from .grid import Stopping
from .init_methods import INITIALIZATIONS, knows

__all__ = ["CHANNELS", "DEPTH", "NETWORKS", "Measurement", "measure", "measurements", "network"]

CHANNELS, KERNEL = 64, 3
DEPTH, MAPS, BATCH = 16, 8, 4
DRAWS = {"depth": 10, "weights": 40}
IDEAL = 2 / (CHANNELS * KERNEL**2)  # of Var(W) where a ReLU comes before the layer: He et al., ICCV 2015

NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {"cores": ["oihw"]},
    "cp": {"rank": 48},
    "tucker2": {"rank": 16},
    "tucker": {"rank": (16, 16, 3, 3)},
    "tensor_train": {"rank": 24},
    "tt_matrix": {"cores": ["hwa", "ixab", "jybc", "kzc"], "outputs": "xyz", "inputs": "ijk", "bonds": 12},
    "tensor_ring": {"rank": 10, "in_modes": (4, 4, 4), "out_modes": (4, 4, 4)},
    "block_term": {"rank": (4, 8, 8)},
    "hierarchical_tucker": {"rank": (16, 16, 3, 3, 8, 8)},
    "odd": {"cores": ["iab", "hacx", "wbcd", "oade", "exy"], "bonds": 5},
}
"""Ranks of a named format, or cores. The odd one has bonds of three cores and one of a single core. A named TT-matrix
would cut the first bond to 9, and order its indices otherwise, which draws core by core depend on.
"""


def network(name: str) -> TensorNetwork:
    """The tensor network of a row of the tables, for a weight (64, 64, 3, 3)."""
    options = dict(NETWORKS[name])
    if "cores" not in options:
        return tensor_network(name, (CHANNELS, CHANNELS, KERNEL, KERNEL), **options)
    cores, bond = options["cores"], options.get("bonds", 1)
    roles = {"outputs": options.get("outputs", "o"), "inputs": options.get("inputs", "i")}
    dims = {label: bond for core in cores for label in core} | dict.fromkeys("hw", KERNEL)
    for labels in roles.values():
        dims |= dict.fromkeys(labels, round(CHANNELS ** (1 / len(labels))))
    return TensorNetwork(cores, dims, **roles, kernel="hw")


@dataclass(frozen=True)
class Measurement:
    """A cell of the table of a part: ``"depth"`` or ``"weights"``."""

    part: str
    network: str
    initialization: str


def measurements(part: str) -> list[Measurement]:
    """All cells of a part's table."""
    pairs = product(NETWORKS, INITIALIZATIONS)
    return [Measurement(part, name, initialization) for name, initialization in pairs if knows(initialization, name)]


def measure(cell: Measurement, stopping: Stopping) -> dict[str, Any] | None:
    """The results of one cell; None if it was stopped first.

    Returns:
        Of ``"weights"``: ``mean`` and ``variation`` over draws of E[W²] / (2 / fan_in), whose ideal is 1. The variation
        is the standard deviation over the mean.

        Of ``"depth"``: arithmetic and geometric means of the ratios of second moments from one layer to the next, over
        all layers but the first, and over draws; ``forward`` of the layers' outputs, ``backward`` of their gradients.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Tensor] = []
    for _ in range(DRAWS[cell.part]):
        if stopping():
            return None
        rows.append(_weight(cell) if cell.part == "weights" else _ratios(cell))
    values = torch.stack(rows)
    if cell.part == "weights":
        return {"mean": float(values.mean()), "variation": float(values.std() / values.mean())}
    arithmetic, geometric = values.mean((0, 1)).tolist(), values.log().mean((0, 1)).exp().tolist()
    return {
        "forward": {"arithmetic": arithmetic[0], "geometric": geometric[0]},
        "backward": {"arithmetic": arithmetic[1], "geometric": geometric[1]},
    }


def _layer(cell: Measurement) -> TensorConv2d:
    """In float64: 16 layers of an initialization that is far off leave the range of float32."""
    options: dict[str, Any] = {"padding": KERNEL // 2, "padding_mode": "circular", "bias": False}
    layer = TensorConv2d(network(cell.network), **options, execution="weight", dtype=torch.float64)
    INITIALIZATIONS[cell.initialization](layer, cell.network, None)
    return layer


@torch.no_grad()
def _weight(cell: Measurement) -> Tensor:
    return _layer(cell).weight.square().mean() / IDEAL


def _ratios(cell: Measurement) -> Tensor:
    """(layers but the first, 2): forward and backward."""
    layers = [module for _ in range(DEPTH) for module in (nn.ReLU(), _layer(cell))]
    images = math.sqrt(2) * torch.randn(BATCH, CHANNELS, MAPS, MAPS, dtype=torch.float64)
    report = variance_report(nn.Sequential(*layers), images)
    return torch.tensor([[layer.forward, layer.backward] for layer in report.layers[1:]], dtype=torch.float64)
