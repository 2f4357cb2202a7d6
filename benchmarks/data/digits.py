"""The 1797 handwritten digits of 8x8 pixels that scikit-learn carries [Alpaydin98]: no file, no download."""

from __future__ import annotations

import numpy as np
import torch

from .dataset import Dataset, make_dataset

__all__ = ["CLASSES", "read"]

CLASSES = tuple("0123456789")
TEST_IMAGES = 450
GRAY = 15  # the 17 gray values 0 to 16 become 0 to 240


def read() -> Dataset:
    """1347 images to train on and 450 to test on, drawn once and for all.

    The test images are the first 450 of a permutation by NumPy's legacy generator with seed 0, whose stream
    is frozen. The order in the file goes writer by writer, so that its tail would be a harder test than a
    random one.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * GRAY).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))  # a frozen stream
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return make_dataset("digits", (images[train], labels[train]), (images[test], labels[test]), CLASSES)
