"""find_scale_invariant on layers and normalisations whose answer is known by algebra."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from retract.nets import find_scale_invariant
from tests.nets.arrangements import Net, head, images, kinds, materialised


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -------------------------------------------------------------------------------- layers and normalisations

conv1d = (nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), (5, 3, 8))
conv3d = (nn.Conv3d(2, 4, 2, bias=False), nn.BatchNorm3d(4), (3, 2, 4, 4, 4))
picture = (3, 4, 6, 6)
LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), picture, "PSI(dim=0)"),
    "conv with a dead bias": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), picture, "PSI(dim=0)"),
    "conv1d": (*conv1d, "PSI(dim=0)"),
    "conv3d": (*conv3d, "PSI(dim=0)"),
    "linear": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (7, 4), "PSI(dim=0)"),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), picture, "PSI(dim=0)"),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), picture, "PSI(dim=0)"),
    "instance": (nn.Conv2d(4, 6, 3, bias=False), nn.InstanceNorm2d(6), picture, "PSI(dim=0)"),
    "instance by groups": (nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(6, 6), picture, "PSI(dim=0)"),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), picture, "PSI(dim=1)"),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),
        picture,
        "PSI(dim=1, conv_groups=2)",
    ),
    "transposed, depthwise": (
        nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False),
        nn.BatchNorm2d(4),
        picture,
        "PSI(dim=0)",  # the same slices as PSI(dim=1, conv_groups=4),
    ),
    "group norm": (nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(2, 6), picture, "PSI(dim=0, groups=2)"),
    "group norm, finer": (
        nn.Conv2d(4, 6, 3, bias=False),
        nn.GroupNorm(3, 6),
        picture,
        "PSI(dim=0, groups=3)",
    ),
    "transposed, group norm": (
        nn.ConvTranspose2d(4, 6, 3, bias=False),
        nn.GroupNorm(2, 6),
        picture,
        "PSI(dim=1, groups=2)",
    ),
    "transposed, grouped, group norm": (
        nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False),
        nn.GroupNorm(4, 8),
        picture,
        "PSI(dim=1, groups=4, conv_groups=2)",
    ),
    "one group": (nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(1, 6), picture, "PSI(dim=0, groups=1)"),
    "layer norm": (nn.Linear(4, 6, bias=False), nn.LayerNorm(6), (7, 4), "PSI(dim=0, groups=1)"),
    "rms norm": (nn.Linear(4, 6, bias=False), nn.RMSNorm(6), (7, 4), "PSI(dim=0, groups=1)"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer_before_normalisation(case):
    layer, norm, shape, manifold = LAYERS[case]
    x = torch.randn(shape)
    model = materialised(head(layer, norm), x)
    found = find_scale_invariant(model, x)
    assert str(found["0.weight"].manifold) == manifold
    assert found["0.weight"].residual < 1e-12
    assert {name for name, i in found.items() if i.manifold is not None} == {"0.weight"}


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.GroupNorm(2, 6), picture), (nn.GroupNorm(1, 6), picture), (nn.LayerNorm(6), (7, 4))],
)
def test_bias_before_a_norm_that_mixes_channels_is_joint(norm, shape):
    x = torch.randn(shape)
    layer = nn.Conv2d(4, 6, 3) if len(shape) == 4 else nn.Linear(4, 6)
    found = find_scale_invariant(materialised(head(layer, norm), x), x)
    assert (found["0.weight"].kind, found["0.weight"].partner) == ("bias", "0.bias")
    assert found["0.weight"].manifold is None
    assert found["0.bias"].kind == "none"


def test_l2_normalised_features_are_invariant_as_a_whole():
    x = torch.randn(7, 4)
    model = Net(
        lambda m, x: m["out"](F.normalize(m["lin"](x), dim=1)),
        lin=nn.Linear(4, 6, bias=False),
        out=nn.Linear(6, 3),
    )
    assert find_scale_invariant(model, x)["layers.lin.weight"].kind == "whole"


# ----------------------------------------------------------------------------------- between layer and norm


@pytest.mark.parametrize(
    ("between", "bias", "kind"),
    [
        (nn.MaxPool2d(2), False, "filter"),
        (nn.AvgPool2d(2), False, "filter"),
        (nn.ReLU(), False, "filter"),
        (nn.LeakyReLU(), False, "filter"),
        (nn.Dropout(0.5), False, "filter"),
        (nn.Dropout2d(0.99), False, "filter"),
        (nn.ReLU(), True, "bias"),
        (nn.GELU(), False, "none"),
        (nn.Sigmoid(), False, "none"),
    ],
)
def test_between_convolution_and_batch_norm(between, bias, kind):
    x = images()
    model = materialised(head(nn.Conv2d(3, 5, 3, bias=bias), between, nn.BatchNorm2d(5)), x)
    found = find_scale_invariant(model, x)["0.weight"]
    assert found.kind == kind
    assert found.partner == ("0.bias" if kind == "bias" else None)
    if kind == "none":
        assert found.residual > 1e-3


def test_saturation_that_the_gradient_misses_is_seen_by_rescaling():
    """|x| below 6 everywhere: ReLU6 is linear to the gradient, but not once the filter is rescaled."""
    x = 0.1 * images()
    found = find_scale_invariant(
        materialised(head(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU6(), nn.BatchNorm2d(5)), x), 20 * x
    )
    assert found["0.weight"].kind == "none"
    found = find_scale_invariant(
        materialised(head(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU6(), nn.BatchNorm2d(5)), x), x
    )
    assert found["0.weight"].kind == "filter"


def test_homogeneous_layers_before_batch_norm_are_invariant_as_a_whole():
    x = images()
    layers = nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4)
    found = kinds(materialised(head(*layers), x), x)
    assert (found["0.weight"], found["2.weight"]) == ("whole", "filter")


# ------------------------------------------------------------------------------- degenerate, frozen, unused


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.Conv2d(4, 4, 1, groups=4)])
def test_filters_of_one_entry_have_no_direction(layer):
    x = torch.randn(picture)
    found = find_scale_invariant(materialised(head(layer, nn.BatchNorm2d(4)), x), x)["0.weight"]
    assert found.kind == "none"
    assert "gradient is zero" in found.reason


def test_bias_before_batch_norm_is_dead():
    found = find_scale_invariant(materialised(head(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), images()), images())
    assert "gradient is zero" in found["0.bias"].reason


def test_frozen_batch_norm_counts_as_frozen_in_a_training_model_only():
    model = materialised(head(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), images())
    model.train()
    model[1].eval()
    found = find_scale_invariant(model, images())["0.weight"]
    assert found.kind == "none"
    assert found.residual > 1e-3
    model.eval()
    assert kinds(model, images())["0.weight"] == "filter"


def test_unused_and_frozen_parameters():
    model = materialised(head(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), images())
    model.add_module("spare", nn.Identity())
    model.spare.register_parameter("weight", nn.Parameter(torch.randn(3, 3)))
    model[0].weight.requires_grad_(False)
    found = find_scale_invariant(model, images())
    assert found["0.weight"].kind == "filter"
    assert found["spare.weight"].kind == "none"
    assert "no part" in found["spare.weight"].reason
    assert not model[0].weight.requires_grad


def test_zero_filters_and_dead_filters_do_not_decide():
    model = materialised(head(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), images())
    nn.init.zeros_(model[0].weight[1])
    assert kinds(model, images())["0.weight"] == "filter"
    dead = materialised(head(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4)), images())
    with torch.no_grad():
        dead[0].weight[1] = -1
    assert kinds(dead, images().abs())["0.weight"] == "filter"


def test_networks_at_initialisation_are_judged_at_generic_parameters():
    """Gain 1 and shift 0 would make BatchNorm's gain pass for invariant, and a zero head hide everything."""
    model = head(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    materialised(model, images())
    nn.init.zeros_(model[-1].weight)
    found = find_scale_invariant(model, images())
    assert found["1.weight"].kind == "filter"
    assert found["0.weight"].manifold is None


def test_batch_of_two_at_one_pixel_is_grown():
    layers = (nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
    model = nn.Sequential(
        *layers,
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, 2, bias=False),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    for batch in (1, 2):
        found = kinds(model, images(batch))
        assert found["0.weight"] == found["3.weight"] == "filter"


# ----------------------------------------------------------------------------------------- parametrizations


def test_weight_norm_direction_is_invariant_without_any_normalisation_layer():
    x = images()
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    found = find_scale_invariant(materialised(head(layer), x), x)
    assert found["0.parametrizations.weight.original1"].kind == "filter"
    assert found["0.parametrizations.weight.original0"].kind == "none"
    model = materialised(head(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), x)
    assert kinds(model, x)["0.parametrizations.weight.original0"] == "none"


def test_spectral_norm_is_invariant_as_a_whole_though_its_power_iteration_moves():
    x = images()
    found = kinds(materialised(head(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))), x), x)
    assert found["0.parametrizations.weight.original"] == "whole"


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_bias_of_a_parametrized_weight_is_its_partner():
    layer = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    found = find_scale_invariant(materialised(head(layer, nn.ReLU(), nn.BatchNorm2d(4)), images()), images())
    assert found["0.parametrizations.weight.original"].kind == "bias"
    assert found["0.parametrizations.weight.original"].partner == "0.bias"
    assert found["0.parametrizations.weight.original"].reason == "per filter"
