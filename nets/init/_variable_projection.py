"""The row space of a low-rank layer that is best for its function, the left factor being solved for exactly.

Let the columns of V be an orthonormal basis of the row space and rho_i = |w_i V| / |w_i| for filter i. With the left
factor that is best for V the layer's error is (1 + a²)/2 sum_i |w_i|² (1 - kappa_a(rho_i)²), a function on the
Grassmann manifold; a is the slope of the leaky ReLU, kappa_a its kernel (`retract.nets.init.arc_cosine`). Eliminating
one factor so is variable projection (Golub, Pereyra, SIAM J. Numer. Anal. 1973).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retract.manifolds import frames
from retract.manifolds.grassmann import Grassmann
from retract.optim.riemannian_descent import RiemannianGD

from ._filter_lengths import cosines
from .arc_cosine import kernel, kernel_derivative

__all__ = ["variable_projection"]

_METHODS = ("lbfgs", "descent")
_HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def variable_projection(
    weight: Tensor,
    rank: int,
    *,
    slope: float = 0.0,
    start: Tensor | None = None,
    taps: int = 1,
    iterations: int = 10,
    method: Literal["lbfgs", "descent"] = "lbfgs",
) -> Tensor:
    """Minimise the error over row spaces of a dimension: a local optimisation that never ends above its start.

    Args:
        weight: matrix W, shape (filters * taps, columns), the rows of a filter side by side. Computed in float32 at
            least; zero filters weigh nothing.
        rank: dimension r of the row space, from 1 to the smaller side of the matrix.
        slope: of the leaky ReLU: 0 is ReLU; for 1, the leading right singular vectors are the optimum.
        start: orthonormal columns, shape (columns, rank); the leading right singular vectors if not given.
        taps: rows of a filter; 1 for a linear layer.
        iterations: most iterations. Ten take a Gaussian matrix to within 1e-5 |W|² of where hundreds end.
        method: ``"lbfgs"``: torch.optim.LBFGS over matrices A with V = qf(A). ``"descent"``: `RiemannianGD` on
            `Grassmann` with Armijo's line search; in as many iterations it takes up to twice the time and ends higher.

    Returns:
        V, shape (columns, rank): orthonormal columns in the weight's dtype. Only their span has a meaning.

    Raises:
        ValueError: an argument out of range, a start that is no orthonormal basis, or NaN in the weight.
    """
    _check(weight, rank, slope, taps, iterations, method)
    matrix = weight.detach().to(torch.float32 if weight.dtype in _HALF else weight.dtype)
    if start is None:
        start = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank].mT
    elif start.shape != (weight.shape[1], rank):
        raise ValueError(f"start must have shape {(weight.shape[1], rank)}, got {tuple(start.shape)}")
    start = start.detach().to(matrix).contiguous()
    ok, reason = Grassmann().check_point_on_manifold(start, explain=True)
    if not ok:
        raise ValueError(f"start must have orthonormal columns: {reason}")
    error = _Error(matrix, slope, taps)
    error(start)
    if iterations and error.smallest > 0:
        (_minimize_lbfgs if method == "lbfgs" else _minimize_descent)(error, start, iterations)
    return error.best.to(weight.dtype)


def _check(weight: Tensor, rank: int, slope: float, taps: int, iterations: int, method: str) -> None:
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(f"weight must be a real matrix, got shape {tuple(weight.shape)} of {weight.dtype}")
    for name, value, low, high in (
        ("rank", rank, 1, min(weight.shape)),
        ("taps", taps, 1, weight.shape[0]),
        ("iterations", iterations, 0, math.inf),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    if weight.shape[0] % taps:
        raise ValueError(f"taps must divide the number of rows, {weight.shape[0]}, got {taps}")
    if not math.isfinite(slope):
        raise ValueError(f"slope must be finite, got {slope}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight has NaN or infinite entries")


class _Error:
    """The error over that of no layer at all, ``1 - sum_i |w_i|² kappa_a(rho_i)² / |W|²``, and its gradient.

    Attributes:
        best, smallest: the argument of the least value so far, and that value.
    """

    def __init__(self, weight: Tensor, slope: float, taps: int) -> None:
        tiny = torch.finfo(weight.dtype).tiny
        scaled = weight / weight.abs().amax().clamp(min=tiny)  # its squares neither overflow nor vanish together
        self.weight = scaled / torch.linalg.vector_norm(scaled).clamp(min=tiny)
        self.slope, self.taps = slope, taps
        self.norms = self._norms(self.weight)
        self.best, self.smallest = weight, math.inf

    def __call__(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Value at V and gradient in the space of matrices, ``-2 Wᵀ diag(kappa kappa' / rho) W V`` for ``|W| = 1``."""
        coordinates = self.weight @ frame
        cosine = cosines(self.norms, self._norms(coordinates))
        kappa = kernel(cosine, self.slope)
        value = 1 - (self.norms * kappa).square().sum()
        if float(value) < self.smallest:
            self.best, self.smallest = frame.clone(), float(value)
        pull = kappa * kernel_derivative(torch.acos(cosine), self.slope) * self.norms
        directions = pull.repeat_interleave(self.taps).unsqueeze(1) * self._directions(coordinates, cosine)
        return value, -2 * (self.weight.mT @ directions)

    def _directions(self, coordinates: Tensor, cosine: Tensor) -> Tensor:
        """Coordinates of the filters' projections as unit vectors.

        A filter that is orthogonal to the row space has none, and pulls at it whichever way it turns: the error has a
        kink there. Such filters are shared out among the basis vectors: any choice gives a subgradient that descends,
        where none would leave the search at rest, for example at rows of the identity.
        """
        lost = (cosine <= torch.finfo(cosine.dtype).eps).repeat_interleave(self.taps)
        lengths = self._norms(coordinates).repeat_interleave(self.taps)
        units = coordinates / torch.where(lengths > 0, lengths, 1.0).unsqueeze(1)
        turns = torch.arange(len(cosine), device=units.device) % units.shape[1]
        shares = torch.zeros_like(units)
        shares[:: self.taps].scatter_(1, turns.unsqueeze(1), 1.0)
        return torch.where(lost.unsqueeze(1), shares, units)

    def _norms(self, matrix: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(matrix.reshape(len(matrix) // self.taps, -1), dim=1)
        return norms


def _minimize_lbfgs(error: _Error, start: Tensor, iterations: int) -> None:
    """Over A with V = qf(A)."""
    matrix = start.clone().requires_grad_()
    eps = torch.finfo(start.dtype).eps
    optimizer = torch.optim.LBFGS(
        [matrix], max_iter=iterations, tolerance_grad=eps, tolerance_change=eps, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def closure() -> Tensor:
        frame = frames.q_factor(matrix, False)
        value, gradient = error(frame)
        matrix.grad = _pulled_back(gradient, matrix, frame)
        return value

    optimizer.step(closure)


def _pulled_back(gradient: Tensor, matrix: Tensor, frame: Tensor) -> Tensor:
    """Gradient at A = V R of a function of V's span: the horizontal part of that at V, times R's inverse transpose.

    In memory as A, for torch.optim.LBFGS takes views of it.
    """
    horizontal = gradient - frame @ (frame.mT @ gradient)
    triangle = frame.mT @ matrix
    pulled: Tensor = torch.linalg.solve_triangular(triangle.mT, horizontal, upper=False, left=False)
    return pulled.contiguous()


def _minimize_descent(error: _Error, start: Tensor, iterations: int) -> None:
    frame = torch.nn.Parameter(start.clone())

    @torch.no_grad()
    def closure() -> Tensor:
        value, frame.grad = error(frame)
        return value

    # The gradient is a weighted WᵀW times V, and curvature is a difference of that matrix's eigenvalues: an upper
    # bound of their mean on the row space is a first guess of it, which the line search corrects.
    size = float(torch.linalg.vector_norm(error(start)[1])) / math.sqrt(start.shape[1])
    if size == 0:
        return
    group = {"params": [frame], "manifold": Grassmann("qr")}
    optimizer = RiemannianGD([group], lr=1 / size, line_search="armijo")
    for _ in range(iterations):
        optimizer.step(closure)
        if optimizer.last_search is None or not optimizer.last_search.success:
            break
