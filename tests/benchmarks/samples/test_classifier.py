"""The feature classifier: what its features are, that it is trained once, and that nobody notices the training."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retract.benchmarks.content_cache import state_hash
from retract.benchmarks.data import load
from retract.benchmarks.samples import classifier as sample_classifier
from retract.benchmarks.samples.classifier import FeatureClassifier, Recipe, feature_classifier, recipe_for


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture
def data(digits, own_cache, monkeypatch):
    """A data set to train on in no time."""
    monkeypatch.setattr(
        sample_classifier, "recipe_for", lambda data: Recipe("digitsnet", epochs=2, lr=0.1, batch_size=20)
    )
    return digits.subset(140)


@pytest.fixture
def trainings(monkeypatch):
    """The recipes of the trainings so far."""
    recipes = []
    train = sample_classifier._train
    monkeypatch.setattr(
        sample_classifier, "_train", lambda recipe, *rest: recipes.append(recipe) or train(recipe, *rest)
    )
    return recipes


@pytest.mark.parametrize(
    ("size", "model"), [(8, "digitsnet"), (16, "digitsnet"), (28, "lenet5_bn"), (32, "resnet20"), (48, "resnet20")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_has_a_network_that_takes_it(digits, size, model, channels):
    images = torch.randint(256, (6, channels, size, size), dtype=torch.uint8)
    dataset = replace(digits, train_images=images, mean=(127.0,) * channels, std=(73.0,) * channels)
    recipe = recipe_for(dataset)
    assert recipe.model == model
    network = sample_classifier._network(recipe, dataset).eval()
    classifier = FeatureClassifier(model, network, dataset.normalizer(), "", 0.5)
    features, logits = classifier.features_and_logits(images)
    assert features.ndim == 2 and len(features) == 6 and features.shape[1] in (32, 64, 84)
    assert logits.shape == (6, 10)


def test_features_are_the_input_of_the_last_layer(data, monkeypatch):
    monkeypatch.setattr(sample_classifier, "BATCH", 7)
    classifier = feature_classifier(data)
    images = data.test_images[:20]
    features, logits = classifier.features_and_logits(images)
    network, x = classifier.network, data.normalizer()(images)
    for block in (network.block1, network.block2, network.block3):
        x = F.relu(block(x))
    torch.testing.assert_close(features, x.mean((2, 3)))
    torch.testing.assert_close(logits, network.fc(features))
    assert not features.requires_grad and not network.training
    assert not network.fc._forward_pre_hooks


def test_no_hook_is_left_when_the_network_fails(data):
    classifier = feature_classifier(data)
    with pytest.raises(RuntimeError):
        classifier.features_and_logits(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert not classifier.network.fc._forward_pre_hooks


def test_trained_once_for_the_same_data(data, trainings):
    first, second = feature_classifier(data), feature_classifier(data)
    assert len(trainings) == 1
    assert first.hash == second.hash == state_hash(second.network.state_dict())
    assert first.accuracy == second.accuracy > 0.3
    for images in (data.train_images, data.test_images):
        for one, other in zip(first.features_and_logits(images), second.features_and_logits(images), strict=True):
            assert torch.equal(one, other)


def test_other_data_or_another_recipe_need_another(data, trainings, monkeypatch):
    hashes = [feature_classifier(data).hash]
    hashes.append(feature_classifier(replace(data, train_labels=data.train_labels.roll(1))).hash)
    monkeypatch.setattr(sample_classifier, "recipe_for", lambda data: Recipe("digitsnet", epochs=1, lr=0.1))
    hashes.append(feature_classifier(data).hash)
    monkeypatch.setattr(sample_classifier, "VERSION", "another")
    feature_classifier(data)
    assert len(trainings) == 4 and len(set(hashes)) == 3


def test_a_damaged_classifier_is_trained_again(data, trainings, own_cache):
    accuracy = feature_classifier(data).accuracy
    (path,) = (own_cache / "classifiers").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert feature_classifier(data).accuracy == accuracy
    assert len(trainings) == 2


def test_training_is_reproducible_and_draws_nothing_of_the_callers_numbers(data, own_cache):
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        hashes.add(feature_classifier(data).hash)
        assert torch.equal(torch.get_rng_state(), before)
        next((own_cache / "classifiers").iterdir()).unlink()
    assert len(hashes) == 1


def test_accuracy_is_that_on_the_test_images(data):
    classifier = feature_classifier(data)
    logits = classifier.features_and_logits(data.test_images)[1]
    assert classifier.accuracy == pytest.approx((logits.argmax(1) == data.test_labels).double().mean().item())


def test_one_class_teaches_nothing(data):
    with pytest.raises(ValueError, match="digits has one class"):
        feature_classifier(replace(data, classes=("all",)))


def test_the_last_linear_layer_of_any_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2), nn.Identity()))
    classifier = FeatureClassifier("own", network, lambda images: images.float(), "", 1.0)
    features, logits = classifier.features_and_logits(torch.full((5, 1, 2, 2), 3, dtype=torch.uint8))
    assert features.shape == (5, 3) and logits.shape == (5, 2)


@pytest.mark.slow
def test_the_recipe_for_digits(digits, own_cache):
    assert feature_classifier(digits).accuracy > 0.97
