import copy
import io
import itertools
import pickle
import warnings
from typing import ClassVar

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from retract.manifolds import PSI, Oblique, Stiefel
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


def orthonormality_error(w: Tensor) -> float:
    m = w.detach().double().flatten(1)
    m = m if m.shape[0] >= m.shape[1] else m.T
    return float((m.T @ m - torch.eye(m.shape[1])).abs().max())


SGD_OPTIONS = [
    {"momentum": m, "dampening": d, "weight_decay": wd, "nesterov": n, "maximize": up}
    for m, d, wd, n, up in itertools.product((0, 0.9), (0, 0.3), (0, 0.1), (False, True), (False, True))
    if not n or (m > 0 and d == 0)
]


# -------------------------------------------------------------------------------- groups off every manifold


@pytest.mark.parametrize("implementation", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_euclidean_groups_are_torch_sgd_bit_for_bit(implementation):
    for options in SGD_OPTIONS:
        ours, theirs = ([nn.Parameter(random(5, 3)), nn.Parameter(random(4, seed=1))] for _ in range(2))
        optimizers = (
            RiemannianSGD(ours, 0.1, **options, **implementation),
            torch.optim.SGD(theirs, 0.1, **options, **implementation),
        )
        for step in range(4):
            for w, v in zip(ours, theirs, strict=True):
                w.grad = random(*w.shape, seed=step + 2)
                v.grad = w.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert all(map(torch.equal, ours, theirs)), options


@pytest.mark.parametrize("kind", ["tensor lr", "sparse", "complex", "bfloat16"])
def test_euclidean_groups_take_what_torch_takes(kind):
    dtype = {"complex": torch.complex128, "bfloat16": torch.bfloat16}.get(kind, torch.float64)
    lr = torch.tensor(0.1) if kind == "tensor lr" else 0.1
    results = []
    for make in (RiemannianSGD, torch.optim.SGD):
        w = nn.Parameter(random(6, 3).to(dtype))
        optimizer = make([w], lr, momentum=0.9)
        for step in range(3):
            g = random(6, 3, seed=step).to(dtype)
            w.grad = (g * (g.real > 1)).to_sparse() if kind == "sparse" else g
            optimizer.step()
        results.append(w.detach())
    assert torch.equal(*results)


def test_euclidean_lr_is_for_groups_without_manifold_and_without_their_own():
    weights = [point(Oblique(), 3, 4), nn.Parameter(random(2)), nn.Parameter(random(2))]
    groups = [
        {"params": [weights[0]], "manifold": Oblique()},
        {"params": [weights[1]]},
        {"params": [weights[2]], "lr": 3.0},
    ]
    optimizer = RiemannianSGD(groups, lr=1.0, euclidean_lr=2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0, 3.0]


# ------------------------------------------------------------------------------------------- against geoopt


@pytest.mark.parametrize("manifold", [geoopt.Sphere(), geoopt.Stiefel(), geoopt.Stiefel(canonical=False)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    ids=str,
)
def test_same_trajectory_as_geoopt_after_its_first_step(manifold, options):
    ours = point(manifold, 7, 3)
    optimizer = RiemannianSGD([{"params": [ours], "manifold": manifold}], 0.1, **options)
    target = random(7, 3, seed=1)
    ours.grad = ours.detach() - target
    optimizer.step()
    theirs = geoopt.ManifoldParameter(ours.detach().clone(), manifold=manifold)
    reference = geoopt.optim.RiemannianSGD([theirs], 0.1, **options)
    if options["momentum"]:
        # geoopt starts its buffer from the Euclidean gradient and then adds the Riemannian one.
        reference.state[theirs]["momentum_buffer"] = optimizer.state[ours]["momentum_buffer"].clone()
    for _ in range(50):
        ours.grad, theirs.grad = ours.detach() - target, theirs.detach() - target
        optimizer.step()
        reference.step()
    assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}], ids=str)
@pytest.mark.parametrize("manifold", [Stiefel(), PSI(), geoopt.Sphere()], ids=str)
def test_first_step_of_momentum_starts_from_the_riemannian_gradient(manifold, options):
    w, plain = point(manifold, 6, 4), point(manifold, 6, 4)
    rate = 0.1 * (1.9 if "nesterov" in options else 1)
    first = RiemannianSGD([{"params": [w], "manifold": manifold}], 0.1, momentum=0.9, **options)
    reference = RiemannianSGD([{"params": [plain], "manifold": manifold}], rate)
    w.grad = plain.grad = random(6, 4, seed=1)
    first.step()
    reference.step()
    torch.testing.assert_close(w, plain, rtol=1e-14, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), fan_in=st.integers(2, 6), seed=st.integers(0, 99), span=st.floats(0, 3))
def test_psi_weights_turn_as_the_sphere_turns(rows, fan_in, seed, span):
    scales = 10 ** (span * random(rows, 1, seed=seed).tanh())
    directions = point(geoopt.Sphere(), rows, fan_in, seed=seed)
    weights = nn.Parameter(directions.detach() * scales)
    for options in ({"momentum": 0}, {"momentum": 0.8}):
        spherical = RiemannianSGD([{"params": [directions], "manifold": geoopt.Sphere()}], 0.3, **options)
        quotient = RiemannianSGD([{"params": [weights], "manifold": PSI()}], 0.3, **options)
        for step in range(2 if options["momentum"] == 0 else 1):
            directions.grad = random(rows, fan_in, seed=seed + step + 1)
            weights.grad = directions.grad / scales
            spherical.step()
            quotient.step()
        assert (weights / scales - directions).abs().max() < 1e-13


# ----------------------------------------------------------------------------- convergence to known answers


def minimize(loss, groups, steps, **options):
    optimizer = RiemannianSGD(groups, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def spectrum(n: int) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with eigenvalues n, ..., 1 and its eigenvectors in that order."""
    vectors = torch.linalg.qr(random(n, n, seed=7))[0]
    return vectors @ torch.diag(torch.arange(n, 0, -1.0).double()) @ vectors.T, vectors


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"momentum": 0.8, "nesterov": True}], ids=str)
@pytest.mark.parametrize("manifold", [Oblique(), geoopt.Sphere(), PSI()], ids=str)
def test_rayleigh_quotient_finds_the_leading_eigenvector(manifold, options):
    matrix, vectors = spectrum(8)
    x = point(manifold, 1, 8)

    def loss():
        return -(x @ matrix @ x.T).sum() / x.square().sum()

    minimize(loss, [{"params": [x], "manifold": manifold}], 300, lr=0.05, **options)
    assert 1 - (x / x.norm() @ vectors[:, 0]).abs() < 1e-12


@pytest.mark.parametrize("manifold", [Stiefel(), Stiefel("cayley"), geoopt.Stiefel()], ids=str)
def test_brockett_cost_finds_principal_components(manifold):
    matrix, vectors = spectrum(8)
    x = point(manifold, 8, 3)
    weights = torch.tensor([3.0, 2.0, 1.0]).double()
    optimum = [{"params": [x], "manifold": manifold}]
    minimize(lambda: -((x.T @ matrix @ x).diagonal() @ weights), optimum, 600, lr=0.02, momentum=0.7)
    assert ((x.T @ vectors[:, :3]).abs() - torch.eye(3)).abs().max() < 1e-8


def test_procrustes_finds_the_polar_factor():
    target = random(9, 4, seed=3)
    left, _, right = torch.linalg.svd(target, full_matrices=False)
    x = point(Stiefel(), 9, 4)
    minimize(
        lambda: (x - target).square().sum() / 2,
        [{"params": [x], "manifold": Stiefel()}],
        300,
        lr=0.2,
        momentum=0.5,
    )
    assert (x - left @ right).abs().max() < 1e-10


# ------------------------------------------------------------------------------------------ factored points


def singular_vectors_problem() -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]:
    left, right = (torch.linalg.qr(random(n, n, seed=n))[0] for n in (6, 5))
    matrix = left[:, :5] @ torch.diag(torch.arange(5, 0, -1.0).double()) @ right.T
    u, v = point(Stiefel(), 6, 2, seed=1), point(Stiefel(), 5, 2, seed=2)
    return u, v, matrix, torch.tensor([2.0, 1.0]).double()


def test_factored_point_finds_singular_vectors():
    u, v, matrix, weights = singular_vectors_problem()
    minimize(
        lambda: -((u.T @ matrix @ v).diagonal() @ weights),
        [{"params": [u, v], "manifold": StiefelPair()}],
        400,
        lr=0.05,
        momentum=0.7,
    )
    assert ((u.T @ matrix @ v).abs() - torch.diag(torch.tensor([5.0, 4.0]))).abs().max() < 1e-8


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_factored_point_moves_as_its_factors_would(options):
    pair = [point(Stiefel(), 6, 2), point(Stiefel(), 5, 3)]
    alone = copy.deepcopy(pair)
    stiefel = EagerStiefel("polar")
    joint = RiemannianSGD([{"params": pair, "manifold": StiefelPair()}], 0.1, **options)
    separate = RiemannianSGD([{"params": alone, "manifold": stiefel}], 0.1, **options)
    for step in range(5):
        for w, v in zip(pair, alone, strict=True):
            w.grad = v.grad = random(*w.shape, seed=step)
        joint.step()
        separate.step()
    assert all(map(torch.equal, pair, alone))
    if options:
        assert [tuple(joint.state[w]["momentum_buffer"].shape) for w in pair] == [(6, 2), (5, 3)]


def test_factor_without_gradient_has_gradient_zero():
    pair = [point(Stiefel(), 6, 2), point(Stiefel(), 5, 3)]
    before = copy.deepcopy(pair)
    optimizer = RiemannianSGD([{"params": pair, "manifold": StiefelPair()}], 0.1)
    optimizer.step()
    assert all(map(torch.equal, pair, before))
    pair[0].grad = random(6, 2)
    optimizer.step()
    assert not torch.equal(pair[0], before[0])
    torch.testing.assert_close(pair[1], before[1], rtol=0, atol=1e-15)


def test_factored_point_off_its_manifold_is_refused():
    with pytest.raises(ValueError, match="not a point of"):
        RiemannianSGD([{"params": [point(Stiefel(), 6, 2), nn.Parameter(random(5, 3))], "manifold": StiefelPair()}])


# ------------------------------------------------------------------------------------------ the step itself


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_lazy_transport_is_transport(options):
    options = {**options, "weight_decay": 0}
    lazy, eager = point(Stiefel(), 4, 3, 2, 2), point(Stiefel(), 4, 3, 2, 2)
    optimizers = [
        RiemannianSGD([{"params": [w], "manifold": manifold}], 0.2, **options)
        for w, manifold in ((lazy, Stiefel()), (eager, EagerStiefel()))
    ]
    for step in range(20):
        lazy.grad = eager.grad = random(4, 3, 2, 2, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert (lazy - eager).abs().max() < 1e-12


def test_maximize_is_descent_on_the_negative():
    up, down = point(Oblique(), 3, 4), point(Oblique(), 3, 4)
    optimizers = [
        RiemannianSGD([{"params": [w], "manifold": Oblique()}], 0.1, momentum=0.9, maximize=maximize)
        for w, maximize in ((up, True), (down, False))
    ]
    for step in range(5):
        up.grad = random(3, 4, seed=step)
        down.grad = -up.grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(up, down)


def test_gradients_are_not_written_to():
    w = point(Stiefel(), 6, 4)
    v = nn.Parameter(random(3))
    optimizer = RiemannianSGD([{"params": [w], "manifold": Stiefel()}, {"params": [v]}], 0.1, 0.9, 0, 0, True)
    w.grad, v.grad = random(6, 4, seed=1), random(3, seed=1)
    kept = w.grad.clone(), v.grad.clone()
    for _ in range(3):
        optimizer.step()
    assert torch.equal(w.grad, kept[0])
    assert torch.equal(v.grad, kept[1])


def test_closure_has_gradients_under_an_outer_no_grad():
    w = point(Stiefel(), 6, 4)
    before = w.detach().clone()
    optimizer = RiemannianSGD([{"params": [w], "manifold": Stiefel()}], 0.1)

    def closure():
        loss = w.square().mul(random(6, 4, seed=1)).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(float(before.square().mul(random(6, 4, seed=1)).sum()))
    assert not torch.equal(w, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("manifold", [Stiefel(), Oblique(), PSI()], ids=str)
def test_weights_and_momentum_keep_their_memory_and_layout(manifold, layout):
    w = nn.Parameter(manifold.projx(random(8, 4, 3, 3)).contiguous(memory_format=layout))
    address, strides = w.data_ptr(), w.stride()
    optimizer = RiemannianSGD([{"params": [w], "manifold": manifold}], 0.1, momentum=0.9)
    for step in range(3):
        w.grad = random(8, 4, 3, 3, seed=step).contiguous(memory_format=layout)
        optimizer.step()
    buffer = optimizer.state[w]["momentum_buffer"]
    assert (w.data_ptr(), w.stride(), buffer.stride()) == (address, strides, strides)


@pytest.mark.parametrize("manifold", [Stiefel(), Oblique(), PSI()], ids=str)
def test_manifold_parameters_are_the_same_as_groups(manifold):
    plain = point(manifold, 5, 4)
    tagged = geoopt.ManifoldParameter(plain.detach().clone(), manifold=manifold)
    bias = nn.Parameter(random(3))
    by_group = RiemannianSGD([{"params": [plain], "manifold": manifold}], 0.1, momentum=0.9)
    by_parameter = RiemannianSGD([bias, tagged], 0.1, momentum=0.9)
    for step in range(4):
        plain.grad = tagged.grad = random(5, 4, seed=step)
        by_group.step()
        by_parameter.step()
    assert torch.equal(plain, tagged.as_subclass(Tensor))
    assert type(by_parameter.state[tagged]["momentum_buffer"]) is Tensor


@pytest.mark.parametrize("manifold", [Stiefel(), Oblique(), PSI()], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_near_the_manifold(manifold, dtype):
    w = nn.Parameter(manifold.projx(random(6, 12)).to(dtype))
    optimizer = RiemannianSGD([{"params": [w], "manifold": manifold}], 0.1, momentum=0.9)
    before = w.detach().clone()
    for step in range(5):
        w.grad = random(6, 12, seed=step).to(dtype)
        optimizer.step()
    assert w.dtype == dtype
    assert not torch.equal(w, before)
    assert manifold.check_point_on_manifold(w.detach(), atol=0.1)


@pytest.mark.parametrize(
    ("manifold", "allowed"), [(Stiefel(), 2e-6), (Stiefel("cayley"), 2e-6), (Oblique(), 1e-6)], ids=str
)
def test_float32_weights_do_not_drift(manifold, allowed):
    """1000 steps; measured 5e-7 on Stiefel of 128 x 576 and 2e-7 on Oblique."""
    w = point(manifold, 16, 8, 3, 3, dtype=torch.float32)
    optimizer = RiemannianSGD([{"params": [w], "manifold": manifold}], 0.01, momentum=0.9)
    for step in range(1000):
        w.grad = random(16, 8, 3, 3, seed=step, dtype=torch.float32)
        optimizer.step()
    rows = w.detach().flatten(1).double().norm(dim=1)
    error = orthonormality_error(w) if isinstance(manifold, Stiefel) else float((rows - 1).abs().max())
    assert error < allowed


# ----------------------------------------------------------------------------------------- state, schedules


def twin_setup():
    weights = [
        point(Stiefel(), 6, 4),
        nn.Parameter(random(3)),
        point(Stiefel(), 6, 2),
        point(Stiefel(), 5, 3),
    ]
    groups = [
        {"params": [weights[0]], "manifold": Stiefel()},
        {"params": [weights[1]]},
        {"params": weights[2:], "manifold": StiefelPair()},
    ]
    return weights, RiemannianSGD(groups, 0.1, momentum=0.9)


def advance(weights, optimizer, seeds):
    for seed in seeds:
        for w in weights:
            w.grad = random(*w.shape, seed=seed)
        optimizer.step()


def test_state_dict_continues_to_the_bit():
    weights, optimizer = twin_setup()
    advance(weights, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": weights}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    others, resumed = twin_setup()
    with torch.no_grad():
        for w, v in zip(others, saved["weights"], strict=True):
            w.copy_(v)
    resumed.load_state_dict(saved["optimizer"])
    advance(weights, optimizer, range(3, 6))
    advance(others, resumed, range(3, 6))
    assert all(map(torch.equal, weights, others))


def test_state_of_another_manifold_is_refused():
    w = point(Stiefel(), 6, 4)
    saved = RiemannianSGD([{"params": [w], "manifold": Stiefel()}]).state_dict()
    with pytest.raises(ValueError, match="Stiefel"):
        RiemannianSGD([{"params": [w], "manifold": PSI()}]).load_state_dict(saved)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_to_the_bit(clone):
    weights, optimizer = twin_setup()
    advance(weights, optimizer, range(2))
    others, copied = clone((weights, optimizer))
    advance(weights, optimizer, range(2, 5))
    advance(others, copied, range(2, 5))
    assert all(map(torch.equal, weights, others))


def test_schedulers_set_the_rate():
    w, v = point(Oblique(), 3, 4), point(Oblique(), 3, 4)
    scheduled = RiemannianSGD([{"params": [w], "manifold": Oblique()}], 0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
    for step in range(3):
        w.grad = v.grad = random(3, 4, seed=step)
        scheduled.step()
        scheduler.step()
        RiemannianSGD([{"params": [v], "manifold": Oblique()}], 0.4 * 0.5**step).step()
    assert torch.equal(w, v)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        RiemannianSGD([{"params": [w], "manifold": Oblique()}], 0.4, momentum=0.9), max_lr=1.0, total_steps=4
    )
    for _ in range(3):
        cycle.optimizer.step()
        cycle.step()


# ----------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": float("nan")}, "lr"),
        ({"lr": -0.1}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        ({"foreach": True, "fused": True}, "fused"),
        ({"euclidean_lr": -1.0}, "euclidean_lr"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        RiemannianSGD([nn.Parameter(random(3))], **options)


@pytest.mark.parametrize(
    ("weight", "manifold", "error", "message"),
    [
        (random(6), Stiefel(), ValueError, "two or more dimensions"),
        (random(6, 4), Stiefel(), ValueError, "not a point of Stiefel"),
        (2 * torch.eye(3), Oblique(), ValueError, "not a point of Oblique"),
        (torch.zeros(3, 4), PSI(), ValueError, "scale groups"),
        (random(6, 4), PSI(dim=3), ValueError, "dimension 3"),
        (torch.eye(4, dtype=torch.complex128), Stiefel(), TypeError, "complex128"),
        (random(3, 4), geoopt.Stiefel(), ValueError, "does not fit"),
    ],
    ids=["vector", "off Stiefel", "off Oblique", "zero filter", "dim", "complex", "wide geoopt"],
)
def test_weights_that_are_no_points_are_refused_by_name(weight, manifold, error, message):
    group = {"params": [("conv.weight", nn.Parameter(weight))], "manifold": manifold}
    with pytest.raises(error, match=message) as caught:
        RiemannianSGD([group])
    assert "conv.weight" in str(caught.value)


def test_empty_parameter_list_is_refused():
    with pytest.raises(ValueError, match="empty"):
        RiemannianSGD([])


def test_sparse_gradient_on_a_manifold_is_refused_by_name():
    w = point(Oblique(), 3, 4)
    optimizer = RiemannianSGD([{"params": [("table", w)], "manifold": Oblique()}])
    w.grad = random(3, 4).to_sparse()
    with pytest.raises(TypeError, match="'table' has a sparse gradient"):
        optimizer.step()


def test_missing_gradients_leave_weights_and_state_alone():
    w, v = point(Stiefel(), 6, 4), point(Stiefel(), 6, 4, seed=1)
    optimizer = RiemannianSGD([{"params": [w, v], "manifold": Stiefel()}], 0.1, momentum=0.9)
    v.grad = random(6, 4)
    kept = w.detach().clone()
    optimizer.step()
    assert torch.equal(w, kept)
    assert w not in optimizer.state


def test_nan_gradient_makes_its_weight_nan_and_no_other():
    w, v = point(PSI(), 3, 4), point(PSI(), 3, 4)
    optimizer = RiemannianSGD([{"params": [w, v], "manifold": PSI()}], 0.1)
    w.grad, v.grad = torch.full((3, 4), torch.nan).double(), random(3, 4)
    optimizer.step()
    assert w.isnan().all()
    assert v.isfinite().all()


def test_weight_decay_warns_once_for_a_manifold_and_decays_the_rest():
    w, v = point(Stiefel(), 6, 4), nn.Parameter(random(3))
    groups = [{"params": [w], "manifold": Stiefel()}, {"params": [v]}]
    with pytest.warns(UserWarning, match="weight_decay") as caught:
        optimizer = RiemannianSGD(groups, 0.1, weight_decay=0.5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    kept, expected = w.detach().clone(), v.detach() * 0.95
    w.grad, v.grad = torch.zeros_like(w), torch.zeros_like(v)
    optimizer.step()
    torch.testing.assert_close(w, kept, rtol=0, atol=1e-15)
    torch.testing.assert_close(v, expected, rtol=1e-15, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RiemannianSGD([{**groups[0], "weight_decay": 0}, groups[1]], 0.1, weight_decay=0.5)
