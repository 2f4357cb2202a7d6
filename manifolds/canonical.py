"""Canonical (CP) tensors: sums of R rank-one terms of unit vectors, W = sum_r lambda_r a_r o b_r o c_r o d_r.

The set of such terms is a product of oblique manifolds, one for each mode, and R^R for the weights: `Oblique` is the
geometry of a factor (R, d), and this module is what concerns the terms together. How to hold them, norms and
gauge are in `cp_terms`, fits to a tensor in `cp_fitting`, truncation in `cp_truncation`; all of it is offered here.

Source: Veeramacheneni, Wolter, Klein, Garcke, "Canonical convolutional neural networks", IJCNN 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cp_als import Fit, alternating_least_squares
from .cp_fitting import orthogonal_terms, power_method
from .cp_terms import (
    canonical_form,
    cp_gram,
    cp_norm,
    cp_normalize,
    cp_tensor,
    degeneracy,
    khatri_rao,
)
from .cp_truncation import Selection, refit, select_terms, soft_threshold, truncation_error

__all__ = [
    "Fit",
    "Selection",
    "alternating_least_squares",
    "break_even_rank",
    "canonical_form",
    "cp_gram",
    "cp_norm",
    "cp_normalize",
    "cp_tensor",
    "degeneracy",
    "degrees_of_freedom",
    "exceeds_ambient",
    "is_identifiable",
    "khatri_rao",
    "orthogonal_terms",
    "power_method",
    "refit",
    "select_terms",
    "soft_threshold",
    "truncation_error",
]


def break_even_rank(shape: Sequence[int]) -> int:
    """The least number of terms whose parameters are as many as the tensor has entries: ceil(prod d / (sum d + 1))."""
    return -(-math.prod(_checked(shape)) // (sum(shape) + 1))


def degrees_of_freedom(shape: Sequence[int], rank: int) -> int:
    """Parameters of R terms less their gauge: R (sum_m (d_m - 1) + 1), a unit vector for each mode and a weight.

    It is the rank of the Jacobian of W at generic terms, as long as there are no more of them than can be told apart.
    """
    return rank * (sum(d - 1 for d in _checked(shape)) + 1)


def exceeds_ambient(shape: Sequence[int], rank: int) -> bool:
    """Whether there are more terms than can be told apart: their degrees of freedom exceed the tensor's entries.

    Whole families of terms then have one and the same sum. Fewer may still not be unique, those of matrices never are:
    `is_identifiable` is the sufficient condition.
    """
    return degrees_of_freedom(shape, rank) > math.prod(shape)


def is_identifiable(shape: Sequence[int], rank: int) -> bool:
    """Whether generic terms are the only ones with their sum, but for gauge: Kruskal's sufficient condition.

    sum_m min(d_m, R) >= 2 R + D - 1 over the D modes of size two or more (Kruskal, 1977; Sidiropoulos, Bro, 2000); of
    matrices a single term is.
    """
    sizes = [d for d in _checked(shape) if d > 1]
    return rank == 1 or sum(min(d, rank) for d in sizes) >= 2 * rank + max(len(sizes), 3) - 1


def _checked(shape: Sequence[int]) -> Sequence[int]:
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must be sizes >= 1, at least one, got {tuple(shape)}")
    return shape
