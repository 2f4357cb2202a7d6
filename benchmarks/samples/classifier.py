"""The classifier whose features compare samples with data: trained on the same data, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from retract.nets.cnn import MODELS

from ..content_cache import content_hash, data_hash, load_or_compute, state_hash
from ..data import Dataset
from ..training import Trainer

__all__ = ["FeatureClassifier", "Recipe", "feature_classifier", "recipe_for"]

VERSION = "1"  # of the training below: a change that alters its results needs another
BATCH = 500  # images


@dataclass(frozen=True)
class Recipe:
    """How the classifier of a data set is trained: SGD with Nesterov momentum 0.9, one epoch of warm-up, a cosine."""

    model: str
    epochs: int
    lr: float
    batch_size: int = 128
    weight_decay: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class FeatureClassifier:
    """A classifier and where it comes from.

    ``features(images)`` is the input of the network's last linear layer. ``hash`` is that of its weights;
    ``accuracy`` the one on the test images.
    """

    name: str
    network: nn.Module
    normalize: Callable[[Tensor], Tensor]
    hash: str
    accuracy: float

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, d) and logits (N, classes), in float32 on the CPU, of uint8 images (N, C, H, W)."""
        last = _last_linear(self.network)
        device = next(self.network.parameters()).device
        features: list[Tensor] = []
        logits: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].float().cpu()))
        try:
            for batch in images.split(BATCH):
                logits.append(self.network(self.normalize(batch.to(device))).float().cpu())
        finally:
            handle.remove()
        return torch.cat(features), torch.cat(logits)


def feature_classifier(data: Dataset, *, device: str | torch.device = "cpu") -> FeatureClassifier:
    """The classifier of a data set, trained on its training images or taken from the cache.

    Neither torch's random numbers nor anything else of the caller's is touched. On two CPU cores training takes seconds
    for digits, about a minute for MNIST, and a few minutes for CIFAR-10.

    Raises:
        ValueError: the data have one class only.
    """
    if len(data.classes) < 2:
        raise ValueError(
            f"{data.name} has one class, and a feature classifier needs at least two: sort the images into folders by "
            "class, or compare samples by an Inception file"
        )
    recipe = recipe_for(data)
    key = content_hash("classifier", VERSION, repr(asdict(recipe)), data_hash(data))
    saved = load_or_compute("classifiers", key, lambda: _train(recipe, data, device))
    network = _network(recipe, data)
    network.load_state_dict(saved["network"])
    network.to(device).eval().requires_grad_(False)
    return FeatureClassifier(
        name=recipe.model,
        network=network,
        normalize=data.normalizer(device),
        hash=state_hash(saved["network"]),
        accuracy=saved["accuracy"],
    )


def recipe_for(data: Dataset) -> Recipe:
    """The recipe for images of this size."""
    height, width = data.image_shape[1:]
    if (height, width) == (28, 28):
        return Recipe("lenet5_bn", epochs=3, lr=0.05)
    if max(height, width) <= 16:
        return Recipe("digitsnet", epochs=10, lr=0.1, batch_size=32)
    return Recipe("resnet20", epochs=2, lr=0.1)


def _network(recipe: Recipe, data: Dataset) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would seed GPUs as well
        return MODELS[recipe.model](num_classes=len(data.classes), in_channels=data.image_shape[0])


def _train(recipe: Recipe, data: Dataset, device: str | torch.device) -> dict[str, object]:
    network = _network(recipe, data)
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    trainer = Trainer(
        network,
        optimizer,
        data,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        warmup=min(1, recipe.epochs - 1),
        seed=recipe.seed,
        device=device,
        test_every=recipe.epochs,
    )
    with torch.enable_grad():  # the caller may be measuring, without gradients
        trainer.fit()
    accuracy = trainer.evaluate()[1]
    return {"network": {name: tensor.cpu() for name, tensor in network.state_dict().items()}, "accuracy": accuracy}


def _last_linear(network: nn.Module) -> nn.Linear:
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    return last
