import torch

from retract.benchmarks import stiefel_speed
from retract.manifolds import Stiefel


def test_rows_cover_every_method_and_stay_on_the_manifold():
    rows = stiefel_speed.run([(12, 4), (9, 3)], seconds=0)
    assert [row.size for row in rows] == [(12, 4)] * 8 + [(9, 3)] * 8
    assert len({row.method for row in rows}) == 8
    assert all(row.error <= 2e-6 and row.milliseconds > 0 for row in rows)
    assert all(row.speedup == 1 for row in rows if row.method == stiefel_speed.BASELINE)


def test_the_timed_steps_are_the_same_algorithm():
    """One projection of momentum and gradient is the textbook step; without momentum geoopt's is too."""
    generator = torch.Generator().manual_seed(0)
    start = Stiefel().random(8, 3, dtype=torch.float64, generator=generator).as_subclass(torch.Tensor)
    gradient = Stiefel().proju(start, torch.randn(8, 3, dtype=torch.float64, generator=generator))
    transported, textbook = stiefel_speed._transported_step(Stiefel(), start, gradient, 0.1, 0.9)
    projected, lean = stiefel_speed._projected_step(Stiefel(), start, gradient, 0.1, 0.9)
    for _ in range(20):
        textbook()
        lean()
    torch.testing.assert_close(transported, projected)
    theirs, step = stiefel_speed._geoopt_step(start, gradient, 0.1, 0.0)
    ours, lean = stiefel_speed._projected_step(Stiefel(), start, gradient, 0.1, 0.0)
    step()
    lean()
    torch.testing.assert_close(theirs.detach().as_subclass(torch.Tensor), ours)
