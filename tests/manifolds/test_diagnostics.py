"""The diagnostics pass sound manifolds, geoopt's among them; each check catches manifolds broken for it."""

import subprocess
import sys

import geoopt
import pytest
import torch
from torch import Tensor

from retract.manifolds import PSI, Oblique, Stiefel, diagnostics
from retract.manifolds.slopes import STEPS, fit_slope
from retract.manifolds.spectral import SVDSpectral

CHECKS = [name for name in diagnostics.__all__ if name.startswith("check_") and name != "check_manifold"]


class Torus:
    """Two circles as one factored point, without geoopt: not every verb is there."""

    def __init__(self):
        self.circle = geoopt.SphereExact()

    def each(self, verb, *points):
        return tuple(getattr(self.circle, verb)(*factors) for factors in zip(*points, strict=True))

    def __getattr__(self, verb):
        if verb not in ("projx", "proju", "egrad2rgrad", "retr", "expmap", "transp"):
            raise AttributeError(verb)
        return lambda *points: self.each(verb, *points)

    def inner(self, x, u, v):
        return sum(self.circle.inner(*factors).sum() for factors in zip(x, u, v, strict=True))

    def retr_transp(self, x, u, v):
        y = self.retr(x, u)
        return y, self.transp(x, y, v)


class ScaledTorus(Torus):
    """The same with the metric <u1, v1> + 4 <u2, v2> and an action of signs."""

    def inner(self, x, u, v):
        first, second = (self.circle.inner(*factors).sum() for factors in zip(x, u, v, strict=True))
        return first + 4 * second

    def egrad2rgrad(self, x, u):
        first, second = self.each("egrad2rgrad", x, u)
        return first, second / 4

    def act(self, x, signs):
        return tuple(s * t for s, t in zip(signs, x, strict=True))


def torus_point():
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 4))
    return tuple(draw / draw.norm() for draw in draws)


@pytest.mark.parametrize(
    ("manifold", "shape", "claims"),
    [
        (Stiefel(), (5, 3), {}),
        (Stiefel("polar"), (2, 2, 2), {"order": 2}),
        (Oblique(), (3, 4), {"order": 2, "isometric": True}),
        (PSI(), (3, 2, 2), {"order": 2, "isometric": True}),
        (PSI(groups=2), (4, 3), {"order": 2, "isometric": True}),
        (PSI(dim=1, conv_groups=2), (4, 2, 3), {"order": 2, "isometric": True}),
        (geoopt.Euclidean(), (5,), {"order": 2, "isometric": True}),
        (geoopt.Sphere(), (3, 4), {"order": 2}),
        (geoopt.Stiefel(canonical=False), (5, 3), {}),
        (geoopt.SymmetricPositiveDefinite(), (3, 3), {"order": 2, "isometric": True}),
    ],
)
def test_sound_manifolds_pass(manifold, shape, claims):
    report = diagnostics.check_manifold(manifold, shape, **claims)
    assert report, str(report)
    assert {f"check_{r.check}" for r in report.reports} == set(CHECKS)


def test_factored_points_pass():
    report = diagnostics.check_manifold(Torus(), point=torus_point(), order=2)
    assert report, str(report)
    assert report["dimension"].note == "no dimension verb; proju has rank 5"
    report = diagnostics.check_manifold(ScaledTorus(), point=torus_point(), order=2, element=(1.0, -1.0))
    assert report, str(report)
    assert report["gauge"].figures.keys() >= {"proju", "egrad2rgrad", "retr", "expmap", "transp", "inner"}


def broken(base, **verbs):
    """A copy of ``base`` with some verbs replaced by functions that get the sound manifold first."""
    manifold = type(base)(**getattr(base, "arguments", {}))
    for verb, wrong in verbs.items():
        object.__setattr__(manifold, verb, lambda *a, wrong=wrong, **k: wrong(base, *a, **k))
    return manifold


def no_transport(m, x, u, v):
    return m.retr(x, u), v


def to_another_point(m, x, u, v):
    return m.retr(x, 2 * u), m.transp(x, m.retr(x, u), v)


def first_order_only(m, x, u):
    bend = m.proju(x, torch.cos(17 * torch.arange(float(u.numel()), dtype=u.dtype)).reshape(u.shape))
    return m.retr(x, u + u.square().sum() * bend)


def metric(wrong):
    return {"inner": lambda m, x, u, v=None, keepdim=False: wrong(m, x, u, u if v is None else v)}


STIEFEL, SPHERES, QUOTIENT = (Stiefel(), (5, 3)), (Oblique(), (3, 4)), (PSI(), (3, 4))
MUTANTS = {
    "tangency: proju keeps normal parts": (STIEFEL, {"proju": lambda m, x, u: u}),
    "tangency: egrad2rgrad is the Euclidean gradient": (STIEFEL, {"egrad2rgrad": lambda m, x, u: u}),
    "tangency: quotient, vertical parts stay": (QUOTIENT, {"egrad2rgrad": lambda m, x, u: u}),
    "tangency: retr leaves the manifold": (STIEFEL, {"retr": lambda m, x, u: x + u}),
    "projection: scaled": (STIEFEL, {"proju": lambda m, x, u: 1.01 * m.proju(x, u)}),
    "projection: oblique": (SPHERES, {"proju": lambda m, x, u: u - x * u[:, :1] / x[:, :1]}),
    "projection: not linear": (SPHERES, {"proju": lambda m, x, u: m.proju(x, u.abs())}),
    "projection: projx moves points": (SPHERES, {"projx": lambda m, x: -m.projx(x)}),
    "retraction: half the step": (STIEFEL, {"retr": lambda m, x, u: m.retr(x, u / 2)}),
    "retraction: zero moves": (SPHERES, {"retr": lambda m, x, u: m.retr(x, u + 1e-3)}),
    "retraction: a wrong geodesic": (SPHERES, {"expmap": lambda m, x, u: m.expmap(x, -u)}),
    "metric: not symmetric": (STIEFEL, metric(lambda m, x, u, v: (u * v.roll(1, 0)).sum())),
    "metric: indefinite": (SPHERES, metric(lambda m, x, u, v: m.inner(x, u, v) - 2 * u[0] @ v[0])),
    "metric: not linear": (SPHERES, metric(lambda m, x, u, v: m.inner(x, u, v) ** 3)),
    "metric: norm is not the root": (SPHERES, {"norm": lambda m, x, u: 1.1 * m.inner(x, u) ** 0.5}),
    "gradient: scaled": (STIEFEL, {"egrad2rgrad": lambda m, x, u: 2 * m.egrad2rgrad(x, u)}),
    "gradient: without the scale": (QUOTIENT, {"egrad2rgrad": lambda m, x, u: m.proju(x, u)}),
    "transport: not tangent": (STIEFEL, {"retr_transp": no_transport}),
    "transport: transp alone not tangent": (STIEFEL, {"transp": lambda m, x, y, v: v}),
    "transport: not linear": (SPHERES, {"transp": lambda m, x, y, v: m.transp(x, y, v) * v.norm()}),
    "transport: to zero": (SPHERES, {"transp": lambda m, x, y, v: 0 * v}),
    "transport: another point": (SPHERES, {"retr_transp": to_another_point}),
    "logarithm: logmap of the chord": (SPHERES, {"logmap": lambda m, x, y: m.proju(x, y - x)}),
    "logarithm: dist of the chord": (SPHERES, {"dist": lambda m, x, y: (x - y).norm()}),
    "gauge: gradient without the scale": (QUOTIENT, {"egrad2rgrad": lambda m, x, u: m.proju(x, u)}),
    "gauge: Euclidean metric": (QUOTIENT, metric(lambda m, x, u, v: (u * v).sum())),
    "gauge: retr onto unit norms": (QUOTIENT, {"retr": lambda m, x, u: Oblique().retr(x, u)}),
    "gauge: transport to unit size": (QUOTIENT, {"transp": lambda m, x, y, v: m.proju(y, v / v.norm())}),
    "gauge: dist of representatives": (QUOTIENT, {"dist": lambda m, x, y: (x - y).norm()}),
    "dimension: off by one": (STIEFEL, {"dimension": lambda m, shape: m.dimension(shape) + 1}),
    "dimension: proju of lower rank": (SPHERES, {"proju": lambda m, x, u: 0 * u}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_each_check_catches_its_mutants(name):
    check, _, _ = name.partition(":")
    (base, shape), verbs = MUTANTS[name]
    point = base.random(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = getattr(diagnostics, f"check_{check}")
    assert run(base, point), str(run(base, point))
    report = run(broken(base, **verbs), point)
    assert not report
    assert report.failures
    assert "FAIL" in str(report)
    assert "(!)" in str(report)


def test_every_check_has_a_mutant():
    assert {f"check_{name.partition(':')[0]}" for name in MUTANTS} == set(CHECKS)


def permutation(r):
    """Columns reversed, every other sign flipped."""
    return torch.eye(r, dtype=torch.float64).flip(0) * (-1.0) ** torch.arange(r)


FREE, ISOMETRIES = SVDSpectral(3), SVDSpectral(3, "identity")
MUTANTS_WITH_EMBED = {
    "tangency: proju keeps symmetric parts": (ISOMETRIES, {"proju": FREE.proju}),
    "tangency: egrad2rgrad keeps symmetric parts": (ISOMETRIES, {"egrad2rgrad": FREE.egrad2rgrad}),
    "tangency: proju is not in normal form": (FREE, {"proju": lambda x, u: u}),
    "tangency: retr leaves the manifold": (ISOMETRIES, {"retr": FREE.retr}),
    "projection: scaled": (FREE, {"proju": lambda x, u: scaled(1.01, FREE.proju(x, u))}),
    "projection: of tuples, not of dW": (ISOMETRIES, {"proju": lambda x, u: (u[0], 0 * u[1], 0 * u[2])}),
    "projection: not linear": (FREE, {"proju": lambda x, u: FREE.proju(x, (u[0].abs(), u[1], u[2]))}),
    "projection: projx moves points": (FREE, {"projx": lambda x: (-x[0], *x[1:])}),
    "retraction: half the step": (FREE, {"retr": lambda x, u: FREE.retr(x, scaled(0.5, u))}),
    "retraction: zero moves": (FREE, {"retr": lambda x, u: FREE.retr(x, (u[0], u[1] + 1e-3, u[2]))}),
    "metric: not symmetric": (FREE, {"inner": lambda x, u, v=None: FREE.inner(x, u, shifted(v or u))}),
    "metric: indefinite": (FREE, {"inner": lambda x, u, v=None: FREE.inner(x, u, v or u) - 9 * u[1] @ (v or u)[1]}),
    "gradient: metric of the factors": (FREE, {"egrad2rgrad": FREE.proju}),
    "gradient: scaled": (FREE, {"egrad2rgrad": lambda x, g: scaled(2.0, FREE.egrad2rgrad(x, g))}),
    "transport: not tangent": (ISOMETRIES, {"transp": FREE.transp}),
    "transport: not in normal form": (FREE, {"transp": lambda x, y, v: v}),
    "transport: retr_transp alone to zero": (FREE, {"retr_transp": lambda x, u, v: (FREE.retr(x, u), scaled(0.0, v))}),
    "transport: another point": (FREE, {"retr_transp": lambda x, u, v: (x, v)}),
    "gauge: action on frames alone": (FREE, {"act": lambda x, q: (x[0] @ q, x[1], x[2] @ q)}),
    "gauge: proju of the first column": (FREE, {"proju": lambda x, u: FREE.proju(x, first_column(u))}),
    "gauge: gradient of the first column": (FREE, {"egrad2rgrad": lambda x, u: first_column(FREE.egrad2rgrad(x, u))}),
    "gauge: retr of the first column": (FREE, {"retr": lambda x, u: FREE.retr(x, first_column(u))}),
    "gauge: transport of the first column": (FREE, {"transp": lambda x, y, v: FREE.transp(x, y, first_column(v))}),
    "gauge: retr_transp of the first column": (
        FREE,
        {"retr_transp": lambda x, u, v: FREE.retr_transp(x, u, first_column(v))},
    ),
    "gauge: metric of the first column": (FREE, {"inner": lambda x, u, v=None: FREE.inner(x, first_column(u), v or u)}),
    "dimension: off by one": (FREE, {"dimension": lambda shape: FREE.dimension(shape) + 1}),
    "dimension: symmetric parts too": (ISOMETRIES, {"proju": FREE.proju}),
}


def scaled(a, u):
    return tuple(a * t for t in u)


def shifted(u):
    return tuple(t.roll(1, 0) for t in u)


def first_column(u):
    return tuple(t * (torch.arange(t.shape[-1]) == 0) for t in u)


@pytest.mark.parametrize("name", MUTANTS_WITH_EMBED)
def test_each_check_catches_its_mutants_with_embed(name):
    check, _, _ = name.partition(":")
    base, verbs = MUTANTS_WITH_EMBED[name]
    point = base.random(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run, options = getattr(diagnostics, f"check_{check}"), {"element": permutation(3)} if check == "gauge" else {}
    assert run(base, point, **options), str(run(base, point, **options))
    mutant = SVDSpectral(**base.arguments)
    mutant.check_vector_on_tangent = base.check_vector_on_tangent  # its own would ask the verb that is broken
    for verb, wrong in verbs.items():
        setattr(mutant, verb, wrong)
    report = run(mutant, point, **options)
    assert not report, str(report)


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("tangency: proju keeps symmetric parts", "proju slope"),
        ("tangency: egrad2rgrad keeps symmetric parts", "egrad2rgrad slope"),
        ("gauge: action on frames alone", "embed"),
        ("transport: not tangent", "transp tangency"),
    ],
)
def test_what_fails_does_not_rest_on_the_manifolds_own_tests(name, figure):
    base, verbs = MUTANTS_WITH_EMBED[name]
    mutant = SVDSpectral(**base.arguments)
    for verb, wrong in verbs.items():
        setattr(mutant, verb, wrong)
    point = base.random(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check, _, _ = name.partition(":")
    options = {"element": permutation(3)} if check == "gauge" else {}
    assert figure in getattr(diagnostics, f"check_{check}")(mutant, point, **options).failures


def test_every_check_has_a_mutant_with_embed():
    # logarithm: no manifold with embed offers expmap
    assert {f"check_{name.partition(':')[0]}" for name in MUTANTS_WITH_EMBED} == set(CHECKS) - {"check_logarithm"}


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_a_retraction_shows_without_a_geodesic_where_points_are_embedded(order):
    manifold = SVDSpectral(3, "lipschitz", retraction={1: "qr", 2: "svd"}[order])
    x = manifold.random(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = diagnostics.check_retraction(manifold, x, order=2)
    assert bool(report) == (order == 2)
    assert report.figures["slope of its tangential part"] == pytest.approx(order + 1, abs=0.1)


def test_tensors_that_embed_as_themselves_pass():
    manifold = Oblique()
    object.__setattr__(manifold, "embed", lambda x: 1.0 * x)
    assert (report := diagnostics.check_manifold(manifold, (3, 4), order=2, isometric=True)), str(report)


def test_claims_are_checked():
    x = Oblique().random(3, 4, dtype=torch.float64)
    flat = broken(Oblique(), retr=first_order_only)
    assert diagnostics.check_retraction(flat, x)
    assert not diagnostics.check_retraction(flat, x, order=2)
    projected = broken(Oblique(), transp=lambda m, x, y, v: m.proju(y, v))
    assert diagnostics.check_transport(projected, x)
    assert not diagnostics.check_transport(projected, x, isometric=True)


def test_second_order_cannot_be_told_without_a_geodesic():
    def missing(m, x, u):
        raise NotImplementedError

    manifold, x = broken(Oblique(), expmap=missing), Oblique().random(3, 4, dtype=torch.float64)
    assert diagnostics.check_retraction(manifold, x).note == "no expmap"
    assert not diagnostics.check_retraction(manifold, x, order=2)
    assert diagnostics.check_logarithm(manifold, x).note == "no expmap"


def test_finds_the_defect_of_geoopts_canonical_stiefel():
    """Its proju, and its retraction, double the part of a vector that turns the frame in its own span."""
    report = diagnostics.check_manifold(geoopt.Stiefel(canonical=True), (5, 3))
    assert {r.check for r in report.reports if not r.ok} >= {"projection", "retraction", "gradient"}
    assert "FAIL projection" in str(report)


def test_nan_fails_every_check():
    manifold = broken(Stiefel(), **{v: lambda m, x, *_: x * torch.nan for v in ("retr", "proju", "egrad2rgrad")})
    x = Stiefel().random(4, 2, dtype=torch.float64)
    for check in ("projection", "retraction"):
        assert not getattr(diagnostics, f"check_{check}")(manifold, x)


def test_a_cost_of_ones_own():
    x = Stiefel().random(5, 3, dtype=torch.float64)
    seen = []

    def cost(y: Tensor) -> Tensor:
        seen.append(y.shape)
        return (y @ y.mT).square().sum() + y.sin().sum()

    assert diagnostics.check_gradient(Stiefel(), x, cost)
    assert set(seen) == {x.shape}


def test_points_come_in_any_float_type_and_stay_as_they_are():
    x = Stiefel().random(5, 3)
    before = x.clone()
    state = torch.random.get_rng_state()
    assert diagnostics.check_tangency(Stiefel("polar"), Stiefel().projx(x.double()))
    assert diagnostics.check_manifold(Stiefel(), (3, 2))
    assert torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_plot_draws_on_the_axes_given():
    class Axes:
        def __init__(self):
            self.lines = []

        def loglog(self, x, y, **_):
            self.lines.append((x, y))

        def __getattr__(self, name):
            return lambda *_: None

    for check in (diagnostics.check_retraction, diagnostics.check_gradient):
        axes = Axes()
        check(Stiefel(), Stiefel().random(5, 3, dtype=torch.float64), plot=axes)
        assert [len(x) for x, _ in axes.lines] == [len(STEPS)] * 2


def test_matplotlib_is_not_imported_unasked():
    code = "import sys, retract.manifolds as m; m.diagnostics.check_manifold(m.Stiefel(), (3, 2)); "
    subprocess.run([sys.executable, "-c", code + "assert 'matplotlib' not in sys.modules"], check=True)


def test_plot_on_new_axes():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    before = len(pyplot.get_fignums())
    diagnostics.check_retraction(Oblique(), Oblique().random(3, 4, dtype=torch.float64), order=2, plot=True)
    assert len(pyplot.get_fignums()) == before + 1
    pyplot.close("all")


@pytest.mark.parametrize("power", [1, 2, 3])
def test_slope_is_that_of_the_clean_part(power):
    generator = torch.Generator().manual_seed(0)
    rounding = (1e-13 * torch.rand(len(STEPS), generator=generator, dtype=torch.float64)).tolist()
    errors = [t**power + 5 * t ** (power + 2) + r for t, r in zip(STEPS, rounding, strict=True)]
    assert abs(fit_slope(STEPS, errors, noise=1e-14) - power) < 0.05


def test_slope_of_nothing_but_rounding_is_infinite_and_of_nan_nan():
    assert fit_slope(STEPS, [1e-16] * len(STEPS), noise=1e-16) == float("inf")
    assert fit_slope(STEPS, [float("nan")] * len(STEPS), noise=1e-16) != 0
    assert str(fit_slope(STEPS, [1.0] * (len(STEPS) - 1) + [float("inf")], noise=1e-16)) == "nan"


def test_bad_arguments():
    with pytest.raises(ValueError, match="either shape or point"):
        diagnostics.check_manifold(Stiefel())
    with pytest.raises(ValueError, match="pass one"):
        diagnostics.check_gauge(ScaledTorus(), torus_point())
