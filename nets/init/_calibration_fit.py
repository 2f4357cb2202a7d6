"""A layer of low rank fitted on data: reduced-rank regression, then steps that take the rectifier into account.

For y = A x + b of low rank, wanted values p before a rectifier s of slope a, and t = s(p), the error is E (t - s(y))²,
summed over the outputs. From the present y follows the pseudo-target

    q = t  where y > 0,    q = y + a (t - a y)  elsewhere.

If t >= 0, then (q - y')² plus a constant is nowhere below (t - s(y'))² as a function of y', and equals it at y' = y:
(t - s(y'))² - y'² is concave, and the bound its tangent. So regressing q never increases the error. For a leaky ReLU
t < 0 occurs and the bound may fail; there a step that does not lower the error is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from retract.nets._following import Following

from ._calibration_regression import Factors, Regression

__all__ = ["Fit", "Sample", "fits"]

#: Iterations end when one lowers the error by less than this share of it.
_TOLERANCE = 1e-5
#: Inputs that vary by less than this share of their mean do not vary.
_ROUNDING = 1e-10


class Fit(NamedTuple):
    """Factors and offset of y = U V x + b."""

    factors: Factors
    #: (groups, 1, out / groups).
    offset: Tensor


@dataclass(frozen=True)
class Sample:
    """Rows of a layer's inputs, in parts, and of the dense layer's outputs; computed with in float64.

    Attributes:
        inputs: parts (groups, some rows, taps * columns), of any floating-point dtype.
        outputs: (groups, rows, out / groups), float64.
    """

    inputs: Sequence[Tensor]
    outputs: Tensor

    @property
    def rows(self) -> int:
        """In all parts together."""
        return self.outputs.shape[1]

    @cached_property
    def mean(self) -> Tensor:
        """Of the inputs: (groups, 1, taps * columns)."""
        return torch.stack([part.double().sum(1, keepdim=True) for part in self.inputs]).sum(0) / self.rows

    def moments(self, centre: Tensor) -> Tensor:
        """Second moments of the inputs about a centre."""
        total = centre.new_zeros(())
        for part in self.inputs:
            rows = part.double() - centre
            total = total + rows.mT @ rows
        return total / self.rows

    def cross(self, targets: Tensor) -> Tensor:
        """Mean of target times input: (groups, out, taps * columns)."""
        total = targets.new_zeros(())
        for part, target in zip(self.inputs, self._parted(targets), strict=True):
            total = total + target.mT @ part.double()
        return total / self.rows

    def map(self, fit: Fit) -> Tensor:
        """What a fitted layer makes of the inputs: (groups, rows, out / groups)."""
        return torch.cat([fit.factors(part.double()) for part in self.inputs], 1) + fit.offset

    def _parted(self, rows: Tensor) -> Sequence[Tensor]:
        return list(torch.split(rows, [part.shape[1] for part in self.inputs], 1))


def fits(
    sample: Sample,
    dense: Tensor,
    *,
    rank: int,
    following: Following,
    offset: Tensor | None,
    ridge: float,
    iterations: int,
) -> Iterator[Fit]:
    """Layers of low rank fitted to a sample: by linear regression, and if a rectifier follows, then step by step to it.

    The error on the sample, after what follows with the statistics of the dense network, never increases.

    Args:
        sample: of inputs and wanted outputs.
        dense: weight (groups, out / groups, taps, columns) for directions of which the sample tells little.
        rank: of the matrices (out / groups * taps, columns).
        following: the layer.
        offset: b, (groups, 1, out / groups); None if it is free.
        ridge: variance, as a share of the inputs' mean one, of white inputs that count as if ``dense`` were wanted for
            them. Where the inputs have no variance it is 1.
        iterations: most steps for the rectifier.
    """
    problem = _Problem(sample, dense, rank, following, offset, ridge)
    linear = problem.regressed(problem.wanted)
    yield problem.of_layer(linear)
    if following.slope != 1:
        yield from map(problem.of_layer, problem.rectified(linear, iterations))


class _Problem:
    """The problem in units of what reaches the rectifier: a normalization's gain and offset are applied to outputs."""

    def __init__(
        self, sample: Sample, dense: Tensor, rank: int, following: Following, offset: Tensor | None, ridge: float
    ) -> None:
        groups, out, taps, columns = dense.shape
        self.sample, self.following = sample, following
        self.gain, self.shift = following.affine(sample.outputs)
        self.wanted = self.gain * sample.outputs + self.shift
        self.offset = None if offset is None else self.gain * offset + self.shift
        self.centre = sample.mean if offset is None else torch.zeros_like(sample.mean)
        moments = sample.moments(self.centre)
        variance = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        rounding = (_ROUNDING * self.centre).square().mean((1, 2), keepdim=True)
        self.ridge = torch.where(variance > rounding, ridge * variance, 1.0)
        self.dense = self.gain.mT * dense.reshape(groups, out, -1)
        eye = torch.eye(taps * columns).to(moments)
        self.regression = Regression(moments + self.ridge * eye, rank, taps)

    def regressed(self, targets: Tensor, start: Factors | None = None) -> Fit:
        """The best fit of targets in the mean square, or one better than ``start``."""
        mean = targets.mean(1, keepdim=True) if self.offset is None else self.offset
        cross = self.sample.cross(targets - mean) + self.ridge * self.dense
        factors = self.regression.best(cross) if start is None else self.regression.improved(cross, start)
        return Fit(factors, mean - factors(self.centre))

    def rectified(self, start: Fit, iterations: int) -> Iterator[Fit]:
        """Steps to pseudo-targets, none of which increases the error after the rectifier.

        A step is first tried from a point further along the last one (Nesterov), which is faster if it works.
        """
        wanted = self.following.activation(self.wanted)
        fit, values = start, self.sample.map(start)
        error, before, momentum = self._error(fit, values, wanted), values, 1.0
        for _ in range(iterations):
            momentum, last = (1 + math.sqrt(1 + 4 * momentum**2)) / 2, momentum
            ahead = values + (last - 1) / momentum * (values - before)
            new, new_values, new_error = self._step(fit, ahead, wanted)
            if not new_error < error and last > 1:
                momentum = 1.0
                new, new_values, new_error = self._step(fit, values, wanted)
            if not new_error < error:
                break
            fit, before, values = new, values, new_values
            yield fit
            error, gained = new_error, error - new_error
            if gained < _TOLERANCE * error:
                break

    def _step(self, fit: Fit, values: Tensor, wanted: Tensor) -> tuple[Fit, Tensor, float]:
        """A regression of the pseudo-targets of some values, what it gives, and its error."""
        slope = self.following.slope
        below = values if slope == 0 else (1 - slope**2) * values + slope * wanted
        targets = torch.where(values > 0, wanted, below)
        new = self.regressed(targets, fit.factors)
        new_values = self.sample.map(new)
        return new, new_values, self._error(new, new_values, wanted)

    def _error(self, fit: Fit, values: Tensor, wanted: Tensor) -> float:
        misfit = torch.dist(wanted, self.following.activation(values)).square() / self.sample.rows
        return float(misfit + (self.ridge * (fit.factors.product - self.dense).square()).sum())

    def of_layer(self, fit: Fit) -> Fit:
        """The fit before the normalization."""
        return Fit(Factors(fit.factors.left / self.gain.mT, fit.factors.right), (fit.offset - self.shift) / self.gain)
