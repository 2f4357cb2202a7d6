"""PSI: its metric, its verbs, their equivariance, and geoopt's optimizers on it (docs/checks.md, check 3)."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retract.manifolds import PSI, diagnostics

CASES = [
    (PSI(), (8, 4, 3, 3)),
    (PSI(), (5, 7)),
    (PSI(), (6,)),
    (PSI(), (4, 1, 3, 3)),
    (PSI(groups=4), (8, 4, 3, 3)),
    (PSI(groups=1), (5, 6)),
    (PSI(1), (4, 6, 2)),
    (PSI(-1), (3, 4, 5)),
    (PSI(1, conv_groups=2), (4, 6, 3, 3)),
    (PSI(1, groups=4, conv_groups=2), (4, 6, 3, 3)),
    (PSI(1, groups=2, conv_groups=4), (8, 6, 3, 3)),
]
MANY = pytest.mark.parametrize(("manifold", "shape"), CASES, ids=lambda x: str(x))


def draw(manifold: PSI, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A point, two horizontal vectors and positive scales over four decades."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = normal(*shape)
    scales = 10 ** (4 * torch.rand(manifold.num_scales(shape), generator=generator, dtype=torch.float64) - 2)
    return x, manifold.proju(x, normal(*shape)), manifold.proju(x, normal(*shape)), scales


@MANY
def test_passes_the_diagnostics(manifold: PSI, shape: tuple[int, ...]) -> None:
    if manifold.dimension(shape):  # a point has no tangent vectors to check
        report = diagnostics.check_manifold(manifold, shape)
        assert report.ok, str(report)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    slices=st.integers(1, 3),
    rest=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_passes_the_diagnostics_on_any_shape(groups: int, slices: int, rest: list[int], seed: int) -> None:
    shape = (groups * slices, *rest)
    manifold = PSI(groups=groups)
    if manifold.dimension(shape) == 0:
        return
    report = diagnostics.check_manifold(manifold, shape, seed=seed)
    assert report.ok, str(report)


@MANY
def test_every_verb_is_equivariant(manifold: PSI, shape: tuple[int, ...]) -> None:
    x, u, v, a = draw(manifold, shape)
    y = torch.randn(shape, dtype=torch.float64)

    def moved(t: Tensor) -> Tensor:
        return manifold.act(t, a)

    torch.testing.assert_close(manifold.inner(moved(x), moved(u), moved(v)), manifold.inner(x, u, v))
    torch.testing.assert_close(manifold.dist(moved(x), y), manifold.dist(x, y))
    torch.testing.assert_close(manifold.retr(moved(x), moved(u)), moved(manifold.retr(x, u)))
    torch.testing.assert_close(manifold.expmap(moved(x), moved(u)), moved(manifold.expmap(x, u)))
    torch.testing.assert_close(
        manifold.egrad2rgrad(moved(x), manifold.act(y, 1 / a)), moved(manifold.egrad2rgrad(x, y))
    )
    if manifold.dimension(shape):
        torch.testing.assert_close(manifold.logmap(moved(x), y), moved(manifold.logmap(x, y)))
        torch.testing.assert_close(manifold.transp(moved(x), y, moved(v)), manifold.transp(x, y, v))
        torch.testing.assert_close(manifold.transp(x, moved(y), v), moved(manifold.transp(x, y, v)))
        torch.testing.assert_close(manifold.project_transp(x, moved(y), v), moved(manifold.project_transp(x, y, v)))


@MANY
def test_scale_groups_are_what_rescaling_leaves_alone(manifold: PSI, shape: tuple[int, ...]) -> None:
    x, _, _, a = draw(manifold, shape)
    moved = manifold.act(x, a)
    assert manifold.dist(x, moved) < 1e-7
    torch.testing.assert_close(manifold.norms(moved).flatten(), a * manifold.norms(x).flatten())
    assert len(set((moved / x).flatten().log().mul(1e6).round().tolist())) == manifold.num_scales(shape)


def test_the_metric_is_equation_6() -> None:
    x, u, v, _ = draw(PSI(), (3, 4))
    by_hand = sum((u[i] @ v[i]) / (x[i] @ x[i]) for i in range(3))
    torch.testing.assert_close(PSI().inner(x, u, v), by_hand, rtol=1e-13, atol=0)
    parts = PSI().component_inner(x, u, v)
    torch.testing.assert_close(parts[:, 0].sum(), by_hand, rtol=1e-13, atol=0)
    assert parts.shape == x.shape
    assert (parts == parts[:, :1]).all()


def test_riemannian_gradient_is_the_steepest_direction_of_an_invariant_function() -> None:
    manifold, x = PSI(), draw(PSI(), (4, 6))[0].requires_grad_()
    target = torch.randn(4, 6, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return (w / w.norm(dim=1, keepdim=True) * target).sum().sin()

    (egrad,) = torch.autograd.grad(loss(x), x)
    rgrad = manifold.egrad2rgrad(x.detach(), egrad)
    u = manifold.proju(x.detach(), torch.randn(4, 6, dtype=torch.float64))
    step = 1e-6
    slope = (loss(x.detach() + step * u) - loss(x.detach() - step * u)) / (2 * step)
    torch.testing.assert_close(manifold.inner(x.detach(), rgrad, u), slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(rgrad, manifold.norms(x.detach()) ** 2 * egrad, rtol=1e-12, atol=1e-14)


def test_unit_norms_make_it_geoopts_sphere() -> None:
    """The quotient is isometric to a product of unit spheres: at unit norm every verb is geoopt's."""
    psi, sphere = PSI(), geoopt.Sphere()
    x, u, v, _ = draw(psi, (5, 7))
    x = x / x.norm(dim=1, keepdim=True)
    u, v = psi.proju(x, u), psi.proju(x, v)
    y = sphere.expmap(x, u)
    torch.testing.assert_close(psi.expmap(x, u), y)
    torch.testing.assert_close(psi.retr(x, u), sphere.retr(x, u))
    torch.testing.assert_close(psi.angles(x, y), sphere.dist(x, y))
    torch.testing.assert_close(psi.logmap(x, y), sphere.logmap(x, y))
    torch.testing.assert_close(psi.project_transp(x, y, v), sphere.transp(x, y, v))


def test_retraction_keeps_norms_and_is_the_papers_point() -> None:
    x, u, _, _ = draw(PSI(), (5, 7))
    y = PSI().retr(x, u)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-14, atol=0)
    assert PSI().dist(y, x + u) < 1e-7
    torch.testing.assert_close((x + u).norm(dim=1) ** 2, x.norm(dim=1) ** 2 + u.norm(dim=1) ** 2, rtol=1e-13, atol=0)


def test_parallel_transport_is_an_isometry_along_geodesics_and_projection_is_not() -> None:
    psi = PSI()
    x, u, v, _ = draw(psi, (5, 7))
    y, moved = psi.retr_transp(x, 0.5 * u, v)
    torch.testing.assert_close(psi.norm(y, moved), psi.norm(x, v), rtol=1e-14, atol=0)
    cosine = (moved * y).sum(1) / moved.norm(dim=1) / y.norm(dim=1)
    assert cosine.abs().max() < 1e-14
    assert psi.norm(y, psi.project_transp(x, y, v)) < psi.norm(x, v)
    # the velocity of a geodesic is parallel along it
    end, velocity = psi.expmap_transp(x, 0.5 * u, u)
    torch.testing.assert_close(psi.expmap(x, 0.6 * u), psi.expmap(end, 0.1 * velocity))


def test_angles_are_accurate_at_both_ends() -> None:
    x = torch.zeros(1, 3, dtype=torch.float64)
    x[0, 0] = 1
    for angle in (1e-12, 1e-6, 1.0, math.pi - 1e-6):
        y = torch.tensor([[math.cos(angle), math.sin(angle), 0]], dtype=torch.float64)
        assert float(PSI().angles(x, y)) == pytest.approx(angle, rel=1e-9)
    assert PSI().logmap(x, x).abs().max() == 0
    assert PSI().logmap(x, -x).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_half_precision_norms_are_taken_in_float32(dtype: torch.dtype, scale: float) -> None:
    """Squared norms overflow float16 beyond 255 and underflow at 1e-4."""
    x = (torch.full((2, 16), 0.25) * scale).to(dtype)
    u = torch.zeros_like(x)
    u[:, 0], u[:, 1] = x[:, 0], -x[:, 0]
    psi = PSI()
    assert psi.norms(x).dtype == torch.float32
    torch.testing.assert_close(psi.norms(x).flatten(), x.float().norm(dim=1))
    for result in (psi.retr(x, u), psi.expmap(x, u), psi.proju(x, u), psi.transp(x, psi.retr(x, u), u)):
        assert result.dtype == dtype
        assert result.isfinite().all()
    assert float(psi.inner(x, u)) == pytest.approx(2 / 16 * 2, rel=1e-2)


@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
@pytest.mark.parametrize("manifold", [PSI(), PSI(groups=2), PSI(1, conv_groups=2)], ids=str)
def test_geoopts_optimizers_run_on_it_and_are_equivariant(optimizer: type, manifold: PSI) -> None:
    shape = (4, 6, 2, 2)
    start, _, _, a = draw(manifold, shape)
    target = torch.randn(shape, dtype=torch.float64)

    def train(point: Tensor) -> tuple[list[float], Tensor]:
        p = geoopt.ManifoldParameter(point.clone(), manifold=manifold)
        options = {"lr": 0.05} if optimizer is geoopt.optim.RiemannianAdam else {"lr": 0.05, "momentum": 0.9}
        run, losses = optimizer([p], **options), []
        for _ in range(100):
            run.zero_grad()
            plain = p.as_subclass(Tensor)
            loss = -(
                (plain / manifold.norms(plain).expand_as(manifold.scale_view(plain)[0]).reshape(shape)) * target
            ).sum()
            loss.backward()
            run.step()
            losses.append(float(loss.detach()))
        return losses, p.detach().as_subclass(Tensor)

    losses, end = train(start)
    assert losses[-1] < losses[0]
    if (
        optimizer is geoopt.optim.RiemannianAdam
    ):  # geoopt's SGD starts its momentum from the Euclidean gradient: not equivariant
        scaled_losses, scaled_end = train(manifold.act(start, a))
        assert (
            max(abs(p - q) for p, q in zip(losses, scaled_losses, strict=True)) < 1e-6
        )  # Adam's eps is not scale-free
        assert manifold.dist(end, scaled_end) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({"groups": 0}, None, "groups must be a positive integer"),
        ({"groups": 2.0}, None, "groups must be a positive integer"),
        ({"conv_groups": 2}, None, "needs dim=1"),
        ({"dim": "0"}, None, "dim must be an integer"),
        ({"dim": 4}, (3, 3), "dimension 4"),
        ({"groups": 3}, (4, 2), "does not divide"),
        ({"dim": 1, "conv_groups": 3}, (4, 2, 3), "does not divide"),
        ({"dim": 1, "conv_groups": 2, "groups": 3}, (4, 6, 3), "one must divide the other"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], shape: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PSI(**arguments).num_scales(shape)  # type: ignore[arg-type]


def test_points_and_vectors_off_the_manifold_are_told() -> None:
    psi = PSI()
    x, u, _, _ = draw(psi, (4, 3))
    assert psi.check_point_on_manifold(x)
    assert psi.check_vector_on_tangent(x, u)
    ok, reason = psi.check_vector_on_tangent(x, x, explain=True)
    assert not ok
    assert "along the weight" in reason
    assert not psi.check_vector_on_tangent(x, torch.full_like(x, math.nan))
    x[2] = 0
    ok, reason = psi.check_point_on_manifold(x, explain=True)
    assert not ok
    assert "[2] of 4" in reason
    x[2] = math.nan
    assert not psi.check_point_on_manifold(x)
    with pytest.raises(TypeError, match="floating-point"):
        psi.norms(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="complex64"):
        psi.norms(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"scales must have shape \(4,\)"):
        psi.act(x, torch.ones(3))


def test_random_and_origin_are_points() -> None:
    psi = PSI(groups=2)
    assert psi.check_point_on_manifold(psi.random(4, 3))
    torch.testing.assert_close(psi.norms(psi.origin(4, 3)).flatten(), torch.ones(2))
    assert str(PSI(1, groups=2, conv_groups=2)) == "PSI(dim=1, groups=2, conv_groups=2)"
    assert PSI(**psi.arguments).num_scales((4, 3)) == 2  # type: ignore[arg-type]
