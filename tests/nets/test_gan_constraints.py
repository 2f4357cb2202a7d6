"""Constraints by name: what they make of layers, that training keeps them, and the published compressions."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from retract.nets import manifold_groups
from retract.nets.gan.constraints import CONSTRAINTS, DEFAULT_RANK, constrain
from retract.nets.gan.networks import GANS, gan_pair
from retract.nets.gan.sngan import SNGANDiscriminator
from retract.nets.gan.spectra import singular_values, spectrum_violation
from retract.nets.parametrizations import STTP, SVDP
from retract.nets.parametrizations.spectral_regularization import SpectralRegularization
from retract.nets.spectral import conv_norm
from retract.nets.summary import summary
from retract.optim import RiemannianSGD

FACTORED = [name for name, constraint in CONSTRAINTS.items() if constraint.factored]
DENSE = [name for name in CONSTRAINTS if name not in FACTORED]
SMALL = {"digits": 8, "dcgan28": 4, "dcgan32": 4, "sngan32": 4, "sngan48": 16}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_pair(name):
    return gan_pair(name, width=SMALL[name], generator_width=SMALL[name])


def users_own():
    """A discriminator that the library does not know, with layers that no constraint takes."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(),
        nn.LazyLinear(1),
    )


def steps(model, optimizer, images, constraint, count):
    """Hinge loss of a discriminator: the first half of the images counts as data."""
    signs = torch.ones(len(images))
    signs[len(images) // 2 :] = -1
    for _ in range(count):
        optimizer.zero_grad()
        loss = torch.relu(1 - signs * model(images)).mean() + constraint.penalty(model)
        loss.backward()
        assert loss.isfinite()
        optimizer.step()


def test_names():
    assert sorted(CONSTRAINTS) == sorted(
        ["none", "sn", "sr", "lipschitz-operator"] + [f"{kind}-{mode}" for kind in ("svdp", "sttp") for mode in "clr"]
    )
    assert all(constraint.name == name for name, constraint in CONSTRAINTS.items())
    assert [name for name, constraint in CONSTRAINTS.items() if constraint.penalized] == ["svdp-r", "sttp-r"]


# --------------------------------------------------------------------------------------- every constraint, every pair


@pytest.mark.parametrize("pair", GANS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_singular_values_stay_in_their_set_through_adam(name, pair):
    _, model = small_pair(pair)
    assert constrain(model, name) is model
    images = torch.randn(4, *GANS[pair].image_shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.9))
    before = {key: value.clone() for key, value in singular_values(model).items()}
    steps(model, optimizer, images, CONSTRAINTS[name], 20 if pair == "digits" else 2)
    after = singular_values(model)
    if name != "sn":  # power iteration follows
        assert spectrum_violation(model) <= 1e-5
    if name not in ("none", "sn"):
        assert max(float(values[0]) for values in after.values()) <= 1 + 1e-5
    if not name.endswith("-c"):
        assert any(not torch.equal(before[key], after[key]) for key in after)


@pytest.mark.parametrize("pair", GANS)
@pytest.mark.parametrize("name", FACTORED)
def test_singular_values_stay_in_their_set_through_riemannian_descent(name, pair):
    _, model = small_pair(pair)
    constrain(model, name, form="stiefel")
    images = torch.randn(4, *GANS[pair].image_shape)
    optimizer = RiemannianSGD(model.manifold_groups(), lr=1e-2, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizer, images, CONSTRAINTS[name], 20 if pair == "digits" else 2)
    assert spectrum_violation(model) <= 1e-5
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("pair", ["dcgan28", "sngan32"])
@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name != "none"])
def test_generators_take_every_constraint(name, pair):
    model, _ = small_pair(pair)
    constrain(model, name, skip="linear")
    assert not parametrize.is_parametrized(model.linear)
    model(torch.randn(3, GANS[pair].latent)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if name != "sn":
        assert spectrum_violation(model) <= 1e-5


# --------------------------------------------------------------------------------------------- what each name means


def test_none_changes_nothing():
    model = users_own()
    before = str(model)
    assert constrain(model, "none") is model
    assert str(model) == before


def test_sn_is_that_of_torch():
    ours, theirs = SNGANDiscriminator(32, 4), SNGANDiscriminator(32, 4)
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    constrain(ours, "sn")
    torch.manual_seed(1)
    for module in list(theirs.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            spectral_norm(module)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_sr_is_dynamic_compensation_of_every_layer():
    model = constrain(SNGANDiscriminator(32, 4), "sr")
    found = [module for module in model.modules() if isinstance(module, SpectralRegularization)]
    assert len(found) == 11
    assert {one.compensation for one in found} == {"dynamic"}


@pytest.mark.parametrize("form", ["householder", "stiefel"])
@pytest.mark.parametrize("name", FACTORED)
def test_factored_constraints(name, form):
    model = constrain(SNGANDiscriminator(32, 4), name, rank=3, form=form)
    chains = [m for m in model.modules() if isinstance(m, parametrize.ParametrizationList)]
    assert len(chains) == 11
    for chain in chains:
        assert isinstance(chain[0], STTP if name.startswith("sttp") else SVDP)
        assert chain[0].rank == min(3, *chain[0].matrix_shape)
        assert chain[0].form == form
        assert chain[0].operator_norm == (
            1.0 if name == "lipschitz-operator" and chain[0].layout.is_convolution else None
        )
    for values in singular_values(model).values():
        if name.endswith("-c"):
            torch.testing.assert_close(values, torch.ones_like(values))
        elif name != "lipschitz-operator":
            torch.testing.assert_close(values, torch.linspace(1, 0.5, len(values)))


def test_lipschitz_operator_holds_the_convolution_where_the_others_do_not():
    norms = {}
    for name in ("svdp-l", "lipschitz-operator"):
        torch.manual_seed(0)
        model = constrain(SNGANDiscriminator(32, 8), name)
        norms[name] = max(float(conv_norm(block.conv2.weight.detach(), 16)) for block in model.blocks)
    assert norms["lipschitz-operator"] <= 1 + 1e-5
    assert norms["svdp-l"] > 1.2


def test_default_rank_is_the_published_one():
    model = constrain(nn.Linear(100, 80), "svdp-c")
    assert model.parametrizations.weight[0].rank == DEFAULT_RANK == 64


@pytest.mark.parametrize("name", ["svdp-r", "sttp-r"])
@pytest.mark.parametrize("form", ["householder", "stiefel"])
def test_penalty_is_the_mean_over_all_values(name, form):
    model = constrain(gan_pair("digits")[1], name, rank=5, form=form)
    values = torch.cat([s.double() for s in singular_values(model).values()])  # the largest of each layer is 1
    penalty = CONSTRAINTS[name].penalty(model)
    assert float(penalty.detach()) == pytest.approx(-float(values.log().mean()), rel=1e-5)
    penalty.backward()
    optimizer = (
        RiemannianSGD(manifold_groups(model), lr=0.1)
        if form == "stiefel"
        else torch.optim.SGD(model.parameters(), lr=0.1)
    )
    optimizer.step()
    assert float(CONSTRAINTS[name].penalty(model).detach()) < float(penalty.detach())


@pytest.mark.parametrize("name", [name for name, constraint in CONSTRAINTS.items() if not constraint.penalized])
def test_no_penalty(name):
    model = constrain(gan_pair("digits")[1].double(), name)
    penalty = CONSTRAINTS[name].penalty(model)
    assert float(penalty) == 0
    assert penalty.dtype == torch.float64
    assert penalty.shape == ()


# ---------------------------------------------------------------------------------------- published compressions

#: (size, width, name): tables 1 and 2, rank 64, with two more decimals than printed.
PUBLISHED = {
    (32, 128, "svdp-c"): 51.74,
    (32, 128, "sttp-c"): 16.71,
    (32, 128, "svdp-l"): 53.36,
    (32, 128, "sttp-r"): 18.33,
    (32, 32, "svdp-c"): 93.11,
    (32, 32, "sttp-c"): 87.74,
    (48, 64, "svdp-c"): 89.45,
    (48, 64, "sttp-c"): 74.12,
    (48, 1024, "svdp-c"): 14.23,
    (48, 1024, "sttp-c"): 3.25,
    (48, 1024, "svdp-l"): 14.50,
    (48, 1024, "sttp-l"): 3.52,
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case[1] >= 128 else []) for case in PUBLISHED]
)
def test_published_compression(case):
    size, width, name = case
    total = summary(constrain(SNGANDiscriminator(size, width), name))
    assert total.parameters == total.degrees_of_freedom
    layers = 0 if name.endswith("-c") else sum(row.rank is not None for row in total.layers)
    # The published spectra of modes L and R count their scale, which is fixed: one parameter a layer.
    z = total.compression + 100 * layers / total.elements
    assert round(z, 2) == PUBLISHED[case]


# --------------------------------------------------------------------------------------------- models of one's own


@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name != "none"])
def test_users_own_discriminator(name):
    model = users_own()
    images = torch.randn(3, 1, 6, 6)
    model(images)  # gives the lazy layer its shape
    constrain(model, name)
    assert [parametrize.is_parametrized(layer) for layer in model] == [True, False, False, True, False, True]
    reasons = {row.name: row.obstacle for row in summary(model).layers}
    assert "groups=2" in reasons["2"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps(model, optimizer, images, CONSTRAINTS[name], 2)
    if name != "sn":
        assert spectrum_violation(model) <= 1e-5


@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name != "none"])
def test_skipped_and_shared_layers_stay(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[1].weight
    constrain(model, name, skip=["0"])
    assert [parametrize.is_parametrized(layer) for layer in model] == [False, False, False, True]


@pytest.mark.parametrize("name", ["sn", "sr", "svdp-l"])
def test_layers_remain_the_objects_they_were(name):
    model = gan_pair("digits", width=4)[1]
    layer, calls = model.linear, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    constrain(model, name)
    model(torch.randn(2, 1, 8, 8))
    assert model.linear is layer
    assert calls == [1]


@pytest.mark.parametrize("name", ["sn", "sr", "svdp-c", "sttp-r", "lipschitz-operator"])
def test_state_round_trip(name):
    first, second = (gan_pair("digits", width=4)[1] for _ in range(2))
    constrain(first, name)
    constrain(second, name).load_state_dict(first.state_dict())
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(first.eval()(images), second.eval()(images))


@pytest.mark.parametrize("name", ["sr", "svdp-c", "sttp-l"])
def test_a_layer_without_a_start_leaves_the_model_as_it_was(name):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"layer '1': weight .*finite|layer '1': weight has NaN or infinite"):
        constrain(model, name)
    assert not any(parametrize.is_parametrized(layer) for layer in model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svdp", {}, "name must be one of none, sn, sr, svdp-c, .*got 'svdp'"),
        ("sn", {"rank": 8}, "rank must be None for constraint 'sn', whose weights are dense, got 8"),
        ("none", {"rank": 8}, "rank must be None for constraint 'none'"),
        (
            "sr",
            {"form": "stiefel"},
            "form must be left out for constraint 'sr', .* got 'stiefel'",
        ),
        ("svdp-c", {"form": "oblique"}, "form must be 'householder' or 'stiefel', got 'oblique'"),
        ("sttp-c", {"rank": 0}, "layer 'maps.0': .*got 0"),
        ("sn", {"skip": "nothing"}, "skip: 'nothing' fits no layer of the model"),
        ("sn", {"skip": "*"}, "model has no layer to constrain\n  maps.0: skip names it"),
        ("svdp-c", {"skip": "*"}, "model has no layer to factorize\n  maps.0: skip names it"),
    ],
)
def test_bad_arguments(name, options, message):
    model = gan_pair("digits", width=4)[1]
    with pytest.raises(ValueError, match=message):
        constrain(model, name, **options)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


@pytest.mark.parametrize("name", ["sn", "sr", "sttp-c"])
def test_a_model_without_layers(name):
    with pytest.raises(ValueError, match="no linear layer, embedding or convolution"):
        constrain(nn.Sequential(nn.ReLU()), name)
