"""Metrics of samples: closed forms, and that each gets worse when samples get worse in its way."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from retract.benchmarks.data import load
from retract.benchmarks.samples import classifier as sample_classifier
from retract.benchmarks.samples.classes import classifier_score
from retract.benchmarks.samples.classifier import Recipe, feature_classifier
from retract.benchmarks.samples.distances import frechet_distance_of
from retract.benchmarks.samples.metrics import evaluate_samples, to_bytes
from retract.benchmarks.samples.neighbours import neighbour_metrics

COUNT = 200


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.fixture(scope="module", autouse=True)
def classifier(data, tmp_path_factory):
    """Trained for a shorter time than usual; all tests share its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        recipe = Recipe("digitsnet", epochs=4, lr=0.1, batch_size=32)
        patch.setattr(sample_classifier, "recipe_for", lambda data: recipe)
        yield feature_classifier(data)


@pytest.fixture(scope="module")
def good(data):
    """As good as samples can be: images that neither the classifier nor the statistics have seen."""
    return data.test_images[:COUNT]


@pytest.fixture(scope="module")
def base(data, good):
    return evaluate_samples(good, data)


def noisy(images, deviation):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * deviation
    return (images + noise).clamp(0, 255).byte()


def blurred(images, times):
    images = images.float()
    for _ in range(times):
        images = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return images.round().byte()


# -------------------------------------------------------------------------------------------------- sensitivity


def test_good_samples_have_good_figures(base):
    assert base.samples == base.references == COUNT
    assert base.frechet_distance < 1
    assert abs(base.kernel_distance) < 4 * base.kernel_distance_error
    assert min(base.precision, base.recall) > 0.8
    assert base.density > 0.7 and base.coverage > 0.8
    assert base.mode_coverage == 1 and base.class_divergence < 0.03
    assert base.classifier_score > 7.5


def test_lost_classes(data, base):
    """The images are as good as ever, and half of the data have nothing like them."""
    kept = data.test_images[data.test_labels < 5][:COUNT]
    found = evaluate_samples(kept, data)
    assert found.mode_coverage == 0.5
    assert found.recall < base.recall - 0.1
    assert found.coverage < base.coverage - 0.25
    assert found.class_divergence > 0.15
    assert found.classifier_score < 5.1
    assert found.frechet_distance > 5 * base.frechet_distance
    assert found.kernel_distance > base.kernel_distance + 5 * base.kernel_distance_error
    assert found.precision > base.precision - 0.1


def test_the_more_classes_are_lost_the_worse(data):
    found = [evaluate_samples(data.test_images[data.test_labels < kept][:150], data) for kept in (10, 7, 4)]
    assert [each.mode_coverage for each in found] == pytest.approx([1, 0.7, 0.4])
    for name, sign in {"frechet_distance": 1, "class_divergence": 1, "recall": -1, "coverage": -1}.items():
        values = [sign * getattr(each, name) for each in found]
        assert values == sorted(values) and values[0] < values[-1], name


@pytest.mark.parametrize("spoilt", [noisy, blurred])
def test_noise_and_blur(data, good, base, spoilt):
    levels = (40, 120) if spoilt is noisy else (1, 3)
    worse, worst = (evaluate_samples(spoilt(good, level), data) for level in levels)
    assert base.frechet_distance * 2 < worse.frechet_distance < worst.frechet_distance
    assert base.kernel_distance < worse.kernel_distance < worst.kernel_distance
    assert base.precision > worse.precision > worst.precision
    assert base.density > worse.density > worst.density
    assert base.coverage > worst.coverage


def test_a_collapsed_generator_has_figures_that_json_can_hold(data, good, base):
    found = evaluate_samples(good[:1].expand(COUNT, -1, -1, -1), data)
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.mode_coverage == 0.1
    assert found.classifier_score == pytest.approx(1)
    assert found.recall < 0.05 < base.recall
    assert found.frechet_distance > 10 * base.frechet_distance


# --------------------------------------------------------------------------------------- what is compared, and how


def test_figures_are_those_of_the_parts(data, good, base, classifier):
    features, logits = classifier.features_and_logits(good)
    training, _ = classifier.features_and_logits(data.train_images)
    assert base.frechet_distance == pytest.approx(frechet_distance_of(features, training), rel=1e-9)
    assert base.classifier_score == classifier_score(logits)
    assert (base.classifier, base.classifier_hash) == ("digitsnet", classifier.hash)
    assert base.classifier_accuracy == classifier.accuracy
    again = evaluate_samples(good, data, classifier=classifier)
    assert again == base


def test_all_data_are_compared_with_as_many_samples(data, classifier):
    training, _ = classifier.features_and_logits(data.train_images)
    found = evaluate_samples(data.train_images, data, neighbours=3)
    near = neighbour_metrics(training, training, neighbours=3)
    assert found.references == found.samples == len(training)
    assert found.frechet_distance == pytest.approx(0, abs=1e-6)
    assert {name: getattr(found, name) for name in asdict(near)} == pytest.approx(asdict(near))


def test_the_test_split_is_compared_with_on_request(data, good):
    found = evaluate_samples(data.test_images, data, split="test")
    assert found.split == "test"
    assert found.frechet_distance == pytest.approx(0, abs=1e-6)


def test_floats_are_bytes_from_minus_one_to_one(data, good, base):
    assert evaluate_samples(good.float() / 127.5 - 1, data) == base
    assert evaluate_samples((good.double() / 127.5 - 1).requires_grad_(), data) == base


def test_order_of_samples_does_not_matter_where_all_are_used(data, good, base):
    found = evaluate_samples(good.flip(0), data)
    assert found.precision == base.precision and found.coverage == base.coverage
    assert found.frechet_distance == pytest.approx(base.frechet_distance, rel=1e-5)


def test_random_numbers_are_left_alone(data, good, base):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert evaluate_samples(good, data) == base
    assert torch.equal(torch.get_rng_state(), before)


def test_as_dict_is_plain(base):
    assert json.loads(json.dumps(base.as_dict(), allow_nan=False)) == asdict(base)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(20, 3, 8, 8), r"\(N, 1, 8, 8\) with N at least 10, got \(20, 3, 8, 8\)"),
        (torch.zeros(20, 64), "samples must have shape"),
        (torch.zeros(9, 1, 8, 8), "at least 10"),
        (torch.zeros(0, 1, 8, 8), "at least 10"),
        (torch.full((20, 1, 8, 8), math.nan), "outside or NaN"),
        (torch.full((20, 1, 8, 8), 1.5), "outside or NaN"),
        (torch.zeros(20, 1, 8, 8, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_wrong_samples(data, samples, message):
    with pytest.raises(ValueError, match=message):
        evaluate_samples(samples, data)


def test_wrong_options(data, good):
    with pytest.raises(ValueError, match="neighbours must be 1 to 199"):
        evaluate_samples(good, data, neighbours=COUNT)
    with pytest.raises(ValueError, match="split must be one of"):
        evaluate_samples(good, data, split="all")
    with pytest.raises(ValueError, match="one class"):
        evaluate_samples(good, replace(data, classes=("digit",)))


# ------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bytes_of_floats(dtype):
    values = torch.tensor([-1, -0.5, 0.5, 1], dtype=dtype)
    assert to_bytes(values).tolist() == [0, 64, 191, 255]
    assert to_bytes(values).dtype == torch.uint8


def test_bytes_survive_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(values.float() / 127.5 - 1), values)
    assert to_bytes(values) is values
