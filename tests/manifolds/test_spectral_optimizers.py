"""Optimizers on SVDSpectral: rates of convergence, drift, saved states."""

import io
import math

import pytest
import torch

from retract.manifolds.spectral import SVDSpectral
from retract.manifolds.spectrum import Lipschitz
from retract.optim import RiemannianGD, RiemannianSGD
from tests.manifolds.spectral_points import retractions, rng, spectra


def approximate(condition, optimizer, steps, retraction="svd", spectrum="free", **options):
    """Fit a rank-4 target, every entry with its own weight in [1/4, 1]; relative errors, and the optimizer."""
    generator, manifold = rng(1), SVDSpectral(4, spectrum, retraction=retraction)
    left, _, right = manifold.random(30, 20, dtype=torch.float64, generator=generator)
    target = left * torch.logspace(0, -math.log10(condition), 4, dtype=torch.float64) @ right.mT
    weights = 0.25 + 0.75 * torch.rand(30, 20, dtype=torch.float64, generator=generator)
    x = [torch.nn.Parameter(t) for t in manifold.random(30, 20, dtype=torch.float64, generator=generator)]
    steps_taken = optimizer([{"params": x, "manifold": manifold}], **options)
    errors = []
    for _ in range(steps):
        steps_taken.zero_grad()
        difference = manifold.embed(x) - target
        (weights * difference.square()).sum().div(2).backward()
        errors.append(float(difference.detach().norm() / target.norm()))
        steps_taken.step()
    return errors, steps_taken, x


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (RiemannianGD, {"lr": 1.0}),
        (RiemannianGD, {"lr": 0.5, "retraction": "qr"}),
        (RiemannianSGD, {"lr": 1.0, "momentum": 0.3}),
        (RiemannianSGD, {"lr": 0.5, "momentum": 0.5, "nesterov": True}),
    ],
)
def test_optimizers_converge_at_a_rate_that_does_not_depend_on_the_condition(optimizer, options):
    steps = []
    for condition in (10.0, 1e3):
        errors, _, _ = approximate(condition, optimizer, 120, **options)
        steps.append(next(i for i, e in enumerate(errors) if e < 1e-8))
    assert steps[1] <= 1.2 * steps[0] + 3, steps


def test_gradient_descent_on_two_factors_stalls_where_this_converges():
    generator = rng(1)
    manifold = SVDSpectral(4)
    left, _, right = manifold.random(30, 20, dtype=torch.float64, generator=generator)
    target = left * torch.logspace(0, -3, 4, dtype=torch.float64) @ right.mT
    x = [torch.nn.Parameter(t) for t in manifold.random(30, 20, dtype=torch.float64, generator=generator)]
    a, b = (torch.nn.Parameter(0.3 * t.detach()) for t in x[::2])
    for optimizer, product in (
        (torch.optim.SGD([a, b], lr=0.5), lambda: a @ b.mT),
        (RiemannianGD([{"params": x, "manifold": manifold}], lr=0.5), lambda: manifold.embed(x)),
    ):
        for _ in range(120):
            optimizer.zero_grad()
            ((product() - target).square().sum() / 2).backward()
            optimizer.step()
    assert (a @ b.mT - target).norm() > 1e-4 * target.norm()
    assert (manifold.embed(x) - target).norm() < 1e-8 * target.norm()


@spectra
@retractions
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizers_stay_on_the_manifold_in_float32(spectrum, retraction, momentum):
    generator, manifold = rng(), SVDSpectral(5, spectrum, retraction=retraction)
    x = [torch.nn.Parameter(t) for t in manifold.random(20, 12, generator=generator)]
    optimizer = RiemannianSGD([{"params": x, "manifold": manifold}], lr=0.05, momentum=momentum)
    targets = torch.randn(50, 20, 12, generator=generator)
    for target in targets:
        optimizer.zero_grad()
        (manifold.embed(x) - target).square().sum().backward()
        optimizer.step()
    point = tuple(p.detach() for p in x)
    assert manifold.check_point_on_manifold(point, explain=True, atol=2e-6, rtol=1e-6) == (True, None)
    if momentum:
        buffers = tuple(optimizer.state[p]["momentum_buffer"] for p in x)
        assert manifold.check_vector_on_tangent(point, buffers, explain=True, atol=1e-5, rtol=1e-5) == (True, None)


def test_optimizer_state_survives_a_round_trip():
    options = {"lr": 0.3, "momentum": 0.5}
    errors, _, _ = approximate(10.0, RiemannianSGD, 20, spectrum=Lipschitz(1.0), **options)
    _, optimizer, x = approximate(10.0, RiemannianSGD, 10, spectrum=Lipschitz(1.0), **options)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "x": [p.detach() for p in x]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    group = saved["optimizer"]["param_groups"][0]["manifold"]
    assert group == {"name": "SVDSpectral", "arguments": SVDSpectral(4, Lipschitz(1.0)).arguments}
    fresh = [torch.nn.Parameter(t) for t in saved["x"]]
    resumed = RiemannianSGD([{"params": fresh, "manifold": SVDSpectral(4, Lipschitz(1.0))}], **options)
    resumed.load_state_dict(saved["optimizer"])
    for here, there in zip(fresh, x, strict=True):
        assert torch.equal(resumed.state[here]["momentum_buffer"], optimizer.state[there]["momentum_buffer"])
    other = RiemannianSGD([{"params": fresh, "manifold": SVDSpectral(4)}], **options)
    with pytest.raises(ValueError, match="was saved on manifold"):
        other.load_state_dict(saved["optimizer"])
    assert errors[10] < errors[0]


def test_optimizers_refuse_weights_off_the_manifold():
    u, s, v = SVDSpectral(3).random(6, 5)
    with pytest.raises(ValueError, match=r"is not a point of SVDSpectral\(3, Free\(\)\): UᵀU - I reaches"):
        RiemannianSGD([{"params": [torch.nn.Parameter(t) for t in (2 * u, s, v)], "manifold": SVDSpectral(3)}])
    with pytest.raises(ValueError, match="factors of shapes"):
        RiemannianGD([{"params": [torch.nn.Parameter(t) for t in (s, u, v)], "manifold": SVDSpectral(3)}])
