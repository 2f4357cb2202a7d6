"""Points for the tests of RiemannianSGD, a factored manifold, one with eager transport, and a loop that minimizes."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from retract.manifolds import Stiefel
from retract.optim import RiemannianSGD


class StiefelPair:
    """Points (U, V) on a product of two Stiefel manifolds: a factored manifold of the least possible size."""

    factored = True
    arguments: ClassVar[dict[str, int]] = {}
    stiefel = Stiefel("polar")

    def egrad2rgrad(self, x, g):
        return tuple(map(self.stiefel.egrad2rgrad, x, g))

    def retr(self, x, u):
        return tuple(map(self.stiefel.retr, x, u))

    def retr_transp(self, x, u, v):
        moved = self.retr(x, u)
        return moved, tuple(map(self.stiefel.proju, moved, v))

    def check_point_on_manifold(self, x, *, explain=False, atol=1e-5):
        checks = [self.stiefel.check_point_on_manifold(w, explain=True, atol=atol) for w in x]
        return next((check for check in checks if not check[0]), (True, None))


class EagerStiefel(Stiefel):
    projects_linearly = False


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def point(manifold, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(manifold.projx(random(*shape, seed=seed, dtype=dtype)))


def minimize(loss, groups, steps, **options):
    optimizer = RiemannianSGD(groups, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
