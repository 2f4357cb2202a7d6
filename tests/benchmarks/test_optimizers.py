"""Every optimizer by name: which weights get which rate and decay, and that all of them train."""

import geoopt
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retract.benchmarks.optimizers import OPTIMIZERS, build
from retract.manifolds import PSI
from retract.nets.cnn import digitsnet, mnist_convnet

RIEMANNIAN = [name for name, choice in OPTIMIZERS.items() if choice.manifold not in (None, "matrix")]
EUCLIDEAN = [name for name, choice in OPTIMIZERS.items() if choice.manifold is None]
DECAYING = [name for name in OPTIMIZERS if name not in ("psigd", "riemannian-gd")]
OTHERS_RATES = {"psiangular": 0.3, "psiadam": 0.3, "muon": 3e-3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return digitsnet()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 10


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss.item()


def invariant(model):
    return {id(tensor) for group in model.manifold_groups() if "manifold" in group for _, tensor in group["params"]}


def rate_and_decay(model, optimizer):
    """{(is it scale-invariant, rate, decay)} over all parameters, each of which must be in one group."""
    seen = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(seen) == sorted(id(weight) for weight in model.parameters())
    known = invariant(model)
    return {
        (id(weight) in known, group["lr"], group.get("weight_decay"))
        for group in optimizer.param_groups
        for weight in group["params"]
    }


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_it_trains(model, batch, name):
    optimizer = build(name, model)
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    losses = [step(model, optimizer, batch) for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(weight, before[key]) for key, weight in model.named_parameters())


@pytest.mark.parametrize("name", RIEMANNIAN)
def test_invariant_weights_keep_their_norm(model, batch, name):
    optimizer = build(name, model)
    norms = [PSI().norms(weight).clone() for weight in model.parameters() if id(weight) in invariant(model)]
    for _ in range(3):
        step(model, optimizer, batch)
    after = [PSI().norms(weight) for weight in model.parameters() if id(weight) in invariant(model)]
    for old, new in zip(norms, after, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in DECAYING if name in RIEMANNIAN])
def test_decay_does_not_reach_invariant_weights(model, name, recwarn):
    optimizer = build(name, model, lr=0.2, euclidean_lr=0.5, weight_decay=1e-3)
    assert rate_and_decay(model, optimizer) == {(True, 0.2, 0.0), (False, 0.5, 1e-3)}
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("name", EUCLIDEAN)
def test_decay_of_a_euclidean_method_reaches_all(model, name):
    assert {entry[1:] for entry in rate_and_decay(model, build(name, model, lr=0.2, weight_decay=1e-3))} == {
        (0.2, 1e-3)
    }
    apart = build(name, model, lr=0.2, euclidean_lr=0.5, weight_decay=1e-3)
    assert rate_and_decay(model, apart) == {(True, 0.2, 1e-3), (False, 0.5, 1e-3)}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_default_rate(model, name):
    rates = {entry[:2] for entry in rate_and_decay(model, build(name, model))}
    own = OTHERS_RATES.get(name, OPTIMIZERS[name].lr)
    assert rates == {(True, OPTIMIZERS[name].lr), (False, own)}


def test_rates_and_decay_of_muon(model):
    optimizer = build("muon", model, lr=0.2, euclidean_lr=0.5, weight_decay=1e-3)
    assert rate_and_decay(model, optimizer) == {(True, 0.2, 1e-3), (False, 0.5, 1e-3)}


def test_sgd_is_torch_sgd(batch):
    models = [digitsnet() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = build("sgd", models[0], lr=0.05, momentum=0.8, weight_decay=1e-2)
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.05, momentum=0.8, weight_decay=1e-2)
    for _ in range(5):
        assert step(models[0], ours, batch) == step(models[1], theirs, batch)


def test_geoopt_sphere_is_geoopts_own_sphere(model, batch):
    """Filters as rows of unit norm on geoopt.Sphere, stepped by the same optimizer, go the same way.

    One step: geoopt's momentum is transported alike, but its Sphere and ours round differently.
    """
    optimizer = build("geoopt-sphere", model, lr=0.1, momentum=0.9)
    weights = [weight for weight in model.parameters() if id(weight) in invariant(model)]
    rows = [geoopt.ManifoldParameter(weight.detach().flatten(1).clone(), geoopt.Sphere()) for weight in weights]
    reference = geoopt.optim.RiemannianSGD(rows, lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, optimizer, batch)
        for row, weight in zip(rows, weights, strict=True):
            row.grad = weight.grad.flatten(1).clone()
        reference.step()
        for row, weight in zip(rows, weights, strict=True):
            torch.testing.assert_close(weight.detach().flatten(1), row.detach(), rtol=1e-4, atol=1e-6)
    assert all(torch.allclose(PSI().norms(weight), torch.ones(())) for weight in weights)


def test_states_hold_plain_values_only(model, batch, tmp_path):
    for name in OPTIMIZERS:
        other = digitsnet()
        optimizer = build(name, other)
        step(other, optimizer, batch)
        torch.save(optimizer.state_dict(), tmp_path / name)
        torch.load(tmp_path / name, weights_only=True)


class OwnNet(nn.Sequential):
    """Not of the zoo: no manifold_groups()."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def test_weights_of_other_models_are_measured(batch):
    model = OwnNet()
    optimizer = build("psisgd", model, batch[0])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 4]
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    with pytest.raises(ValueError, match=r"example_input is needed: OwnNet has no manifold_groups\(\)"):
        build("psisgd", model)


@pytest.mark.parametrize("name", [*RIEMANNIAN, "muon"])
def test_a_model_without_invariant_weights_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} needs scale-invariant weights, and MnistConvNet has none"):
        build(name, mnist_convnet())


@pytest.mark.parametrize(
    ("name", "known"), [("geoopt-sphere", "geoopt-sphere"), ("unit-norm", "UnitNormSGD"), ("sgd-g", "SGDG")]
)
def test_other_scale_groups_are_refused(batch, name, known):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(ValueError, match=f"{known} knows one scale per filter"):
        build(name, model, batch[0])


@pytest.mark.parametrize("argument", ["lr", "momentum", "weight_decay", "euclidean_lr"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_out_of_range(model, argument, value):
    for name in OPTIMIZERS:
        with pytest.raises(ValueError, match=rf"{argument} must be finite and at least 0, got {value}"):
            build(name, model, **{argument: value})


def test_unknown_names_and_psigd_decay(model):
    with pytest.raises(ValueError, match=r"optimizer must be one of sgd, .*, got 'adagrad'"):
        build("adagrad", model)
    with pytest.raises(ValueError, match="psigd and riemannian-gd have no weight decay"):
        build("psigd", model, weight_decay=1e-4)
