"""Digits: canonical networks are as accurate as dense ones, and so they are with half of their terms, fine-tuned."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from retract.nets.compress import truncate
from retract.nets.parametrizations.canonical import start_canonical

RANKS = {0: 11, 2: 270, 6: 128, 8: 10}  # those at which the published network of these layers is of full rank


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,347 training and 450 test images of 16 x 16 with their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images, labels = interpolate(images, size=16, mode="bilinear"), torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Sequential:
    convolutions = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2304, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    images, labels, _, _ = digits()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Percent of the test images."""
    _, _, images, labels = digits()
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_half_of_the_terms_fine_tuned_are_as_good_as_a_dense_network(seed: int) -> None:
    torch.manual_seed(seed)
    dense, canonical = network(), network()
    for index, rank in RANKS.items():
        start_canonical(canonical[index], rank)
    optimizer = optimizer_of(list(canonical.parameters()))
    train(dense, optimizer_of(list(dense.parameters())), 20)
    train(canonical, optimizer, 20)
    full = accuracy(canonical)
    assert abs(full - accuracy(dense)) < 1

    truncation = truncate(canonical, ratio=0.5)
    tuned = optimizer_of(list(truncation.model.parameters()))
    truncation.carry_state(optimizer, tuned)
    cut = accuracy(truncation.model)
    train(truncation.model, tuned, 5)
    assert accuracy(truncation.model) > full - 2

    # Biases alone, as by an optimizer that was made before the truncation, and so holds none of its factors.
    stale = truncate(canonical, ratio=0.5).model
    biases = [parameter for name, parameter in stale.named_parameters() if name.endswith("bias")]
    train(stale, optimizer_of(biases), 5)
    assert cut < accuracy(stale) < accuracy(truncation.model) - 10
