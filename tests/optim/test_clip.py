import math

import geoopt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from retract.manifolds import PSI, Oblique, Stiefel
from retract.optim import RiemannianSGD, clip_grad_norm_
from tests.networks import directions, invariant_net, rescale


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight(manifold, *shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    w = random(*shape)
    w = nn.Parameter((w if manifold is None else manifold.projx(w)).to(dtype))
    w.grad = 3 * random(*shape, seed=1).to(dtype)
    return w


def train(clip, steps: int, *, scaled: bool) -> tuple[Tensor, list[float], int]:
    """Directions, losses and number of clipped steps of RiemannianSGD on the invariant network."""
    model, groups, batch, target = invariant_net()
    if scaled:
        rescale(model, seed=1, span=2)
    optimizer = RiemannianSGD(groups, 0.1, momentum=0.9)
    losses, clipped, limit = [], 0, 0.15
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch), target)
        loss.backward()
        clipped += bool(clip(optimizer, limit) > limit)
        optimizer.step()
        losses.append(loss.item())
    return directions(model), losses, clipped


def test_clipped_training_does_not_depend_on_scales():
    """papers' check 14."""
    (w, losses, clipped), (scaled_w, scaled_losses, scaled_clipped) = (
        train(clip_grad_norm_, 100, scaled=scaled) for scaled in (False, True)
    )
    assert 10 < clipped == scaled_clipped
    assert (w - scaled_w).abs().max() < 1e-11
    assert max(abs(a - b) for a, b in zip(losses, scaled_losses, strict=True)) < 1e-11


def test_torchs_clipping_does():
    def euclidean(optimizer, limit):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, limit)

    (w, *_), (scaled_w, *_) = (train(euclidean, 100, scaled=scaled) for scaled in (False, True))
    assert (w - scaled_w).abs().max() > 0.1


@pytest.mark.parametrize(
    "manifold",
    [PSI(), PSI(1, conv_groups=2), Stiefel(), Oblique(), geoopt.Sphere(), geoopt.Stiefel()],
    ids=str,
)
def test_norm_is_that_of_the_metric(manifold):
    w = weight(manifold, 8, 6)
    h = manifold.egrad2rgrad(w, w.grad)
    expected = manifold.inner(w, h, h).sum().sqrt()
    torch.testing.assert_close(clip_grad_norm_([{"params": [w], "manifold": manifold}], math.inf), expected)


def test_norm_of_a_product_and_clipped_gradients():
    manifolds = (PSI(), Stiefel(), None)
    groups = [{"params": [weight(m, 4, 6), weight(m, 3, 5)], "manifold": m} for m in manifolds]
    before = [[w.grad.clone() for w in group["params"]] for group in groups]
    squares = 0.0
    for group in groups:
        for w in group["params"]:
            m = group["manifold"]
            squares += w.grad.square().sum() if m is None else m.inner(w, m.egrad2rgrad(w, w.grad))
    total = clip_grad_norm_(groups, 0.5)
    torch.testing.assert_close(total, squares.sqrt())
    torch.testing.assert_close(clip_grad_norm_(groups, math.inf), torch.tensor(0.5).double())
    for group, old in zip(groups, before, strict=True):
        for w, grad in zip(group["params"], old, strict=True):
            torch.testing.assert_close(w.grad, grad * (0.5 / total))


def test_total_below_the_limit_changes_nothing_to_the_bit():
    w = weight(PSI(), 4, 6)
    kept = w.grad.clone()
    total = clip_grad_norm_([{"params": [w], "manifold": PSI()}], 1e6)
    assert torch.equal(w.grad, kept)
    assert total < 1e6


def test_euclidean_parameters_have_torchs_norm():
    params = [weight(None, 4, 6, dtype=torch.float32), weight(None, 3, dtype=torch.float32)]
    expected = torch.nn.utils.get_total_norm([w.grad for w in params])
    torch.testing.assert_close(clip_grad_norm_(params, 0.1), expected)


def test_every_way_to_hand_over_parameters():
    def make():
        tagged = geoopt.ManifoldParameter(random(4, 6), manifold=PSI())
        tagged.grad = random(4, 6, seed=1)
        return tagged, weight(None, 3)

    totals = []
    for wrap in (
        list,
        iter,
        lambda ps: RiemannianSGD(ps),
        lambda ps: RiemannianSGD(ps).param_groups,
        lambda ps: torch.optim.SGD(ps),
        lambda ps: [{"params": ps}],
        lambda ps: [{"params": [ps[0]], "manifold": PSI()}, {"params": [ps[1]]}],
        lambda ps: (("name", p) for p in ps),
    ):
        ps = make()
        totals.append(clip_grad_norm_(wrap(ps), 0.5))
        assert clip_grad_norm_(list(ps), 0.5).item() == pytest.approx(0.5)
    assert all(torch.equal(total, totals[0]) for total in totals)
    w = weight(None, 3)
    assert clip_grad_norm_(w, 9.0) == w.grad.norm()


def test_factored_point_is_one_point():
    class Pair:
        factored = True

        def egrad2rgrad(self, x, g):
            return tuple(map(Stiefel().egrad2rgrad, x, g))

    pair = [weight(Stiefel(), 5, 3), weight(Stiefel(), 4, 2)]
    apart = clip_grad_norm_([{"params": pair, "manifold": Stiefel()}], math.inf)
    torch.testing.assert_close(clip_grad_norm_([{"params": pair, "manifold": Pair()}], math.inf), apart)


def test_without_gradients_the_total_is_zero():
    w = nn.Parameter(random(3))
    assert clip_grad_norm_([w], 1.0) == 0
    assert clip_grad_norm_([], 1.0) == 0
    w.grad = torch.zeros_like(w)
    assert clip_grad_norm_([w], 1.0) == 0
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_half_precision_is_summed_in_float32():
    w = nn.Parameter(torch.ones(10, dtype=torch.float16))
    w.grad = torch.full_like(w, 300.0)  # its square overflows float16
    total = clip_grad_norm_([w], 1.0)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, torch.tensor(300.0 * math.sqrt(10)))
    assert w.grad.dtype == torch.float16


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_total_that_is_not_finite(bad):
    w, v = weight(PSI(), 3, 4), weight(None, 3)
    w.grad[1, 2] = bad
    kept = v.grad.clone()
    groups = [{"params": [w], "manifold": PSI()}, {"params": [v]}]
    with pytest.raises(RuntimeError, match="total norm"):
        clip_grad_norm_(groups, 1.0, error_if_nonfinite=True)
    assert torch.equal(v.grad, kept)
    assert clip_grad_norm_(groups, 1.0).isnan()
    assert v.grad.isnan().all()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_limit_out_of_range_is_named(max_norm):
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_([weight(None, 3)], max_norm)


def test_sparse_gradient_is_refused():
    w = nn.Parameter(random(3, 4))
    w.grad = random(3, 4).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        clip_grad_norm_([w], 1.0)
