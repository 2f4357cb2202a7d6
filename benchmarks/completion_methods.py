"""Low-rank matrices from all or some of their entries: problems, starting points, and the methods compared."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retract.manifolds.spectral import SVDSpectral
from retract.optim import RiemannianGD

__all__ = ["GROWTH_STEPS", "METHODS", "Factors", "Problem", "Watch", "descend", "grown_start", "random_start"]

Factors = tuple[Tensor, ...]
# Of every Armijo search here. With 1e-4 steps of twice the best length pass, too; with 1/2 the best one itself may not,
# on the manifold. On two factors the search needs half to three quarters of the iterations of the best fixed step in
# 0.3, 0.5, 0.6, ..., 1 (condition 10).
SUFFICIENT_DECREASE = 0.3
GROWTH_STEPS = 20  # at each rank below the last, of a start that is grown rank by rank


@dataclass(frozen=True)
class Problem:
    r"""Find the rank-r ``target`` from weighted squares: 1/2 Σ ``weights`` (W - ``target``)².

    The target's singular values fall geometrically from 1 to 1 / condition between Haar frames. Observed entries
    are drawn uniformly and weigh 1 / share, so that the loss has 1/2 ‖W - target‖² as its mean over draws.
    """

    target: Tensor
    weights: Tensor
    rank: int

    @classmethod
    def draw(
        cls,
        shape: tuple[int, int],
        rank: int,
        condition: float,
        oversampling: float | None,
        generator: torch.Generator,
    ) -> Problem:
        """A random problem, float64; ``oversampling`` entries a degree of freedom, or all entries (``None``)."""
        left, _, right = SVDSpectral(rank).random(*shape, dtype=torch.float64, generator=generator)
        target = left * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ right.mT
        weights = torch.ones_like(target)
        if oversampling is not None:
            entries = target.numel()
            observed = min(entries, round(oversampling * rank * (sum(shape) - rank)))
            weights.zero_().view(-1)[torch.randperm(entries, generator=generator)[:observed]] = entries / observed
        return cls(target, weights, rank)

    def loss(self, matrix: Any) -> Any:
        """The loss of a matrix, of torch or numpy."""
        return 0.5 * (self.weights * (matrix - self.target) ** 2).sum()

    def gradient(self, matrix: Any) -> Any:
        """Its gradient."""
        return self.weights * (matrix - self.target)


def random_start(problem: Problem, generator: torch.Generator) -> Factors:
    """Haar frames, with singular values between 1 and 1/2."""
    point: Factors = SVDSpectral(problem.rank).random(*problem.target.shape, dtype=torch.float64, generator=generator)
    return point


def grown_start(problem: Problem) -> Factors:
    """Rank by rank: a few Riemannian steps, then the leading singular pair of the gradient joins the point.

    It looks at observed entries alone. Source: Uschmajew, Vandereycken, "Line-search methods and rank increase on
    low-rank matrix varieties", 2014.
    """
    matrix = torch.zeros_like(problem.target)
    for rank in range(1, problem.rank + 1):
        left, values, right = SVDSpectral(1).project(-problem.gradient(matrix))
        point: Factors = SVDSpectral(rank).project(matrix + left * values @ right.mT)
        if rank < problem.rank:
            point = descend(problem, SVDSpectral(rank), point, product=_svd_product, steps=GROWTH_STEPS)
            matrix = _svd_product(point)
    return point


def _svd_product(point: Factors) -> Tensor:
    left, values, right = point
    return left * values @ right.mT


def _pair_product(point: Factors) -> Tensor:
    left, right = point
    return left @ right.mT


def _balanced(point: Factors) -> Factors:
    """Two factors of the same matrix with the same singular values: the square roots of the matrix's own."""
    left, values, right = point
    return left * values.sqrt(), right * values.sqrt()


@dataclass
class Watch:
    """Relative errors of a method's iterates, and seconds from the first to each of them, measuring not counted."""

    problem: Problem
    tolerance: float
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _zero: float = 0.0  # of the clock: it moves on while an error is measured

    def __call__(self, matrix: Tensor) -> bool:
        """Note an iterate; whether to go on."""
        now = time.perf_counter()
        if not self.errors:
            self._zero = now
        target = self.problem.target
        self.errors.append(float(torch.linalg.norm(matrix.detach() - target) / torch.linalg.norm(target)))
        self.seconds.append(now - self._zero)
        self._zero += time.perf_counter() - now
        return self.tolerance < self.errors[-1] < math.inf


def descend(
    problem: Problem,
    manifold: Any,
    start: Factors,
    *,
    product: Callable[[Factors], Tensor],
    steps: int,
    watch: Callable[[Tensor], bool] = lambda matrix: True,
) -> Factors:
    """RiemannianGD with Armijo's line search on a factored manifold, or on plain factors (``None``).

    The factors' gradients come from autograd, as in training. Ends when ``watch`` says so, after ``steps``, or when
    the line search finds no decrease; returns the last point.
    """
    factors = tuple(factor.clone().requires_grad_() for factor in start)
    optimizer = RiemannianGD(
        [{"params": list(factors), "manifold": manifold}],
        line_search="armijo",
        sufficient_decrease=SUFFICIENT_DECREASE,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = problem.loss(product(factors))
        loss.backward()
        return loss

    for _ in range(steps):
        if not watch(product(factors)):
            break
        optimizer.step(closure)
        if optimizer.last_search is None or not optimizer.last_search.success:
            break
    else:
        watch(product(factors))
    return tuple(factor.detach() for factor in factors)


class ScaledFactors:
    """Pairs (A, B), for W = A Bᵀ, in the metric tr(dAᵀ dA BᵀB) + tr(dBᵀ dB AᵀA): a cure that needs no SVD.

    Its gradient descent is ScaledGD. Sources: Mishra, Apuroop, Sepulchre, arXiv 1211.1550, 2012; Tong, Ma, Chi,
    JMLR 2021.
    """

    factored = True

    def egrad2rgrad(self, x: Factors, egrad: Factors) -> Factors:
        """Each factor's gradient times the inverse Gram matrix of the other factor."""
        (a, b), (grad_a, grad_b) = x, egrad
        return _divide(grad_a, b.mT @ b), _divide(grad_b, a.mT @ a)

    def retr(self, x: Factors, u: Factors) -> Factors:
        """A sum."""
        return tuple(a + b for a, b in zip(x, u, strict=True))

    def check_point_on_manifold(self, x: Factors, **options: Any) -> tuple[bool, None]:
        """Every pair of full rank is one."""
        return True, None


def _divide(matrix: Tensor, gram: Tensor) -> Tensor:
    quotient: Tensor = torch.linalg.solve(gram, matrix.mT).mT
    return quotient


class _Enough(Exception):  # noqa: N818  # it is no error: pymanopt has no other way to be stopped by a callback
    pass


def _pymanopt(problem: Problem, start: Factors, steps: int, watch: Watch) -> None:
    """Conjugate gradients (Hestenes-Stiefel, the default) on FixedRankEmbedded.

    The Riemannian gradient is the projection of the dense one, which is cheap at these sizes and stable where
    singular values coincide, unlike pymanopt's conversion of the factors' gradients. Its line search first tries the
    gradient itself, as ours does: the default, a step of length 1, ends some runs from a good start before they begin.
    """
    import pymanopt
    from pymanopt.manifolds import FixedRankEmbedded
    from pymanopt.optimizers import ConjugateGradient
    from pymanopt.optimizers.line_search import AdaptiveLineSearcher

    arrays = Problem(problem.target.numpy(), problem.weights.numpy(), problem.rank)  # type: ignore[arg-type]
    manifold = FixedRankEmbedded(*problem.target.shape, problem.rank)

    def riemannian_gradient(u: Any, s: Any, vt: Any) -> Any:
        return manifold.projection((u, s, vt), arrays.gradient((u * s) @ vt))

    @pymanopt.function.numpy(manifold)  # type: ignore[untyped-decorator]
    def cost(u: Any, s: Any, vt: Any) -> Any:
        return arrays.loss((u * s) @ vt)

    @pymanopt.function.numpy(manifold)  # type: ignore[untyped-decorator]
    def gradient(u: Any, s: Any, vt: Any) -> Any:  # evaluated once an iterate
        if not watch(torch.from_numpy((u * s) @ vt)):
            raise _Enough
        return riemannian_gradient(u, s, vt)

    left, values, right = (factor.numpy() for factor in start)
    point = (left, values, right.T)
    first_step = manifold.norm(point, riemannian_gradient(*point))
    optimizer = ConjugateGradient(
        line_searcher=AdaptiveLineSearcher(initial_step_size=first_step, max_iterations=25),
        max_iterations=steps + 1,
        min_gradient_norm=0,
        min_step_size=1e-300,
        max_cost_evaluations=10**9,
        verbosity=0,
    )
    with contextlib.suppress(_Enough):
        optimizer.run(pymanopt.Problem(manifold, cost, riemannian_gradient=gradient), initial_point=point)


def _on_spectral(problem: Problem, start: Factors, steps: int, watch: Watch) -> None:
    descend(problem, SVDSpectral(problem.rank), start, product=_svd_product, steps=steps, watch=watch)


def _on_factors(problem: Problem, start: Factors, steps: int, watch: Watch) -> None:
    descend(problem, None, _balanced(start), product=_pair_product, steps=steps, watch=watch)


def _on_scaled_factors(problem: Problem, start: Factors, steps: int, watch: Watch) -> None:
    descend(problem, ScaledFactors(), _balanced(start), product=_pair_product, steps=steps, watch=watch)


#: Each starts from a point (U, s, V), takes at most so many steps, and shows every iterate to the watch.
METHODS: dict[str, Callable[[Problem, Factors, int, Watch], None]] = {
    "RiemannianGD on SVDSpectral": _on_spectral,
    "two factors, gradient descent": _on_factors,
    "two factors, ScaledGD": _on_scaled_factors,
    "pymanopt's ConjugateGradient": _pymanopt,
}
