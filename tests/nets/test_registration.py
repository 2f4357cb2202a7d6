"""Parameter groups and manifold parameters from the measurement."""

import copy

import geoopt
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from retract.manifolds import PSI
from retract.nets import register_scale_invariant, scale_invariant_groups
from tests.nets.arrangements import images


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(216, 3),
    )


def test_groups_hold_every_parameter_once_by_name():
    model = small_net()
    groups = scale_invariant_groups(model, images(), euclidean_lr=0.03)
    assert [str(g.get("manifold")) for g in groups] == ["PSI(dim=0)", "PSI(dim=1, conv_groups=2)", "None"]
    assert [len(g["params"]) for g in groups] == [1, 1, 6]
    assert groups[-1]["lr"] == 0.03
    assert "lr" not in scale_invariant_groups(model, images())[-1]
    named = dict(pair for g in groups for pair in g["params"])
    assert all(named[name] is p for name, p in model.named_parameters())
    torch.optim.SGD([{k: v for k, v in g.items() if k != "manifold"} for g in groups], lr=0.1)


def test_register_keeps_the_parameter_objects_and_geoopt_trains_them():
    model = small_net()
    parameters = list(model.parameters())
    before = copy.deepcopy(model.state_dict())
    assert register_scale_invariant(model, images()) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert isinstance(model[0].weight, geoopt.ManifoldParameter)
    assert isinstance(model[0].weight.manifold, PSI)
    assert type(model[6].weight) is nn.Parameter
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    optimizer = geoopt.optim.RiemannianSGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = model[0].weight.flatten(1).norm(dim=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before["0.weight"], model[0].weight)
    torch.testing.assert_close(model[0].weight.flatten(1).norm(dim=1), norms)
    twin = copy.deepcopy(model)
    assert isinstance(twin[0].weight.manifold, PSI)


def test_register_twice_and_beside_other_manifolds():
    model = small_net()
    model[6].weight = geoopt.ManifoldParameter(torch.eye(216)[:3].clone(), manifold=geoopt.Sphere())
    register_scale_invariant(register_scale_invariant(model, images()), images())
    assert str(model[6].weight.manifold).startswith("Sphere")
    groups = scale_invariant_groups(model, images())
    assert "6.weight" in dict(groups[-1]["params"])


def test_shared_and_parametrized_weights_are_registered():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, nn.BatchNorm1d(4), b, nn.BatchNorm1d(4), parametrizations.weight_norm(nn.Linear(4, 3)))
    x = torch.randn(7, 4)
    outputs = model(x)
    register_scale_invariant(model, x)
    assert a.weight is b.weight
    assert isinstance(b.weight, geoopt.ManifoldParameter)
    assert isinstance(model[4].parametrizations.weight.original1, geoopt.ManifoldParameter)
    torch.testing.assert_close(model(x), outputs)


def test_refusals_come_before_canonical_changes_anything():
    model = small_net()
    model[0].weight = type("Marked", (nn.Parameter,), {})(model[0].weight.detach())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="Marked"):
        register_scale_invariant(model, images(), canonical=True)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_other_parameter_classes_are_refused_by_register():
    class Marked(nn.Parameter):
        pass

    model = small_net()
    model[0].weight = Marked(model[0].weight.detach())
    with pytest.raises(TypeError, match=r"0\.weight is a Marked"):
        register_scale_invariant(model, images())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("use", [scale_invariant_groups, register_scale_invariant])
def test_zero_filters_are_refused_by_name_and_index(use, value):
    model = small_net()
    with torch.no_grad():
        model[0].weight[1:3] = value
    if value == 0:
        with pytest.raises(ValueError, match=r"0\.weight.*filters 1, 2 \(2 of 4\)"):
            use(model, images())
        assert type(model[0].weight) is nn.Parameter
    else:
        with pytest.raises(ValueError, match="not finite"):
            use(model, images())
