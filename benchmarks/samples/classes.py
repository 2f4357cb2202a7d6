"""What a classifier tells about samples: which classes they are of, in which shares, and how sure it is."""

from __future__ import annotations

import torch
from scipy.optimize import nnls
from torch import Tensor

__all__ = ["assignment_rates", "class_divergence", "classifier_score", "estimated_shares", "mode_coverage"]

COVERED = 0.2  # of its share in the data


def assignment_rates(logits: Tensor, labels: Tensor) -> Tensor:
    """How a classifier mistakes classes: (classes, classes), float64, the share of class j that it assigns to class i.

    Args:
        logits: of images that it was not trained on, (N, classes).
        labels: their classes (N,). One that is missing counts as never mistaken.
    """
    classes = logits.shape[1]
    counts = torch.bincount(logits.argmax(1) * classes + labels, minlength=classes**2).view(classes, classes).double()
    counts += torch.diag((counts.sum(0) == 0).double())
    return counts / counts.sum(0)


def estimated_shares(logits: Tensor, rates: Tensor) -> Tensor:
    """The shares of the classes among samples, corrected for the classifier's mistakes: (classes,), float64.

    The shares q >= 0 whose mistakes come nearest to the assignments found, rates q = found: without the correction a
    classifier that takes some dogs for cats finds cats among dogs.

    Args:
        logits: of samples, (N, classes).
        rates: of `assignment_rates`.

    Source: Lipton, Wang, Smola, "Detecting and correcting for label shift with black box predictors", ICML 2018,
    section 3 (BBSE), here with q >= 0.
    """
    found = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double() / len(logits)
    shares = torch.from_numpy(nnls(rates.numpy(), found.numpy())[0])
    return shares / shares.sum()


def mode_coverage(shares: Tensor, data_shares: Tensor) -> float:
    """The fraction of the data's classes that have a fifth of their share (classes,) in the samples, or more."""
    present = data_shares > 0
    return (shares[present] >= COVERED * data_shares[present]).double().mean().item()


def class_divergence(shares: Tensor, data_shares: Tensor) -> float:
    """The Jensen-Shannon divergence of two histograms (classes,), in nats: 0 to log 2, finite whatever is empty.

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory 1991.
    """
    middle = (shares + data_shares) / 2
    divergence = sum(torch.special.xlogy(p, p / middle).nansum() for p in (shares, data_shares)) / 2
    return max(0.0, float(divergence))


def classifier_score(logits: Tensor) -> float:
    """The exponential of how much an image (logits (N, classes)) tells about the class, in nats, on average.

    From 1 (all images alike to the classifier, or all undecided) to the number of classes (sure of every image, all
    classes equally frequent).

    Source: Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 4 (the Inception score).
    """
    given = logits.double().softmax(1)
    marginal = given.mean(0)
    information = torch.special.xlogy(given, given).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()
    return float(information.exp())
