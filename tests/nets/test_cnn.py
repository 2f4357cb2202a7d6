"""The zoo: published sizes, shapes, and structure that agrees with measurement."""

import math

import geoopt
import pytest
import torch

from retract.nets import cnn, find_scale_invariant
from retract.nets.layers.canonical import CanonicalLinear
from retract.nets.parametrizations import Canonical, canonical_weights

COUNTS = {
    "digitsnet": 14_458,
    "lenet5_bn": 61_932,
    "mnist_convnet": 1_199_882,
    "cifar_alexnet": 6_976_842,
    "vgg11_bn": 9_228_362,
    "vgg16_bn": 14_724_042,
    "resnet8": 75_290,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "wrn16_4": 2_748_890,
    "wrn28_10": 36_479_194,
}
# Millions as the papers print them: He et al. 2016, table 6; Zagoruyko and Komodakis 2016, tables 2 and 6.
PUBLISHED = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "wrn16_4": 2.7,
    "wrn28_10": 36.5,
}
IMAGENET = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}
LARGE = {"wrn28_10", "resnet34", "resnet50", "vgg16_bn"}
UNNORMALIZED = {"mnist_convnet", "cifar_alexnet"}


def count(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


def test_every_model_is_listed_with_its_input():
    assert set(cnn.MODELS) == set(cnn.INPUT_SHAPES) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    assert count(on_meta(cnn.MODELS[name])) == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name):
    decimals = 1 if PUBLISHED[name] > 1 else 2
    assert round(COUNTS[name] / 1e6, decimals) == PUBLISHED[name] or name in {"resnet44", "resnet56"}
    assert abs(COUNTS[name] / 1e6 - PUBLISHED[name]) < 1.0 * 10**-decimals


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_parameter_count(name):
    assert count(on_meta(cnn.MODELS[name], 1000, stem="imagenet")) == IMAGENET[name]


@pytest.mark.parametrize("name", COUNTS)
def test_forward_shape_and_options(name):
    channels, height, width = cnn.INPUT_SHAPES[name]
    model = on_meta(cnn.MODELS[name], num_classes=7, in_channels=channels + 1)
    assert model(torch.empty(2, channels + 1, height, width, device="meta")).shape == (2, 7)


def test_imagenet_stem_shape():
    model = on_meta(cnn.resnet50, 1000, stem="imagenet")
    x = torch.empty(2, 3, 224, 224, device="meta")
    assert model.layer1(model.maxpool(model.conv1(x))).shape == (2, 256, 56, 56)
    assert model(x).shape == (2, 1000)


def small_batch(name):
    channels, height, width = cnn.INPUT_SHAPES[name]
    if name.startswith(("resnet", "wrn")):
        height = width = 16
    return torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(1))


def by_structure(model):
    return {n: str(g["manifold"]) for g in model.manifold_groups() if "manifold" in g for n, _ in g["params"]}


def by_measurement(model, x):
    return {n: str(i.manifold) for n, i in find_scale_invariant(model, x).items() if i.manifold is not None}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in COUNTS])
def test_structure_agrees_with_measurement(name):
    torch.manual_seed(0)
    model = cnn.MODELS[name]()
    assert by_structure(model) == by_measurement(model, small_batch(name))


@pytest.mark.parametrize("width", [1, 2])
def test_wide_resnet_stem_depends_on_the_width(width):
    torch.manual_seed(0)
    model = cnn.WideResNet(10, width)
    assert ("conv1.weight" in by_structure(model)) == (width > 1)
    assert by_structure(model) == by_measurement(model, small_batch("wrn16_4"))


def test_imagenet_stem_structure_agrees_with_measurement():
    torch.manual_seed(0)
    model = cnn.resnet18(5, stem="imagenet")
    assert by_structure(model) == by_measurement(model, torch.randn(2, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 224])
def test_resnet50_on_a_batch_of_two(size):
    torch.manual_seed(0)
    model = cnn.resnet50(1000, stem="imagenet")
    assert by_structure(model) == by_measurement(model, torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", sorted(set(COUNTS) - UNNORMALIZED))
def test_psi_manifold_at_construction(name):
    model = on_meta(cnn.MODELS[name], manifold="psi")
    on = {n: str(p.manifold) for n, p in model.named_parameters() if isinstance(p, geoopt.ManifoldParameter)}
    assert on == by_structure(model)
    assert on
    groups = model.manifold_groups(euclidean_lr=0.2)
    assert groups[-1]["lr"] == 0.2
    assert sorted(n for g in groups for n, _ in g["params"]) == sorted(n for n, _ in model.named_parameters())


def test_groups_of_resnet20_are_its_19_convolutions():
    groups = cnn.resnet20().manifold_groups()
    assert [len(g["params"]) for g in groups] == [19, 40]
    assert sum(groups[0]["manifold"].num_scales(p.shape) for _, p in groups[0]["params"]) == 688


@pytest.mark.parametrize("name", sorted(UNNORMALIZED))
def test_networks_without_normalisation(name):
    groups = on_meta(cnn.MODELS[name]).manifold_groups()
    assert len(groups) == 1
    assert "manifold" not in groups[0]
    with pytest.raises(ValueError, match="has no normalisation layer"):
        on_meta(cnn.MODELS[name], manifold="psi")


@pytest.mark.parametrize(
    ("name", "weight", "deviation"),
    [
        ("resnet20", "layer2.0.conv1.weight", (2 / (32 * 9)) ** 0.5),
        ("resnet50", "layer1.0.conv1.weight", (2 / 64) ** 0.5),
        ("wrn16_4", "layer3.1.conv2.weight", (2 / (256 * 9)) ** 0.5),
        ("vgg11_bn", "features.3.0.weight", (2 / (128 * 9)) ** 0.5),
        ("vgg11_bn", "fc.weight", 0.01),
    ],
)
def test_initialisation(name, weight, deviation):
    torch.manual_seed(0)
    values = dict(cnn.MODELS[name]().named_parameters())[weight]
    assert float(values.detach().std()) == pytest.approx(deviation, rel=0.05)


def test_torchvision_names():
    names = set(on_meta(cnn.resnet50, stem="imagenet").state_dict())
    expected = {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv3.weight",
        "layer1.0.downsample.0.weight",
        "layer2.0.downsample.1.num_batches_tracked",
        "layer4.2.bn3.bias",
        "fc.bias",
    }
    assert expected <= names
    assert len(names) == 320


def test_bad_arguments():
    with pytest.raises(ValueError, match="manifold must be None or 'psi', got 'sphere'"):
        cnn.resnet20(manifold="sphere")
    with pytest.raises(ValueError, match="stem must be 'cifar' or 'imagenet', got 'mnist'"):
        cnn.resnet18(stem="mnist")
    with pytest.raises(ValueError, match="depth must be 6n"):
        cnn.WideResNet(12, 2)


PLAIN = {"mnist_convnet": 1_199_882, "cifar_alexnet": 6_976_842}
# Of the canonical networks, by the paper's count: vectors of unit modes and one sigma for each layer are in it.
CANONICAL = {"mnist_convnet": 1_226_038, "cifar_alexnet": 9_253_171}
# The published run kept int(R (1 - percent / 100)) terms of each layer.
TRUNCATED = {25: 919_457, 50: 613_118, 75: 306_537}


def published(model, percent=0):
    """The paper's count of parameters when each layer has lost so many percent of its terms."""
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    return biases + sum(
        Canonical(canonical.shape, int(canonical.rank * (1 - percent / 100))).published_parameters
        for _, canonical, _ in canonical_weights(model)
    )


@pytest.mark.parametrize("name", sorted(CANONICAL))
def test_published_counts_of_canonical_networks(name):
    model = cnn.MODELS[name](weights="canonical")
    layers = [canonical for _, canonical, _ in canonical_weights(model)]
    assert published(model) == CANONICAL[name]
    not_stored = sum(1 + canonical.rank * canonical.shape.count(1) for canonical in layers)
    assert count(model) == CANONICAL[name] - not_stored
    assert not_stored == {"mnist_convnet": 4 + 11, "cifar_alexnet": 8}[name]
    assert count(cnn.MODELS[name]()) == PLAIN[name]
    channels = sum(canonical.shape[0] for canonical in layers)
    assert count(cnn.MODELS[name](weights="weight_norm")) == PLAIN[name] + channels
    if name == "mnist_convnet":
        assert [canonical.rank for canonical in layers] == [11, 270, 128, 10]
        assert {percent: published(model, percent) for percent in TRUNCATED} == TRUNCATED


def test_convolutions_of_the_published_networks_are_larger_than_dense_ones():
    """Before truncation: 1.36 to 1.54 times, which is what the paper's ranks come to."""
    for name, low, high in (("mnist_convnet", 1.5, 1.52), ("cifar_alexnet", 1.35, 1.55)):
        model = cnn.MODELS[name](weights="canonical")
        large = [c for _, c, _ in canonical_weights(model) if len(c.shape) == 4 and min(c.shape[:2]) > 3]
        for canonical in large:
            assert low < canonical.published_parameters / math.prod(canonical.shape) < high


@pytest.mark.parametrize("name", sorted(CANONICAL))
@pytest.mark.parametrize("weights", ["weight_norm", "canonical"])
def test_variants_of_networks_without_normalisation(name, weights):
    torch.manual_seed(0)
    model = cnn.MODELS[name](7, weights=weights).eval()
    x = torch.randn(2, *cnn.INPUT_SHAPES[name])
    output = model(x)
    assert output.shape == (2, 7)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if weights == "canonical":
        assert 0.05 < output.std() < 20
        assert type(model.classifier[-1]).__bases__ == (CanonicalLinear,)


def test_groups_of_a_network_in_oblique_form():
    model = cnn.mnist_convnet(weights="canonical", form="oblique", init="uniform")
    factors, rest = model.manifold_groups(euclidean_lr=0.1)
    assert str(factors["manifold"]) == "Oblique(dim=0)"
    assert [tuple(p.shape) for _, p in factors["params"]][:3] == [(11, 32), (11, 3), (11, 3)]
    assert len(factors["params"]) == 3 + 4 + 2 + 2
    assert rest["lr"] == 0.1 and len(rest["params"]) == 8


def test_bad_weights():
    with pytest.raises(ValueError, match="weights must be 'plain', 'weight_norm' or 'canonical', got 'cp'"):
        on_meta(cnn.mnist_convnet, weights="cp")
    with pytest.raises(TypeError, match="form: an option of weights='canonical', got weights='plain'"):
        on_meta(cnn.mnist_convnet, form="oblique")
    with pytest.raises(ValueError, match="has no normalisation layer"):
        on_meta(cnn.mnist_convnet, manifold="psi", weights="canonical")
    with pytest.raises(ValueError, match="meta device"):
        on_meta(cnn.mnist_convnet, weights="canonical")
